"""`lorafleet nightly run fleet.yaml`: a night from its file to its page. The same command finishes a night that was cut off.

One driver at a time holds the fleet's claim, whichever machine it is on. A night that a deadline or a kill cut short is closed by
the next one, which takes up first what was left.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from infra.claims import Lease, claim
from infra.errors import BadInput, ClaimHeld
from infra.storage import Storage
from infra.tracking_log import TrackingLog
from pipelines.nightly.calendar import deadline_of, night_name
from pipelines.nightly.closing import Closing
from pipelines.nightly.driver import Driver, Progress
from pipelines.nightly.forecast import Planned
from pipelines.nightly.judge import Judge
from pipelines.nightly.ledger import CLAIM_FORMAT, Begun, FleetLedger, following, order_of
from pipelines.nightly.limits import Canaries, Hours, PromotionQuota
from pipelines.nightly.planning import Look, Skip, Train
from pipelines.nightly.preparing import Preparer
from pipelines.nightly.records import NightReport, Row
from pipelines.nightly.resweeping import Resweeper
from pipelines.nightly.settling import Settler, held_rows
from pipelines.nightly.shown import Aliases, Shown
from pipelines.nightly.spec import Fleet, load_fleet
from pipelines.nightly.survey import Survey, Surveyor
from pipelines.workspace import Workspace
from workers import layout

log = logging.getLogger(__name__)
ALIASES_SECONDS = 600.0
"""For which the end of a night waits until MLflow shows its promotions."""
_WAITS = frozenset({"held", "deadline", "budget", "promotion_limit", "canary"})
"""Why customers are looked at again that a finished night of this date held back."""


@dataclass(frozen=True)
class NightOutcome:
    """What a night came to."""

    report: NightReport | None
    """None if another process drives it."""
    page: Path | None
    notes: tuple[str, ...] = ()
    is_new: bool = True
    """False if there was nothing to do and the report is that of the night before."""

    @property
    def exit_code(self) -> int:
        """What a scheduler is told: 1 if a customer failed or the canaries stopped the night."""
        if self.report is None:
            return 0
        return 1 if self.report.counts["failed"] or any(_is_stopped(row) for row in self.report.rows) else 0


def run(
    workspace: Workspace,
    path: Path,
    *,
    retry: Sequence[str] | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    now: Callable[[], float] = time.time,
) -> NightOutcome:
    """Run the night of a fleet, or finish it.

    Args:
        retry: Names of tenants that are trained again although nothing changed; empty: all that failed or are held. None: nobody.
        now: Seconds since the epoch.

    Raises BadInput and ServiceUnavailable before anything is trained.
    """
    fleet = load_fleet(path)
    try:
        with _claimed(workspace, fleet.spec.name) as lease:
            return _Night(workspace, fleet, lease, on_progress, now).run(retry)
    except ClaimHeld as error:
        return NightOutcome(None, None, (f"The night of {fleet.spec.name} is being run already: {error}",))


@contextmanager
def _claimed(workspace: Workspace, name: str) -> Iterator[Lease]:
    lease = claim(
        workspace.store,
        layout.fleet_claim(name),
        CLAIM_FORMAT,
        {},
        owner=workspace.owner,
        lease_seconds=workspace.settings.lease_seconds,
    )
    with lease.keep_alive():
        try:
            yield lease
        finally:
            if not lease.is_lost:
                lease.release()


@dataclass
class _Night:
    """One command's share of a night."""

    workspace: Workspace
    fleet: Fleet
    lease: Lease
    on_progress: Callable[[Progress], None]
    now: Callable[[], float]

    def __post_init__(self) -> None:
        self.ledger = FleetLedger(self.store, self.fleet.spec.name)
        self.surveyor = Surveyor(self.workspace, self.workspace.resolver(Path.cwd()))

    @property
    def store(self) -> Storage:
        return self.workspace.store

    def run(self, retry: Sequence[str] | None) -> NightOutcome:
        with self.workspace.tracking(f"night-{self.fleet.spec.name}") as tracking:
            outcome = self._run(tracking.log, retry)
        if tracking.num_left:
            left = f"MLflow has not taken {tracking.num_left} events yet; the same command ships them."
            outcome = replace(outcome, notes=(*outcome.notes, left))
        return outcome

    def _run(self, log: TrackingLog, retry: Sequence[str] | None) -> NightOutcome:
        name = night_name(self.now(), self.fleet.spec.limits)
        begun, cut_off = self._unfinished(name)
        for night in cut_off:
            self._close_cut_off(night, log)
        survey = self.surveyor.survey(self.fleet, self.now())
        if retry is not None:
            survey = retried(survey, retry)
        if begun is None:
            last = self._last_finished(name)
            if last is not None and not any(map(_is_news, survey.planned)):
                return self._nothing_new(last)
            begun = self._begin(name)
        aliases = Aliases(self.store, self.workspace.services.registry)
        for night in cut_off:
            self._shown(log, aliases, night).again(self.ledger.rows(night).values())
        return self._drive(begun, survey, self._shown(log, aliases, begun.night))

    def _shown(self, log: TrackingLog, aliases: Aliases | None, night: str) -> Shown:
        return Shown(log, aliases, self.store, self.fleet.spec.name, night)

    def _unfinished(self, name: str) -> tuple[Begun | None, list[str]]:
        """Return tonight's night if it began and is not finished, and the earlier ones that were cut off."""
        finished = set(self.ledger.finished())
        left = [night for night in self.ledger.nights() if night not in finished]
        tonight = next((night for night in left if order_of(night)[0] == name), None)
        return self.ledger.begun(tonight) if tonight is not None else None, [night for night in left if night != tonight]

    def _close_cut_off(self, night: str, log: TrackingLog) -> None:
        """Close a night that another one follows: what it planned and did not end is first in line."""
        memory, trend = self.ledger.memory()
        rows = self.ledger.rows(night)
        planned = [self.ledger.plan(night, *key) for key in self.ledger.planned(night) - rows.keys()]
        left = held_rows(
            [plan.row for plan in planned if plan is not None],
            "deadline",
            "Its night was cut off before it was done.",
            "It is first in line this night.",
            self.now(),
        )
        remarks = ("This night was cut off; the next one took up what was left.",)
        report = self._report(self.ledger.begun(night), [*rows.values(), *left], remarks, trend, is_finished=False)
        self._closing(self._shown(log, None, night)).cut_off(report, memory, left)

    def _closing(self, shown: Shown) -> Closing:
        return Closing(self.ledger, shown, self.workspace.settings.home)

    def _last_finished(self, name: str) -> str | None:
        found = [night for night in self.ledger.nights() if order_of(night)[0] == name]
        return found[-1] if found else None

    def _begin(self, name: str) -> Begun:
        last = self._last_finished(name)
        name = name if last is None else following(last)
        return self.ledger.begin(Begun(name, self.now(), deadline_of(name, self.fleet.spec.limits)))

    def _nothing_new(self, night: str) -> NightOutcome:
        page = self.workspace.settings.home / "nights" / self.fleet.spec.name / f"{night}.html"
        note = f"Nothing changed since the night {night}, which is finished."
        return NightOutcome(None, page if page.exists() else None, (note,), is_new=False)

    def _drive(self, begun: Begun, survey: Survey, shown: Shown) -> NightOutcome:
        before = self.ledger.rows(begun.night)
        todo = [one for one in survey.planned if one.customer.key not in before]
        others = [row for row in (*survey.skipped, *survey.refused) if (row.tenant, row.task) not in before]
        rows, remarks = [*before.values(), *others], []
        shown.open()
        shown.again(before.values())
        try:
            if todo:
                driver = self._driven(begun, survey, todo, before, shown)
                rows, remarks = [*rows, *driver.rows, *Resweeper(self.workspace, driver).run()], driver.remarks
        except BaseException:
            shown.wait(0.0)
            if not self.lease.is_lost:
                shown.pause()
            raise
        note = shown.wait(ALIASES_SECONDS)
        report = self._report(begun, rows, (*remarks, *([note] if note else [])), survey.trend, is_finished=True)
        page, told = self._closing(shown).close(report, survey.memory, self.fleet.spec.notify)
        return NightOutcome(report, page, told)

    def _driven(
        self, begun: Begun, survey: Survey, todo: Sequence[Planned], before: dict[tuple[str, str], Row], shown: Shown
    ) -> Driver:
        limits = self.fleet.spec.limits
        num_threads = max(one.customer.job.resources.num_threads for one in todo)
        with self.workspace.fleet(num_threads, max_hosts=len(todo)) as start:
            self.workspace.services.check_at_start()
            hosts = start()
            judge = Judge(self.workspace, hosts.launcher)
            quota = PromotionQuota(limits.max_promotions_share, survey.num_champions)
            for row in before.values():
                if row.status == "promoted":
                    quota.count(row.generation != 1)
            canaries = {one.customer.key for one in todo if one.customer.is_canary}
            driver = Driver(
                ledger=self.ledger,
                night=begun.night,
                lease=self.lease,
                fleet=hosts,
                judge=judge,
                preparer=Preparer(self.surveyor, self.ledger, begun.night, self.ledger.planned(begun.night), self.now),
                settler=Settler(self.store, self.fleet.spec.name, begun.night, quota, self.now),
                shown=shown,
                canaries=Canaries.of(canaries, before.values(), limits.max_canary_failures),
                hours=Hours(limits.gpu_hours, before=sum(row.cost for row in before.values())),
                deadline=begun.deadline,
                on_progress=self.on_progress,
                now=self.now,
            )
            try:
                driver.run(todo)
            finally:
                judge.close()
        return driver

    def _report(
        self, begun: Begun, rows: Sequence[Row], remarks: Sequence[str], trend: Sequence[object], *, is_finished: bool
    ) -> NightReport:
        limits = self.fleet.spec.limits
        ordered = tuple(sorted(rows, key=lambda row: (row.tenant, row.task)))
        return NightReport(
            fleet=self.fleet.spec.name,
            night=begun.night,
            timezone=limits.timezone,
            started=begun.started,
            ended=self.now(),
            is_finished=is_finished,
            rows=ordered,
            remarks=(*remarks, *_withdrawn(ordered)),
            trend=tuple(trend),  # type: ignore[arg-type]
        )


def _is_stopped(row: Row) -> bool:
    return row.status == "held" and row.reason == "canary"


def _is_news(one: Planned) -> bool:
    """Tell whether something happened since a night that is finished: what that night held back waits for the next date."""
    return not isinstance(one.decision, Skip) and one.decision.because not in _WAITS


def _withdrawn(rows: Sequence[Row]) -> list[str]:
    """Say whose champion knows rows that were taken back, and stays because the gates refused the adapter without them."""
    served = [f"{row.tenant}.{row.task}" for row in rows if row.status == "rejected" and row.num_withdrawn]
    if not served:
        return []
    named = ", ".join(served[:5]) + (f" and {len(served) - 5} more" if len(served) > 5 else "")
    return [f"Champions of {named} were trained on rows that were withdrawn since; the gates refused the adapters without them."]


def retried(survey: Survey, tenants: Sequence[str]) -> Survey:
    """Return a survey in which customers who were passed over are trained again.

    Those of `tenants`; without any, all whose last night failed or is held. Raises BadInput for a tenant who is no customer.
    """
    rows = (*survey.skipped, *survey.refused)
    known = {row.tenant for row in rows} | {one.customer.tenant for one in survey.planned}
    unknown = [tenant for tenant in tenants if tenant not in known]
    if unknown:
        raise BadInput(f"there is no customer '{unknown[0][:80]}' in this fleet; see 'lorafleet plan'.")
    again = [one for one in survey.passed_over if _is_wanted(one, tenants)]
    keys = {one.customer.key for one in again}
    planned = [_again(one) if isinstance(one.decision, Look) and _is_wanted(one, tenants) else one for one in survey.planned]
    return replace(
        survey,
        planned=(*planned, *(_again(one) for one in again)),
        skipped=tuple(row for row in survey.skipped if (row.tenant, row.task) not in keys),
    )


def _is_wanted(one: Planned, tenants: Sequence[str]) -> bool:
    if tenants:
        return one.customer.tenant in tenants
    return one.last is not None and (one.last.status in ("failed", "held") or one.last.reason == "failed_before")


def _again(one: Planned) -> Planned:
    return replace(one, decision=Train("retry", "It is trained again because a person asked for it."))
