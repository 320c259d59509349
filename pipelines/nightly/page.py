"""A night told three ways: the page (one HTML file that needs no network), JSON for programs, and lines for terminal or mail."""

import base64
import hashlib
import importlib.resources
import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pipelines.nightly import figures
from pipelines.nightly.figures import name_of, summary_of
from pipelines.nightly.records import NightReport, Row
from pipelines.nightly.sections import clean, moment, page_of, state_of
from workers.metrics_log import encode_number

MOST_TOLD = 10
"""Customers named in the text per status; the page names all."""


def write_page(report: NightReport, path: Path) -> Path:
    """Write the page of a night whole, or not at all, and return `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        draft.write_text(page_html(report), encoding="utf-8")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return path


def page_html(report: NightReport) -> str:
    """Return the page. Its policy lets no script or style run but its own, and nothing be loaded from anywhere."""
    environment = Environment(loader=PackageLoader("pipelines.nightly"), autoescape=True, undefined=StrictUndefined)
    style, script = _resource("night.css"), _resource("night.js")
    own = f"style-src '{_hash(style)}'; script-src '{_hash(script)}'"
    return environment.get_template("night.html").render(
        page=page_of(report),
        style=Markup(style),
        script=Markup(script),
        policy=f"default-src 'none'; {own}; base-uri 'none'; form-action 'none'",
    )


def report_json(report: NightReport) -> dict[str, Any]:
    """Return the night as JSON data that every parser takes: numbers that are not finite are words, as in metrics.

    `counts` are customers by status, `reasons` by status and reason; `summary` is this night's line of the `trend`, which has
    earlier nights, oldest first. A customer bears the keys of `Row` and of its `Care`, without the listing of its files.
    """
    ended = None if report.ended is None else moment(report.ended, report.timezone)
    return _plain(
        {
            "fleet": report.fleet,
            "night": report.night,
            "timezone": report.timezone,
            "started": moment(report.started, report.timezone),
            "ended": ended,
            "is_finished": report.is_finished,
            "counts": report.counts,
            "reasons": report.reasons,
            "summary": asdict(summary_of(report)),
            "remarks": report.remarks,
            "customers": [_customer(row) for row in report.rows],
            "trend": [asdict(night) for night in report.trend],
        }
    )


def summary_text(report: NightReport) -> str:
    """Return the night in a few lines: counts with reasons, remarks, and who failed or is held, with the way out."""
    summary = summary_of(report)
    lines = [
        f"Night {report.night} of {report.fleet}, {len(report.rows):,} customers. {state_of(report)}",
        *[_counted(report, status, count) for status, count in report.counts.items() if count],
        f"{summary.num_tokens:,} tokens trained on, {summary.cost:.4g} accelerator-hours",
        *report.remarks,
        *_named(report, "failed"),
        *_named(report, "held"),
    ]
    return clean("\n".join(lines))


def _counted(report: NightReport, status: str, count: int) -> str:
    reasons = ", ".join(f"{number:,} {reason}" for reason, number in figures.by_reason(figures.with_status(report, status)))
    return f"{count:>7,} {status}" + (f" ({reasons})" if reasons else "")


def _named(report: NightReport, status: str) -> list[str]:
    rows = figures.with_status(report, status)
    told = [" ".join(filter(None, [f"{status} {name_of(row)}:", row.sentence or row.reason, row.next_step])) for row in rows]
    more = [f"... and {len(rows) - MOST_TOLD:,} more {status}"] if len(rows) > MOST_TOLD else []
    return told[:MOST_TOLD] + more


def _customer(row: Row) -> dict[str, Any]:
    body = {name: value for name, value in vars(row).items() if name not in {"care", "signature"}}
    return {"name": name_of(row), **body, **vars(row.care)}


def _plain(value: Any) -> Any:
    match value:
        case str():
            return clean(value)
        case bool() | int() | None:
            return value
        case float():
            return value if math.isfinite(value) else encode_number(value)
        case Mapping():
            return {clean(str(key)): _plain(one) for key, one in value.items()}
        case Sequence():
            return [_plain(one) for one in value]
        case _:
            return clean(str(value))


def _resource(name: str) -> str:
    return importlib.resources.files("pipelines.nightly").joinpath("templates", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
