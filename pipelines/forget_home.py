"""A tenant's traces on this machine: events in tracking logs, reports of its sweeps, and its rows on the pages of nights.

What other machines keep is theirs to remove: the same command does it there. The node cache holds bases only, which are nobody's.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from infra.crashpoints import crashpoint
from infra.tracking_purge import drop_runs, runs_in
from pipelines.nightly.ledger import json_bytes
from pipelines.nightly.retold import may_name, report_without

TENANT_TAG = "lorafleet.tenant"


def logs_of(home: Path, tenant: str) -> list[Path]:
    """Return the tracking logs in which there are runs of a tenant."""
    logs = sorted((home / "tracking").glob("*.jsonl"))
    return [path for path in logs if runs_in(path, lambda event: _is_of(event, tenant))]


def clean_logs(home: Path, tenant: str) -> None:
    """Take a tenant's runs out of the tracking logs. Raises ClaimHeld while another process has one of them open."""
    for path in logs_of(home, tenant):
        drop_runs(path, lambda event: _is_of(event, tenant))
        crashpoint("tenant-log-cleaned", path.name)


def reports_of(home: Path, tenant: str) -> list[Path]:
    """Return the reports of a tenant's sweeps: by their content, since "acme-a-b.html" may be another's."""
    found = sorted((home / "reports").glob(f"{tenant}-*.html"))
    return [path for path in found if _is_titled(path, f"Sweep {tenant}/{path.stem.removeprefix(f'{tenant}-')}")]


def nights_of(home: Path, tenant: str) -> list[Path]:
    """Return the copies of nights' reports that name a tenant, and pages that stand there without one."""
    return [*_reports_naming(home, tenant), *_lone_pages(home, tenant)]


def clean_files(home: Path, tenant: str) -> None:
    """Remove the reports of a tenant's sweeps, and tell nights without it."""
    for path in reports_of(home, tenant):
        path.unlink(missing_ok=True)
    for path in _lone_pages(home, tenant):
        path.unlink(missing_ok=True)  # a copy: `nightly report` fetches it again
    for path in _reports_naming(home, tenant):
        for written in retell(path, path.parent, tenant):
            crashpoint("tenant-copy-retold", written.name)


def retell(report: Path, folder: Path, tenant: str) -> list[Path]:
    """Write a night's page and report (a JSON file) anew into `folder`, without a tenant; return both.

    Returns none, and changes nothing, if the report does not name it. The report comes last: while it names the tenant, the page
    may.
    """
    data = report.read_bytes()
    if not may_name(data, tenant):
        return []
    body, html = report_without(json.loads(data), tenant)
    page, told = folder / f"{report.stem}.html", folder / report.name
    _replace(page, html.encode())
    _replace(told, json_bytes(body))
    return [page, told]


def is_logged(home: Path, tenant: str) -> bool:
    """Tell whether a log file of this machine names a tenant."""
    name = re.compile(rf"(?<![a-z0-9-]){re.escape(tenant)}(?![a-z0-9-])")
    return any(name.search(path.read_text(encoding="utf-8", errors="replace")) for path in (home / "logs").glob("*"))


def _reports_naming(home: Path, tenant: str) -> Iterator[Path]:
    for path in sorted((home / "nights").glob("*/*.json")):
        if may_name(path.read_bytes(), tenant):
            yield path


def _lone_pages(home: Path, tenant: str) -> Iterator[Path]:
    for path in sorted((home / "nights").glob("*/*.html")):
        if not path.with_suffix(".json").exists() and f"{tenant}." in path.read_text(encoding="utf-8", errors="replace"):
            yield path


def _is_titled(path: Path, title: str) -> bool:
    return f"<title>{title}</title>" in path.read_text(encoding="utf-8", errors="replace")


def _is_of(event: Mapping[str, Any], tenant: str) -> bool:
    tags = event.get("tags")
    return isinstance(tags, dict) and tags.get(TENANT_TAG) == tenant


def _replace(path: Path, data: bytes) -> None:
    draft = path.with_name(f".{path.name}.new")
    draft.write_bytes(data)
    draft.replace(path)
