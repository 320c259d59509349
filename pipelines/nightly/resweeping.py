"""The search that a night runs for a customer whose challengers keep being rejected, and the recipe that comes of it.

A customer that is due is trained and judged as always; only if that challenger is rejected too, its sweep is run when all others
are done. Its job is the customer's, its rows are those that were pinned for tonight (the holdout judges, and nothing else), and
its best adapter goes through the same gates. The row is kept when that is over, so that who continues after a kill comes here
again and finds sweep, trials and promotion as they are.

If the best is promoted, its `peft` and `training` stand in the row, and the nights that follow train with them, as long as the
fleet's own settings for the customer and its base are those they were found with.
"""

import logging
from dataclasses import dataclass, replace

from infra.crashpoints import crashpoint
from infra.errors import BadInput, ClaimHeld, ClaimLost, LorafleetError, ServiceUnavailable
from infra.fingerprint import id_of_json
from infra.storage import Storage
from pipelines.files import load_sweep
from pipelines.journal import Candidate, register_candidate
from pipelines.nightly.driver import Driver
from pipelines.nightly.found import found_recipe, with_recipe
from pipelines.nightly.judge import Judge, Judged
from pipelines.nightly.preparing import Ready
from pipelines.nightly.recipes import recipe_of
from pipelines.nightly.records import Row
from pipelines.nightly.settling import challenger_of, held_rows
from pipelines.nightly.state_key import recipe_digest, state_key
from pipelines.references import CHALLENGER
from pipelines.sweep import check_measured
from pipelines.workspace import Workspace
from sweeps.ledger import read_trials
from sweeps.run import Surroundings, SweepResult, run_sweep
from sweeps.spec import SweepSpec
from sweeps.trial import Trial
from sweeps.view import SweepView
from workers.data.splits import Splits
from workers.data.store import load_rows
from workers.job import Job
from workers.spec import JobSpec

log = logging.getLogger(__name__)
MAX_NAME = 63
_LIMITS = {
    "deadline": "the deadline came",
    "budget": "the accelerator-hours were used up",
    "canary": "the canaries stopped the night",
}


@dataclass
class Resweeper:
    """Runs the searches that are due at the end of a night, one after the other."""

    workspace: Workspace
    driver: Driver
    """Of the night; its hosts are gone."""

    def run(self) -> list[Row]:
        """Take the customers that the driver left to their rows and return these. Whatever goes wrong is the customer's row."""
        return [self._kept(ready, self._ended(ready, row)) for ready, row in self.driver.resweeps]

    def _kept(self, ready: Ready, row: Row) -> Row:
        self.driver.shown.end(ready, row)
        crashpoint("night-resweep-settled", ready.customer.name)
        return self.driver.ledger.record(self.driver.night, row)

    def _ended(self, ready: Ready, row: Row) -> Row:
        """Return how the night of a customer ends whose challenger was rejected once more."""
        try:
            stop = _limit(self.driver)
            return self._held(ready, row, stop) if stop is not None else self._searched(ready, row)
        except ClaimLost:
            raise
        except (ServiceUnavailable, ClaimHeld) as error:
            return replace(self._due_again(ready, row), status="failed", reason="service", sentence=str(error))
        except LorafleetError as error:
            return _failed(ready, row, self._name(ready), str(error))
        except Exception as error:  # as of training: a customer's search must not end the night
            log.exception("the search for customer %s failed", ready.customer.name)
            return _failed(ready, row, self._name(ready), f"{type(error).__name__}: {str(error)[:300]}")

    def _searched(self, ready: Ready, row: Row) -> Row:
        spec = self._spec(ready)
        result, hours = self._sweep(ready, spec)
        row = replace(row, cost=row.cost + hours)
        if result.status == "preempted" and (result.best is None or _limit(self.driver) is None):
            return self._held(ready, row, _limit(self.driver) or "preempted")
        if result.best is None or result.best.adapter_id is None:
            why = f" ({result.reason})" if result.reason else ""
            raise BadInput(f"none of its {result.num_trials} trials gave an adapter{why}.")
        found = self._with_best(ready, row, result, result.best)
        settled = self.driver.settler.judged(found, self._measured(ready, found))
        return self._told(ready, row, settled, result)

    def _sweep(self, ready: Ready, spec: SweepSpec) -> tuple[SweepResult, float]:
        """Run a sweep on hosts of its own; return what it found, and the accelerator-hours they were held."""
        splits = _splits(self.workspace.store, ready.job)
        resolver = self.driver.preparer.surveyor.resolver
        max_length = ready.job.spec.training.max_length

        def resolve(job: JobSpec) -> Job:
            return resolver.resolve_rows(job, splits, is_rendered=job.training.max_length == max_length)

        check_measured(spec, resolve(spec.base_job))
        max_hosts = min(spec.max_concurrent, spec.num_trials)
        with self.workspace.fleet(ready.job.spec.resources.num_threads, max_hosts) as start:
            fleet = start()
            watch = _Watch(self.driver, fleet.num_hosts)
            around = Surroundings(
                store=self.workspace.store,
                fleet=fleet,
                resolve=resolve,
                tracking_log=self.driver.shown.log,
                tracker=self.workspace.services.tracker(),
                owner=self.workspace.owner,
                lease_seconds=self.workspace.settings.lease_seconds,
                on_change=watch.look,
                must_end=lambda: _limit(self.driver),
            )
            return run_sweep(spec, around), watch.hours

    def _spec(self, ready: Ready) -> SweepSpec:
        """Return the customer's sweep: its file's, with tonight's job, which begins anew and not from the champion."""
        assert ready.customer.resweep is not None
        spec, _, _ = load_sweep(ready.customer.resweep.sweep)
        job = ready.job.spec
        job = job.model_copy(update={"peft": job.peft.model_copy(update={"init_adapter": None})})
        return spec.model_copy(update={"name": self._name(ready), "job": job, "register_best": None})

    def _name(self, ready: Ready) -> str:
        name = f"night-{self.driver.night}-{ready.customer.task}"
        return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 9]}-{id_of_json(name)[:8]}"

    def _with_best(self, ready: Ready, row: Row, result: SweepResult, best: Trial) -> Row:
        """Offer the best adapter; return the row with it as its challenger, and what all trials took."""
        assert best.adapter_id is not None
        trials = read_trials(self.workspace.store, result.tenant, result.name)
        base_id = ready.job.base.base_id
        metrics = {name: value for name, value in best.metrics.items() if abs(value) < float("inf")}
        offered = Candidate(best.adapter_id, base_id, best.job_id, result.name, metrics, self.driver.now(), CHALLENGER)
        register_candidate(self.workspace.store, *ready.key, offered)
        crashpoint("night-resweep-offered", ready.customer.name)
        return replace(
            row,
            status="trained",
            reason="",
            sentence="",
            verdicts=(),
            adapter_id=best.adapter_id,
            job_id=best.job_id,
            num_steps=row.num_steps + sum(trial.num_steps for trial in trials),
            num_tokens=row.num_tokens + sum(trial.num_tokens for trial in trials),
            seconds=row.seconds + sum(trial.seconds for trial in trials),
            num_rejections=ready.row.num_rejections,
        )

    def _measured(self, ready: Ready, row: Row) -> Judged:
        launcher = self.workspace.services.launcher()
        judge = Judge(self.workspace, launcher)
        try:
            judge.submit(challenger_of(row), row.task, self.driver.settler.champion_before(row), ready.gates)
            while not (told := judge.results(1.0)):
                self.driver.check_claim()
            return told[0]
        finally:
            judge.close()
            launcher.close()

    def _told(self, ready: Ready, row: Row, settled: Row, result: SweepResult) -> Row:
        """Return the settled row, in whose sentence the search is told of; with its recipe if that is promoted."""
        counts = ", ".join(f"{count} {status}" for status, count in sorted(result.counts.items()))
        said = (
            f"{row.num_rejections} challengers in a row were rejected, so a search of {result.num_trials} trials was run "
            f"({result.tenant}/{result.name}: {counts}). {settled.sentence}"
        )
        settled = replace(settled, sentence=said, sweep=f"{result.tenant}/{result.name}")
        if settled.status == "promoted":
            return _with_recipe(self.workspace.store, ready, settled, f"{result.tenant}/{result.name}")
        return self._due_again(ready, settled) if settled.status in ("held", "failed") else settled

    def _held(self, ready: Ready, row: Row, reason: str) -> Row:
        why = _LIMITS.get(reason, "it was interrupted")
        said = f"Its challenger was rejected ({row.sentence}), and {why} before a search for other settings was over."
        step = "The search is first in line next night."
        [held] = held_rows([self._due_again(ready, row)], reason, said, step, self.driver.now())
        return held

    def _due_again(self, ready: Ready, row: Row) -> Row:
        """Return the row as one whose search is due the next night as well."""
        return replace(row, num_rejections=ready.row.num_rejections)


@dataclass
class _Watch:
    """Counts what a sweep takes of the night's accelerator-hours, and sees that the night is still ours."""

    driver: Driver
    num_hosts: int
    hours: float = 0.0
    """Accelerator-hours that its hosts were held, summed over resumes."""

    def __post_init__(self) -> None:
        self._held_before = self.driver.hours.held

    def look(self, view: SweepView) -> None:
        """Count the time up to now."""
        self.driver.check_claim()
        self.hours = self.num_hosts * view.seconds / 3600
        self.driver.hours.held = self._held_before + self.hours


def _limit(driver: Driver) -> str | None:
    """Return which of the night's limits forbids to search, None if none does."""
    if driver.deadline is not None and driver.now() >= driver.deadline:
        return "deadline"
    if driver.hours.are_over:
        return "budget"
    return "canary" if driver.canaries.has_failed else None


def _splits(store: Storage, job: Job) -> Splits:
    """Return the rows that were pinned for tonight."""
    train, validation, test = (
        None if ref is None else load_rows(store, job.tenant, ref.digest) for ref in (job.train, job.validation, job.test)
    )
    return Splits(train or [], validation, test)


def _with_recipe(store: Storage, ready: Ready, row: Row, sweep: str) -> Row:
    """Return a row whose state is that of the found recipe, so that the next night finds nothing changed."""
    base_id, holdout = ready.job.base.base_id, ready.customer.holdout
    recipe = found_recipe(ready.customer, base_id, sweep, recipe_of(store, sweep))
    digest = recipe_digest(with_recipe(ready.customer, recipe).job)
    state = state_key(*ready.key, base_id, digest, str(row.data_digest), holdout, str(row.gates_digest))
    return replace(row, recipe=recipe, recipe_digest=digest, state_key=state)


def _failed(ready: Ready, row: Row, sweep: str, why: str) -> Row:
    said = f"{row.num_rejections} challengers in a row were rejected, and a search for other settings failed: {why}"
    step = f"Look at it with: lorafleet sweep status {ready.customer.tenant}/{sweep}; or correct the customer's resweep."
    return replace(row, status="failed", reason="resweep", sentence=said, next_step=step)
