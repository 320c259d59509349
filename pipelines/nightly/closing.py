"""The end of a night: what the next one compares with, its report and page in the store, on this machine and in MLflow, and the
word to whoever is to hear of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.nightly.figures import summary_of
from pipelines.nightly.ledger import FleetLedger, Key, json_bytes
from pipelines.nightly.notify import notify
from pipelines.nightly.page import report_json, write_page
from pipelines.nightly.records import NightReport, Row
from pipelines.nightly.shown import Shown
from pipelines.nightly.spec import NotifySpec
from pipelines.nightly.survey import remembered

MAX_TREND = 60
"""Nights that a report looks back on."""


@dataclass(frozen=True)
class Closing:
    """Ends one night of a fleet. The report in the store comes last: whoever finds none does all of this again."""

    ledger: FleetLedger
    shown: Shown
    home: Path

    def close(self, report: NightReport, memory: Mapping[Key, Row], told: NotifySpec | None) -> tuple[Path, tuple[str, ...]]:
        """Keep and show a night and tell of it; return its page, and a sentence for everybody who could not be told."""
        page = self._keep(report, memory)
        self.shown.close(summary_of(report).counts, page)
        notes = () if told is None else notify(report, page, on=told.on, urls_env=told.urls_env)
        self._finish(report, page)
        return page, tuple(notes)

    def cut_off(self, report: NightReport, memory: Mapping[Key, Row], left: Sequence[Row]) -> None:
        """Keep a night that nobody finishes any more; `left` are those of its rows that it planned and did not end."""
        page = self._keep(report, memory)
        self.shown.cut_off(left, page)
        self._finish(report, page)

    def _keep(self, report: NightReport, memory: Mapping[Key, Row]) -> Path:
        """Keep what the next night compares with, and write page and report in the home."""
        page = write_page(report, self.home / "nights" / report.fleet / f"{report.night}.html")
        page.with_suffix(".json").write_bytes(json_bytes(_body(report)))
        self.ledger.keep_outcomes(report.night, remembered(memory, report.rows))
        return page

    def _finish(self, report: NightReport, page: Path) -> None:
        self.ledger.keep_report(report.night, _body(report), page.read_bytes())


def _body(report: NightReport) -> dict[str, object]:
    body = report_json(report)
    body["trend"] = body["trend"][-MAX_TREND:]
    return body
