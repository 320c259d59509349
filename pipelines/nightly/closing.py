"""The end of a night: what the next one compares with, its report and page in the store, on this machine and in MLflow, and the
word to whoever is to hear of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipelines.nightly.figures import summary_of
from pipelines.nightly.ledger import FleetLedger, Key, json_bytes
from pipelines.nightly.notify import notify
from pipelines.nightly.page import report_json, write_page
from pipelines.nightly.records import NightReport, Row
from pipelines.nightly.shown import Shown
from pipelines.nightly.spec import Fleet
from pipelines.nightly.survey import remembered

MAX_TREND = 60
"""Nights that a report looks back on."""


def keep_night(ledger: FleetLedger, report: NightReport, memory: Mapping[Key, Row], home: Path) -> Path:
    """Keep outcomes, page and report in the store, in this order, and copies of page and report in the home; return the page."""
    folder = home / "nights" / report.fleet
    page = write_page(report, folder / f"{report.night}.html")
    body = report_json(report)
    body["trend"] = body["trend"][-MAX_TREND:]
    (folder / f"{report.night}.json").write_bytes(json_bytes(body))
    ledger.keep_outcomes(report.night, remembered(memory, report.rows))
    ledger.keep_report(report.night, body, page.read_bytes())
    return page


@dataclass(frozen=True)
class Closing:
    """Tells of a night that has ended."""

    fleet: Fleet
    shown: Shown

    def close(self, report: NightReport, page: Path) -> tuple[str, ...]:
        """Show the night in MLflow and tell who is to hear of it; return a sentence for everybody who could not be told."""
        summary = summary_of(report)
        log, key = self.shown.log, self.shown.parent
        log.tags(key, {f"lorafleet.{status}": str(count) for status, count in summary.counts.items()})
        log.file(key, page, "report")
        log.file(key, page.with_suffix(".json"), "report")
        log.end(key, "succeeded" if report.is_finished and not summary.counts["failed"] else "failed")
        told = self.fleet.spec.notify
        return () if told is None else notify(report, page, on=told.on, urls_env=told.urls_env)
