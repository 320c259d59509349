"""What the store keeps of a fleet's nights, so that the same command finishes a night whoever was killed in the middle of it.

Below `fleets/<name>/nights/<night>/`: `night.json` when it began; `plans/<tenant>.<task>.json` before a customer is trained (what
exactly will be trained, so that a restart trains nothing else); `rows/<tenant>.<task>.json` when its night has ended; at the
end `outcomes.json` (all customers, those that did not change too: what the next night compares with), `report.json` and
`page.html`. Everything is written once; a night is finished when its `report.json` is there.
"""

import contextlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from infra.crashpoints import crashpoint
from infra.errors import ConditionFailed, ObjectNotFound
from infra.records import decode_record, encode_record
from infra.storage import Storage
from pipelines.nightly.records import NightSummary, Row
from workers import layout

NIGHT_FORMAT, PLAN_FORMAT, ROW_FORMAT = "night/1", "night-plan/1", "night-row/1"
OUTCOMES_FORMAT, REPORT_FORMAT = "night-outcomes/1", "night-report/1"
CLAIM_FORMAT = "fleet-claim/1"
"""Of the claim that whoever drives a fleet's night holds."""
Key = tuple[str, str]
"""(tenant, task)."""


@dataclass(frozen=True)
class Begun:
    """A night as it began."""

    night: str
    started: float
    deadline: float | None
    """Seconds since the epoch; None: none."""


@dataclass(frozen=True)
class Plan:
    """What was decided for a customer before it was trained."""

    state_key: str
    job: Mapping[str, Any]
    """The pinned job as JSON."""
    row: Row
    """The row as far as it is known before training."""


@dataclass(frozen=True)
class FleetLedger:
    """The nights of one fleet in a store."""

    store: Storage
    fleet: str

    def nights(self) -> list[str]:
        """Return the names of all nights that began, oldest first."""
        return self._with_file("night.json")

    def finished(self) -> list[str]:
        """Return the names of all nights that are finished, oldest first."""
        return self._with_file("report.json")

    def _with_file(self, name: str) -> list[str]:
        prefix = layout.nights(self.fleet)
        found = (info.key.removeprefix(prefix).split("/") for info in self.store.list(prefix))
        return sorted((parts[0] for parts in found if parts[1:] == [name]), key=order_of)

    def begin(self, begun: Begun) -> Begun:
        """Begin a night, or return how the night of that name began."""
        key = layout.night_file(self.fleet, begun.night, "night.json")
        with contextlib.suppress(ConditionFailed):
            self.store.put_if_absent(key, encode_record(NIGHT_FORMAT, asdict(begun)))
        crashpoint("night-begun", begun.night)
        return self.begun(begun.night)

    def begun(self, night: str) -> Begun:
        """Return how a night began. Raises ObjectNotFound."""
        key = layout.night_file(self.fleet, night, "night.json")
        return Begun(**decode_record(self.store.get(key)[0], NIGHT_FORMAT, key))

    def is_finished(self, night: str) -> bool:
        """Tell whether a night's report is there."""
        return self.store.head(layout.night_file(self.fleet, night, "report.json")) is not None

    def plan(self, night: str, tenant: str, task: str) -> Plan | None:
        """Return what was decided for a customer, None if nothing was."""
        key = layout.night_plan(self.fleet, night, tenant, task)
        try:
            body = decode_record(self.store.get(key)[0], PLAN_FORMAT, key)
        except ObjectNotFound:
            return None
        return Plan(body["state_key"], body["job"], Row.from_json(body["row"]))

    def keep_plan(self, night: str, plan: Plan) -> None:
        """Keep what was decided, before the customer is trained."""
        key = layout.night_plan(self.fleet, night, plan.row.tenant, plan.row.task)
        body = {"state_key": plan.state_key, "job": dict(plan.job), "row": plan.row.to_json()}
        with contextlib.suppress(ConditionFailed):
            self.store.put_if_absent(key, encode_record(PLAN_FORMAT, body))
        crashpoint("night-planned", f"{plan.row.tenant}.{plan.row.task}")

    def planned(self, night: str) -> set[Key]:
        """Return the customers that were planned."""
        return {_key_in(info.key) for info in self.store.list(f"{layout.night(self.fleet, night)}plans/")}

    def rows(self, night: str) -> dict[Key, Row]:
        """Return the rows that have ended, of customers that were looked at."""
        found = {}
        for info in self.store.list(f"{layout.night(self.fleet, night)}rows/"):
            row = Row.from_json(decode_record(self.store.get(info.key)[0], ROW_FORMAT, info.key))
            found[row.tenant, row.task] = row
        return found

    def record(self, night: str, row: Row) -> Row:
        """Keep how a customer's night ended; return what stands there, which is what was first."""
        key = layout.night_row(self.fleet, night, row.tenant, row.task)
        try:
            self.store.put_if_absent(key, encode_record(ROW_FORMAT, row.to_json()))
        except ConditionFailed:
            return Row.from_json(decode_record(self.store.get(key)[0], ROW_FORMAT, key))
        crashpoint("night-row-written", f"{row.tenant}.{row.task}")
        return row

    def outcomes(self, night: str) -> dict[Key, Row]:
        """Return all customers of a finished night by (tenant, task); of one that was cut off, those that ended."""
        key = layout.night_file(self.fleet, night, "outcomes.json")
        try:
            body = decode_record(self.store.get(key)[0], OUTCOMES_FORMAT, key)
        except ObjectNotFound:
            return self.rows(night)
        return {(row.tenant, row.task): row for row in map(Row.from_json, body["rows"])}

    def keep_outcomes(self, night: str, rows: Iterable[Row]) -> None:
        """Keep what the next night compares with. Called before the report, which says that the night is finished."""
        body = {"rows": [row.to_json() for row in rows]}
        self.store.put(layout.night_file(self.fleet, night, "outcomes.json"), encode_record(OUTCOMES_FORMAT, body))
        crashpoint("night-outcomes-written", night)

    def keep_report(self, night: str, report: Mapping[str, Any], page: bytes) -> None:
        """Keep the page, then the report."""
        self.store.put(layout.night_file(self.fleet, night, "page.html"), page)
        crashpoint("night-page-written", night)
        self.store.put(layout.night_file(self.fleet, night, "report.json"), encode_record(REPORT_FORMAT, report))
        crashpoint("night-finished", night)

    def report(self, night: str) -> dict[str, Any]:
        """Return the report of a finished night as JSON data. Raises ObjectNotFound."""
        key = layout.night_file(self.fleet, night, "report.json")
        return decode_record(self.store.get(key)[0], REPORT_FORMAT, key)

    def page(self, night: str) -> bytes:
        """Return the page of a finished night. Raises ObjectNotFound."""
        return self.store.get(layout.night_file(self.fleet, night, "page.html"))[0]

    def trainings(self, wanted: Collection[Key], most_nights: int) -> list[Row]:
        """Return rows that were trained, of the last nights, oldest first: of as few as know all of the wanted customers."""
        found: list[Row] = []
        missing = set(wanted)
        for night in self.finished()[: -most_nights - 1 : -1]:
            if not missing:
                break
            trained = [row for row in self.outcomes(night).values() if row.num_tokens]
            missing -= {(row.tenant, row.task) for row in trained}
            found = trained + found
        return found

    def memory(self) -> tuple[dict[Key, Row], list[NightSummary]]:
        """Return each customer's last row before now, and the trend: what a new night starts from."""
        finished = self.finished()
        if not finished:
            return {}, []
        report = self.report(finished[-1])
        trend = [NightSummary(**one) for one in report["trend"]]
        return self.outcomes(finished[-1]), [*trend, NightSummary(**report["summary"])]


def order_of(night: str) -> tuple[str, int]:
    """Return what nights are ordered by: their date, then their number ("2026-11-23-2" comes after "2026-11-23")."""
    date, number = night[:10], night[11:]
    return date, int(number) if number.isdecimal() else 1


def following(night: str) -> str:
    """Return the name of a further night of the same date."""
    date, number = order_of(night)
    return f"{date}-{number + 1}"


def _key_in(key: str) -> Key:
    tenant, _, task = key.rpartition("/")[2].removesuffix(".json").partition(".")
    return tenant, task


def json_bytes(body: Mapping[str, Any]) -> bytes:
    """Return JSON for people and programs: indented, ending in a newline."""
    return (json.dumps(body, indent=2) + "\n").encode()
