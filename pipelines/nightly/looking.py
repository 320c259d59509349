"""What a person may ask of a fleet's nights without running one: how it stands, its reports, why a customer is where it is, and
what tonight would do."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.errors import BadInput
from pipelines.nightly.forecast import Outlook, predict
from pipelines.nightly.ledger import FleetLedger
from pipelines.nightly.planning import why
from pipelines.nightly.records import STATUSES, Row
from pipelines.nightly.spec import Fleet, load_fleet
from pipelines.nightly.survey import Survey, Surveyor
from pipelines.workspace import Workspace
from workers.spec import check_name

HISTORY_NIGHTS = 7
"""Nights that a forecast looks back on at most."""


@dataclass(frozen=True)
class Standing:
    """How the last night of a fleet stands."""

    fleet: str
    night: str
    is_finished: bool
    num_planned: int
    """Customers whose job was pinned so far."""
    rows: tuple[Row, ...]
    """Rows that ended; without customers that were passed over, while the night is not finished."""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        counts = {status: sum(row.status == status for row in self.rows) for status in STATUSES}
        told = {"fleet": self.fleet, "night": self.night, "is_finished": self.is_finished}
        return {**told, "num_planned": self.num_planned, "num_ended": len(self.rows), "counts": counts}

    def text(self) -> str:
        """Return the same as a line."""
        body = self.to_json()
        counts = ", ".join(f"{count} {status}" for status, count in body["counts"].items() if count) or "nothing ended yet"
        state = "finished" if self.is_finished else "running, or cut off (the same command finishes it)"
        return f"night {self.night} of {self.fleet}: {state}; {self.num_planned} planned, {counts}"


def fleet_name(reference: str) -> str:
    """Return the name of a fleet that is written as its file or its name. Raises BadInput."""
    if reference.endswith((".yaml", ".yml")):
        return load_fleet(Path(reference)).spec.name
    try:
        return check_name(reference)
    except ValueError as error:
        raise BadInput(f"{error}; or give the fleet's file.") from None


def standing(workspace: Workspace, reference: str) -> Standing:
    """Return how the last night stands. Raises BadInput if there was none."""
    ledger = FleetLedger(workspace.store, fleet_name(reference))
    night = _night(ledger, None, finished=False)
    is_finished = ledger.is_finished(night)
    rows = tuple(ledger.rows(night).values()) if not is_finished else tuple(ledger.outcomes(night).values())
    return Standing(ledger.fleet, night, is_finished, len(ledger.planned(night)), rows)


def report_of(workspace: Workspace, reference: str, night: str | None) -> dict[str, Any]:
    """Return the report of a finished night, the last one unless it is named. Raises BadInput if there is none."""
    ledger = FleetLedger(workspace.store, fleet_name(reference))
    return ledger.report(_night(ledger, night, finished=True))


def page_of(workspace: Workspace, reference: str, night: str | None) -> Path:
    """Return the page of a finished night on this machine, fetched from the store if it is not here. Raises BadInput."""
    ledger = FleetLedger(workspace.store, fleet_name(reference))
    name = _night(ledger, night, finished=True)
    path = workspace.settings.home / "nights" / ledger.fleet / f"{name}.html"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(ledger.page(name))
    return path


def report_text(report: Mapping[str, Any]) -> str:
    """Return a finished night's report in a few lines."""
    lines = [f"night {report['night']} of {report['fleet']}, {len(report['customers']):,} customers, ended {report['ended']}"]
    for status, reasons in report["reasons"].items():
        told = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()) if reason)
        lines.append(f"{report['counts'][status]:>7,} {status}" + (f" ({told})" if told else ""))
    lines += report["remarks"]
    for row in report["customers"]:
        if row["status"] in ("failed", "held"):
            lines.append(" ".join(filter(None, [f"{row['status']} {row['name']}:", row["sentence"], row["next_step"]])))
    return "\n".join(lines)


def why_of(workspace: Workspace, path: Path, tenant: str, now: float) -> list[str]:
    """Return sentences on what tonight does with a tenant's customers, and why. Raises BadInput if it is no customer."""
    survey = _survey(workspace, load_fleet(path), now)
    told: list[str] = []
    for one in (*survey.planned, *survey.passed_over):
        if one.customer.tenant == tenant:
            told += why(one.customer, one.last, one.decision)
    told += [" ".join(filter(None, [row.sentence, row.next_step])) for row in survey.refused if row.tenant == tenant]
    if not told:
        raise BadInput(f"'{tenant[:80]}' is no customer of the fleet in {path}; 'lorafleet plan {path}' lists all.")
    return told


def plan_of(workspace: Workspace, path: Path, now: float) -> tuple[Outlook, tuple[Row, ...]]:
    """Return what tonight would do and cost, and the entries that cannot be customers."""
    fleet = load_fleet(path)
    survey = _survey(workspace, fleet, now)
    worked = [one.customer.key for one in survey.planned]
    history = FleetLedger(workspace.store, fleet.spec.name).trainings(worked, HISTORY_NIGHTS)
    return predict((*survey.planned, *survey.passed_over), history), survey.refused


def plan_text(outlook: Outlook, refused: tuple[Row, ...], limit: int = 20) -> str:
    """Return a night's outlook: totals, and the first customers in line."""
    totals = outlook.totals
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(totals["because"].items()))
    told = ", ".join(filter(None, [reasons, f"{len(refused)} that cannot be planned" if refused else ""]))
    lines = [f"{totals['num_customers'] + len(refused):,} customers: {told or 'nothing to do'}"]
    if worked := [one for one in outlook.forecasts if one.action != "skip"]:
        lines.append(
            f"about {totals['num_steps']:,} steps, {totals['num_tokens']:,} tokens, {totals['seconds']:,.0f} s of training on "
            f"shared hosts, {totals['accelerator_hours']:.3g} accelerator-hours"
            + (f"; {totals['num_unknown']} without a past to judge by" if totals["num_unknown"] else "")
        )
        lines += [f"  {one.tenant}.{one.task}: {one.action} ({one.because}). {one.sentence}" for one in worked[:limit]]
        lines += [f"  ... and {len(worked) - limit:,} more (--json lists all)"] if len(worked) > limit else []
    lines += [f"  {row.tenant}.{row.task}: {row.status} ({row.reason}). {row.sentence} {row.next_step}" for row in refused]
    return "\n".join(line.rstrip() for line in lines)


def _survey(workspace: Workspace, fleet: Fleet, now: float) -> Survey:
    return Surveyor(workspace, workspace.resolver(Path.cwd())).survey(fleet, now)


def _night(ledger: FleetLedger, named: str | None, *, finished: bool) -> str:
    nights = ledger.finished() if finished else ledger.nights()
    if named is not None and named not in nights:
        there = ", ".join(nights[-10:]) or "none yet"
        raise BadInput(f"the fleet {ledger.fleet} has no finished night '{named[:40]}'; there is: {there}.")
    if not nights:
        raise BadInput(f"the fleet {ledger.fleet} has had no night yet; run one with: lorafleet nightly run fleet.yaml")
    return named or nights[-1]
