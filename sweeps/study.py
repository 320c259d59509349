"""The Optuna study of a sweep: in memory, rebuilt from the ledger, never the truth.

Suggestions and pruning are functions of the sweep's seed, the trial's number and what happened before, in the order of the
ledger's events. Hence a fresh sampler for every ask, seeded by (seed, number); one sampler for the whole study would remember
how often it was asked and answer differently after a restart.
"""

import hashlib
import itertools
import logging
import warnings
from collections.abc import Iterable, Sequence

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from sweeps.space import Params, grid, suggest
from sweeps.spec import SweepSpec, encode_choice
from sweeps.trial import Event, Trial

optuna.logging.set_verbosity(optuna.logging.WARNING)
_log = logging.getLogger(__name__)

_STATES = {
    "complete": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "infeasible": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}
"""Infeasible trials are pruned with a violated constraint: the sampler then keeps away, which it does not for failed ones."""


class _Tpe(optuna.samplers.TPESampler):
    """TPE that sees of a running trial what was suggested to it, nothing else.

    Optuna's own also reads values that were drawn for dimensions whose conditions then did not hold. These are in no
    ledger, so suggestions after a restart would differ.
    """

    def _get_params(self, trial: FrozenTrial, study: optuna.Study) -> dict[str, object]:
        return trial.params


class Study:
    """Asks and tells by the trial's number. Not thread-safe; used by the one driver of a sweep."""

    def __init__(self, spec: SweepSpec, past: Iterable[Trial] = ()) -> None:
        self._spec = spec
        self._study = optuna.create_study(
            directions=[objective.direction for objective in spec.objectives], pruner=_pruner(spec), sampler=_sampler(spec, 0)
        )
        self._trials: dict[int, optuna.Trial] = {}
        self._verdicts: dict[int, dict[int, bool]] = {}
        happened = [(event.seq, trial, event) for trial in past for event in trial.events]
        for _, trial, event in sorted(happened, key=lambda entry: entry[0]):
            self._replay(trial, event)

    def ask(self, number: int) -> Params:
        """Return the values of the next trial, whose number must be the count of trials so far. It is running from here on."""
        return self._start(number, _prescribed(self._spec, number))

    def report(self, number: int, step: int, value: float) -> bool:
        """Note an intermediate value; return True if the trial should be pruned. A step that is known gets its old answer.

        An enqueued trial is never pruned: somebody asked for it by name, and the report compares with it.
        """
        verdicts = self._verdicts[number]
        if len(self._spec.objectives) > 1:
            return False
        if step not in verdicts:
            self._trials[number].report(value, step)
            verdicts[step] = self._trials[number].should_prune() and number >= len(self._spec.enqueue)
        return verdicts[step]

    def copy(self, number: int, step: int, value: float) -> None:
        """Note an intermediate value that takes no part in pruning."""
        if len(self._spec.objectives) == 1:
            self._trials[number].report(value, step)

    def is_condemned(self, number: int) -> bool:
        """Tell whether the trial's last report said that it should be pruned."""
        verdicts = self._verdicts[number]
        return bool(verdicts) and verdicts[max(verdicts)]

    def tell(self, trial: Trial) -> None:
        """Note how a trial ended."""
        if trial.status == "infeasible":
            self._trials[trial.number].set_constraint("feasible", 1.0)
        values = list(trial.values) if trial.status == "complete" else None
        self._study.tell(self._trials[trial.number], values, _STATES[trial.status])

    def frozen(self, number: int) -> FrozenTrial:
        """Return Optuna's picture of a trial."""
        return self._study.get_trials(deepcopy=False)[number]

    def _replay(self, trial: Trial, event: Event) -> None:
        match event.kind:
            case "ask":
                self._start(trial.number, trial.params)
            case "report":
                assert event.step is not None
                assert event.value is not None
                self.report(trial.number, event.step, event.value)
            case "copy":
                assert event.step is not None
                assert event.value is not None
                self.copy(trial.number, event.step, event.value)
            case "tell":
                self.tell(trial)

    def _start(self, number: int, prescribed: Params) -> Params:
        self._study.sampler = _sampler(self._spec, number)
        if prescribed:
            self._study.enqueue_trial(dict(prescribed))
        trial = self._study.ask()
        assert trial.number == number, f"the ledger has trial {number} where the study has {trial.number}"
        self._trials[number] = trial
        self._verdicts[number] = {}
        return suggest(trial, self._spec.space)


def no_mirror(trial: Trial, study: Study) -> None:
    """Copy a trial nowhere."""


class StudyMirror:
    """Copies ended trials to an Optuna storage at `url`, for Optuna's dashboard.

    Nothing is read back from it into a sweep. Best effort: trials appear in the order in which they ended, with their number as
    the user attribute `lorafleet.trial`; what the storage did not take is taken up by the next process that continues the
    sweep. A failing storage is reported once.
    """

    def __init__(self, url: str, study_name: str, spec: SweepSpec) -> None:
        self._url, self._name, self._spec = url, study_name, spec
        self._study: optuna.Study | None = None
        self._known: set[int] = set()
        self._failed = False

    def __call__(self, trial: Trial, study: Study) -> None:
        """Copy one ended trial unless it is there."""
        try:
            mirrored = self._open()
            if trial.number not in self._known:
                mirrored.add_trial(_with_number(study.frozen(trial.number), trial.number))
                self._known.add(trial.number)
        # Whatever the storage's driver raises: the mirror must never stop a sweep.
        except Exception as error:
            if not self._failed:
                _log.warning("The study storage does not take trials (%s); the sweep goes on without it.", error)
            self._failed = True

    def _open(self) -> optuna.Study:
        if self._study is None:
            directions = [objective.direction for objective in self._spec.objectives]
            self._study = optuna.create_study(
                storage=self._url,
                study_name=self._name,
                directions=directions,
                load_if_exists=True,
            )
            self._known = {trial.user_attrs["lorafleet.trial"] for trial in self._study.get_trials(deepcopy=False)}
        return self._study


def forget_studies(url: str, prefix: str) -> str | None:
    """Delete the mirrored studies whose names begin with `prefix` from a storage; return why that failed, None if it did not."""
    try:
        for name in optuna.get_all_study_names(storage=url):
            if name.startswith(prefix):
                optuna.delete_study(study_name=name, storage=url)
    except Exception as error:  # whatever the storage's driver raises
        return f"{type(error).__name__}: {error}"
    return None


def _with_number(frozen: FrozenTrial, number: int) -> FrozenTrial:
    return optuna.trial.create_trial(
        state=frozen.state,
        values=frozen.values,
        params=frozen.params,
        distributions=dict[str, BaseDistribution](frozen.distributions),
        intermediate_values=frozen.intermediate_values,
        user_attrs={"lorafleet.trial": number},
        system_attrs=frozen.system_attrs,
    )


def _prescribed(spec: SweepSpec, number: int) -> Params:
    """Return the values a trial must have: enqueued ones, or the grid's point; what they leave open is the sampler's."""
    from_grid = number - len(spec.enqueue)
    if from_grid < 0:
        return {path: encode_choice(value) for path, value in spec.enqueue[number].items()}
    if spec.sampler.type != "grid":
        return {}
    return next(itertools.islice(grid(spec.space), from_grid, None))


def _sampler(spec: SweepSpec, number: int) -> optuna.samplers.BaseSampler:
    seed = _seed(spec.sampler.seed, number)
    if spec.sampler.type == "tpe" and len(spec.objectives) == 1:
        with warnings.catch_warnings():
            # `group` models conditional dimensions with one another; Optuna calls it experimental.
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return _Tpe(seed=seed, group=any(dimension.when for dimension in spec.space.values()))
    if spec.sampler.type == "tpe":
        return _Tpe(seed=seed)
    # A grid's open dimensions (an enqueued point that leaves some out) are drawn at random too.
    return optuna.samplers.RandomSampler(seed=seed)


def _seed(seed: int, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{number}".encode()).digest()[:4], "big")


def _pruner(spec: SweepSpec) -> optuna.pruners.BasePruner:
    if spec.pruner.type == "none":
        return optuna.pruners.NopPruner()
    return optuna.pruners.SuccessiveHalvingPruner(
        min_resource=spec.pruner.min_resource, reduction_factor=spec.pruner.reduction_factor
    )


def build_study(spec: SweepSpec, trials: Sequence[Trial]) -> optuna.Study:
    """Return a study of these trials as Optuna's own tools take it (plots, importances)."""
    return Study(spec, trials)._study
