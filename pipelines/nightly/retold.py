"""Nights told again without one of their customers, whose tenant is to be forgotten: outcomes, report and page, from the report.

Counts and sums are those of the rows that stay. Where sentences on others name one of its models (a canary that stopped the
night), they name nobody any more.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import fields, replace
from datetime import datetime
from typing import Any

from pipelines.nightly.page import page_html, report_json
from pipelines.nightly.records import Care, NightReport, NightSummary, Row

SOMEBODY = "a forgotten customer"
_NUMBERS = frozenset(
    {"challenger", "champion", "base", "seconds", "cost", "trained_at", "ended_at", "drift", "mean_characters", "p95_characters"}
)
"""Fields of rows that may not be finite: words in a report."""
_NOT_TOLD = frozenset({"care", "signature"})


def may_name(data: bytes, tenant: str) -> bool:
    """Tell, fast, whether a night's JSON may name a tenant."""
    return f'"{tenant}"'.encode() in data


def outcomes_without(body: Mapping[str, Any], tenant: str) -> dict[str, Any]:
    """Return a night's outcomes (`FleetLedger.keep_outcomes`) without a tenant."""
    return _without(body, "rows", tenant)


def report_without(body: Mapping[str, Any], tenant: str) -> tuple[dict[str, Any], str]:
    """Return a night's report (`page.report_json`) and its page, without a tenant."""
    report = report_of(_without(body, "customers", tenant))
    return report_json(report), page_html(report)


def report_of(body: Mapping[str, Any]) -> NightReport:
    """Return the night that `page.report_json` told of; listings of files are not in it."""
    summary = body["summary"]
    started = float(summary["started"])
    return NightReport(
        fleet=body["fleet"],
        night=body["night"],
        timezone=body["timezone"],
        started=started,
        ended=None if body["ended"] is None else max(started + summary["seconds"], _epoch(body["ended"])),
        is_finished=body["is_finished"],
        rows=tuple(map(_row, body["customers"])),
        remarks=tuple(body["remarks"]),
        trend=tuple(NightSummary(**one) for one in body["trend"]),
    )


def _epoch(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()


def _row(body: Mapping[str, Any]) -> Row:
    read: dict[str, Any] = {
        name: float(value) if name in _NUMBERS and value is not None else value for name, value in body.items()
    }
    of_care = {one.name: read[one.name] for one in fields(Care) if one.name in read}
    quarantine = tuple((str(where), str(what)) for where, what in of_care.get("quarantine", ()))
    care = replace(Care(**of_care), quarantine=quarantine, notes=tuple(of_care.get("notes", ())))
    own = {one.name: read[one.name] for one in fields(Row) if one.name in read and one.name not in _NOT_TOLD}
    return Row(**own | {"care": care, "verdicts": tuple(own["verdicts"])})


def _without(body: Mapping[str, Any], rows: str, tenant: str) -> dict[str, Any]:
    """Return JSON data without the tenant's rows, and without the names of its models in what is said of others."""
    gone = [one for one in body[rows] if one["tenant"] == tenant]
    kept: dict[str, Any] = {**body, rows: [one for one in body[rows] if one["tenant"] != tenant]}
    if not gone:
        return kept
    names = "|".join(re.escape(f"{tenant}.{task}") for task in sorted({one["task"] for one in gone}))
    return json.loads(re.sub(rf"(?<![a-z0-9.-])({names})(?![a-z0-9-])", SOMEBODY, json.dumps(kept)))
