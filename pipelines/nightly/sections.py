"""What the page of a night shows, section by section, as plain text and numbers: the template only lays it out.

Sentences may quote what customers wrote. They are text here, cleaned of what no file or terminal can hold, and escaped by the
template; the table of all customers travels as JSON that cannot end its own script element.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from markupsafe import Markup

from pipelines.nightly import figures
from pipelines.nightly.figures import gain_of, name_of, summary_of
from pipelines.nightly.plots import Plot, histogram, line, stacked_bars
from pipelines.nightly.records import STATUSES, NightReport, NightSummary, Row
from workers.metrics_log import encode_number

MOST_LISTED = 25
"""Lines of a list of failed, held or rejected customers; the table of all customers has the others."""
MOST_EXTREME = 15
"""Lines of the lists that show extremes: slowest, most drifted, most bad rows."""
MOST_NIGHTS = 60
MOST_QUOTED = 20
"""Bad rows told per customer."""
_UNFIT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")
WORKED: tuple[str, ...] = tuple(status for status in STATUSES if status != "skipped")

COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("customer", "text", "tenant and task"),
    ("status", "text", "how its night ended"),
    ("reason", "text", "why, in a word"),
    ("rows", "count", "training rows"),
    ("new", "count", "rows that the last training did not see"),
    ("deleted", "count", "rows of the last training that are gone"),
    ("bad", "count", "rows set aside because they cannot be read or trained on"),
    ("drift", "number", "distance of the data from that of the last training, 0 to 1"),
    ("challenger", "number", "tonight's adapter on the holdout"),
    ("champion", "number", "the champion before, on the same rows"),
    ("base", "number", "the plain base, on the same rows"),
    ("gain", "number", "how much better the challenger is than the champion, or than the base where there was none"),
    ("gates", "text", "passed, or the gates that did not"),
    ("generation", "count", "of the journal, afterwards"),
    ("steps", "count", "optimiser steps"),
    ("seconds", "number", "of training; those in one pack share their host"),
    ("tokens", "count", "trained on"),
    ("cost", "number", "accelerator-hours, its share by tokens"),
    ("priority", "count", ""),
)
"""(name, kind, meaning) of the columns of the table of customers, in the order of `_cells`."""


@dataclass(frozen=True)
class Listing:
    """A titled table of text. `more` lines are left out of it."""

    id: str
    title: str
    caption: str
    columns: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    more: int = 0


@dataclass(frozen=True)
class Page:
    """What the template shows."""

    title: str
    state: str
    is_finished: bool
    facts: list[tuple[str, str]]
    remarks: list[str]
    counts: list[tuple[str, int, str]]
    """(status, customers, their reasons)."""
    to_look_at: list[Listing]
    extremes: list[Listing]
    trend: Listing | None
    plots: list[Plot]
    trend_plots: list[Plot]
    num_customers: int
    columns: tuple[tuple[str, str, str], ...]
    metrics: str
    data: Markup
    """JSON of the table of customers, for a script element."""


def page_of(report: NightReport) -> Page:
    """Return what the page says of a night."""
    nights = [*report.trend, summary_of(report)][-MOST_NIGHTS:]
    return Page(
        title=clean(f"Night {report.night} of {report.fleet}"),
        state=state_of(report),
        is_finished=report.is_finished,
        facts=_facts(report),
        remarks=[clean(remark) for remark in report.remarks],
        counts=[(status, count, _reasons(report, status)) for status, count in report.counts.items()],
        to_look_at=[one for one in _to_look_at(report) if one.lines],
        extremes=[one for one in _extremes(report) if one.lines],
        trend=_trend(report, nights) if len(nights) > 1 else None,
        plots=_plots(report),
        trend_plots=_trend_plots(nights) if len(nights) > 1 else [],
        num_customers=len(report.rows),
        columns=COLUMNS,
        metrics=", ".join(sorted({row.metric for row in report.rows})),
        data=_data(report),
    )


def clean(text: str) -> str:
    """Return `text` with a mark in place of each control character and lone surrogate, and of what turns text around."""
    return _UNFIT.sub("\ufffd", text)


def state_of(report: NightReport) -> str:
    """Return whether the night is over, in a sentence."""
    if report.is_finished:
        return f"Finished in {duration(summary_of(report).seconds)}."
    if report.ended is None:
        return "Not finished: it is still running, or was cut off; the same command goes on with it."
    return "Ended before all was done; the same command goes on with it."


def duration(seconds: float) -> str:
    """Return a duration as people say it."""
    if not math.isfinite(seconds) or seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {round(seconds) % 60:02d} s"


def moment(seconds: float, timezone: str) -> str:
    """Return a time since the epoch as it is there, with its offset."""
    return datetime.fromtimestamp(seconds, _zone(timezone)).isoformat(" ", "seconds")


def _zone(name: str) -> tzinfo:
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError):  # a machine without that zone still reads the page
        return UTC


def _facts(report: NightReport) -> list[tuple[str, str]]:
    summary = summary_of(report)
    ended = [("ended", moment(report.ended, report.timezone))] if report.ended is not None else []
    return [
        ("started", moment(report.started, report.timezone)),
        *ended,
        ("time zone", clean(report.timezone)),
        ("customers", f"{len(report.rows):,}"),
        ("tokens trained on", f"{summary.num_tokens:,}"),
        ("accelerator-hours", f"{summary.cost:.4g}"),
    ]


def _reasons(report: NightReport, status: str) -> str:
    found = figures.by_reason(row for row in report.rows if row.status == status)
    return ", ".join(f"{count:,} {clean(reason)}" for reason, count in found)


def _listing(id_: str, title: str, caption: str, columns: Sequence[str], rows: Sequence[Row], cells: Any) -> Listing:
    lines = tuple(tuple(clean(cell) for cell in cells(row)) for row in rows[:MOST_LISTED])
    return Listing(id_, title, caption, tuple(columns), lines, max(0, len(rows) - MOST_LISTED))


def _to_look_at(report: NightReport) -> list[Listing]:
    columns = ("customer", "reason", "what happened", "what to do")
    listed = [
        ("failed", "Failed", "Their champions go on serving. None of them kept another customer from being trained."),
        ("held", "Held", "Not trained, or not promoted, until a person or the next night decides."),
        ("rejected", "Rejected by a gate", "The champion stays; the challenger and its scores are kept."),
    ]
    return [
        _listing(status, title, caption, columns, figures.with_status(report, status), _told) for status, title, caption in listed
    ]


def _told(row: Row) -> tuple[str, ...]:
    refusals = (str(one.get("sentence", "")) for one in row.verdicts if not one.get("passed"))
    name = name_of(row) + (" (canary)" if row.is_canary else "")
    return name, row.reason, row.sentence or "; ".join(refusals), row.next_step


def _extremes(report: NightReport) -> list[Listing]:
    slow = figures.slowest(report, MOST_EXTREME)
    drifted = figures.most_drifted(report, MOST_EXTREME)
    bad = figures.most_quarantined(report, MOST_EXTREME)
    return [
        _listing(
            "slowest",
            "Slowest",
            "Longest from their first step to their last; customers in one pack share their host, so times overlap.",
            ("customer", "seconds", "rows", "steps", "tokens", "cost"),
            slow,
            lambda row: (
                name_of(row),
                f"{row.seconds:.1f}",
                f"{row.num_rows:,}",
                f"{row.num_steps:,}",
                f"{row.num_tokens:,}",
                f"{row.cost:.4g}",
            ),
        ),
        _listing(
            "drift",
            "Data that moved most",
            "Distance of tonight's data from what was trained on last: 0 is alike, 1 has nothing in common.",
            ("customer", "drift", "new", "deleted", "status"),
            drifted,
            lambda row: (
                name_of(row),
                f"{row.care.drift:.3f}",
                f"{row.care.num_new:,}",
                f"{row.care.num_deleted:,}",
                row.status,
            ),
        ),
        _listing(
            "quarantined",
            "Bad rows set aside",
            "They were not trained on. The customer's details in the table name more of them.",
            ("customer", "rows", "the first"),
            bad,
            lambda row: (
                name_of(row),
                f"{row.care.num_quarantined:,}",
                "; ".join(f"{where} {what}" for where, what in row.care.quarantine[:3]),
            ),
        ),
    ]


def _trend(report: NightReport, nights: Sequence[NightSummary]) -> Listing:
    def told(night: NightSummary) -> tuple[str, ...]:
        counts = (f"{night.counts.get(status, 0):,}" for status in STATUSES)
        gain = "" if night.mean_gain is None else f"{night.mean_gain:.4g}"
        when = moment(night.started, report.timezone)[:16]
        return clean(night.night), when, duration(night.seconds), *counts, f"{night.num_tokens:,}", f"{night.cost:.4g}", gain

    columns = ("night", "started", "lasted", *STATUSES, "tokens", "cost", "mean gain")
    lines = tuple(told(night) for night in reversed(nights))
    return Listing("nights", "", "Mean gain is that of the promoted challengers over what served before them.", columns, lines)


def _plots(report: NightReport) -> list[Plot]:
    drawn = []
    gains = {
        status: [gain for row in report.rows if row.status == status and (gain := gain_of(row)) is not None] for status in WORKED
    }
    if any(gains.values()):
        caption = "Customers by how much better the challenger is than what served before it; below 0 it is worse."
        drawn.append(Plot("Gain", caption, histogram("Customers by gain", gains, axis="gain")))
    seconds = [row.seconds for row in figures.worked_on(report) if row.seconds > 0 and math.isfinite(row.seconds)]
    if seconds:
        half, most = (figures.quantile(seconds, share) for share in (0.5, 0.99))
        caption = f"Customers by seconds of training: half took {half:.3g} s or less, 99 of 100 took {most:.3g} s or less."
        drawn.append(Plot("Training time", caption, histogram("Customers by seconds", {"customers": seconds}, axis="seconds")))
    return drawn


def _trend_plots(nights: Sequence[NightSummary]) -> list[Plot]:
    names = [clean(night.night) for night in nights]
    counts = {status: [float(night.counts.get(status, 0)) for night in nights] for status in WORKED}
    drawn = [
        Plot(
            "Customers",
            "By night and status, those that were skipped left out.",
            stacked_bars("Customers by night", names, counts),
        ),
        Plot(
            "Time",
            "Seconds that each night lasted.",
            stacked_bars("Seconds by night", names, {"seconds": _of(nights, "seconds")}),
        ),
        Plot("Tokens", "Trained on, by night.", stacked_bars("Tokens by night", names, {"tokens": _of(nights, "num_tokens")})),
        Plot("Cost", "Accelerator-hours by night.", stacked_bars("Cost by night", names, {"cost": _of(nights, "cost")})),
    ]
    gains = [night.mean_gain for night in nights]
    if any(gain is not None for gain in gains):
        drawn.append(Plot("Mean gain", "Of the promoted challengers, by night.", line("Mean gain by night", names, gains)))
    return drawn


def _of(nights: Sequence[NightSummary], name: str) -> list[float]:
    return [float(getattr(night, name)) for night in nights]


def _data(report: NightReport) -> Markup:
    order = {status: rank for rank, status in enumerate(STATUSES)}
    rows = sorted(report.rows, key=lambda row: (order[row.status], -row.priority, row.tenant, row.task))
    body = {"kinds": [kind for _, kind, _ in COLUMNS], "rows": [_cells(row) for row in rows]}
    text = json.dumps(body, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _cells(row: Row) -> list[Any]:
    """A cell for each column, then the details that are shown when the customer is opened."""
    care, is_new = row.care, row.status != "skipped"
    worked = [row.num_steps, _number(row.seconds), row.num_tokens, _number(row.cost)] if is_new else [None] * 4
    moved = [care.num_new, care.num_deleted, care.num_quarantined, _number(care.drift)]
    losses = [_number(value) for value in (row.challenger, row.champion, row.base, gain_of(row))]
    return [
        clean(name_of(row)),
        row.status,
        clean(row.reason),
        row.num_rows,
        *moved,
        *losses,
        _gates(row),
        row.generation,
        *worked,
        row.priority,
        _details(row),
    ]


def _gates(row: Row) -> str:
    failed = figures.failed_gates(row)
    return clean(f"not {', '.join(failed)}") if failed else ("passed" if row.verdicts else "")


def _details(row: Row) -> dict[str, Any]:
    """What there is to tell, by heading; nothing that is empty."""
    care = row.care
    found: Mapping[str, Any] = {
        "what happened": row.sentence,
        "what to do": row.next_step,
        "canary": "one of the canaries" if row.is_canary else "",
        "metric": row.metric if row.verdicts or row.challenger is not None else "",
        "gates": [f"{one.get('gate', '')}: {one.get('sentence', '')}" for one in row.verdicts],
        "data": _data_told(row),
        "labels": ", ".join(f"{label}: {count:,}" for label, count in care.labels.items()),
        "notes": list(care.notes),
        "bad rows": [f"{where} {what}" for where, what in care.quarantine[:MOST_QUOTED]],
        "adapter": row.adapter_id or "",
        "champion": row.champion_id or "",
        "rejected nights in a row": str(row.num_rejections or ""),
    }
    return {name: [clean(one) for one in told] if isinstance(told, list) else clean(told) for name, told in found.items() if told}


def _data_told(row: Row) -> str:
    care = row.care
    if not care.num_read:
        return ""
    counts = f"{care.num_read:,} good rows, {care.num_duplicates:,} duplicates, {care.num_overlap:,} also in the holdout"
    return f"{counts}; {care.mean_characters:.0f} characters on average, 95 of 100 have {care.p95_characters:.0f} or fewer"


def _number(value: float | None) -> float | str | None:
    """A number with the digits that a table has room for; a word for what is not finite."""
    if value is None:
        return None
    return float(f"{value:.6g}") if math.isfinite(value) else encode_number(value)
