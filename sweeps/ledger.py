"""The ledger of a sweep: what was asked for, every trial, and how far it may go.

It is the truth; Optuna and the tracker hold copies. Its objects:

    sweep.json         written once: the spec as started, and the content it was resolved to. The same name goes on only
                       with the same content.
    settings.json      how far and how fast: the part of the spec that may change while the sweep lives
    claim.json         who drives it (infra.claims), and the running time spent
    trials/<n>.json    one trial, changed by its driver alone, with compare-and-put
    stop.json          a wish of another process that the driver should stop

A driver that was paused beyond its lease cannot write into what its successor took over: every live trial is re-written under
the new epoch first, so the old driver's next condition fails.
"""

import contextlib
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal

from infra.errors import BadInput, ClaimLost, ConditionFailed, ObjectNotFound
from infra.fingerprint import canonical_json
from infra.records import decode_record, encode_record
from infra.storage import Storage
from infra.strict import StrictModel, parse
from sweeps.space import Params
from sweeps.spec import RegisterSpec, SweepSpec
from sweeps.trial import TRIAL_FORMAT, Event, Outcome, Trial, ended_as, outcome_of
from workers import layout
from workers.job import NUMERICS_VERSION, Job

CLAIM_FORMAT = "sweep-claim/1"
SWEEP_FORMAT = "sweep/1"
SETTINGS_FORMAT = "settings/1"
STOP_FORMAT = "stop/1"
NUM_READERS = 16
"""Trials read at the same time; a store in the network takes some 20 ms for each."""
_ADJUSTABLE = ("num_trials", "max_concurrent", "max_failures", "time_budget", "register_best")


class Settings(StrictModel):
    """How far and how fast a sweep goes: what may change between and during its drivers. Fields as in SweepSpec."""

    num_trials: int
    max_concurrent: int
    max_failures: int
    time_budget: str | None
    register_best: RegisterSpec | None

    @staticmethod
    def of(spec: SweepSpec) -> "Settings":
        """Return the settings that a spec asks for."""
        return Settings(**{name: getattr(spec, name) for name in _ADJUSTABLE})

    def applied_to(self, spec: SweepSpec) -> SweepSpec:
        """Return the spec with these settings."""
        return spec.model_copy(update={name: getattr(self, name) for name in _ADJUSTABLE})


@dataclass(frozen=True)
class Header:
    """A sweep as it was started."""

    tenant: str
    spec: SweepSpec
    content: Mapping[str, Any]
    """What it was resolved to, by part: the parts that may not change."""
    created: float
    """Seconds since the epoch."""


def content_of(spec: SweepSpec, job: Job) -> dict[str, Any]:
    """Return all that alters what a sweep's trials are, by part. `job` is the resolved base job of `spec`."""
    return {
        "numerics": NUMERICS_VERSION,
        "base model": job.base.base_id,
        "training view": job.base.training_view,
        "prompt contract": job.base.prompt_contract,
        "data (train)": job.train.digest,
        "data (validation)": job.validation and job.validation.digest,
        "initial adapter": job.init_adapter_id,
        "job": _altering_part(job),
        "space": {path: dimension.model_dump(mode="json") for path, dimension in spec.space.items()},
        "objective": [objective.model_dump(mode="json") for objective in spec.objectives],
        "sampler": spec.sampler.model_dump(mode="json"),
        "pruner": spec.pruner.model_dump(mode="json"),
        "enqueue": [dict(point) for point in spec.enqueue],
    }


def pin_sweep(store: Storage, spec: SweepSpec, job: Job, now: float) -> Header:
    """Start the sweep, or check that it is the one that was started under this name.

    Raises BadInput, naming what moved, if it is another one.
    """
    content = content_of(spec, job)
    body = {"created": now, "content": content, "spec": spec.model_dump(mode="json", by_alias=True), "tenant": job.tenant}
    with contextlib.suppress(ConditionFailed):  # Somebody started it before: what stands there decides.
        store.put_if_absent(layout.sweep_spec(job.tenant, spec.name), encode_record(SWEEP_FORMAT, body))
    header = read_header(store, job.tenant, spec.name)
    moved = _differences(header.content, content)
    if moved:
        raise BadInput(
            f"Sweep '{spec.name}' was started with other {', '.join(moved)}; start one under a new name, or restore what it had."
        )
    return header


def read_header(store: Storage, tenant: str, name: str) -> Header:
    """Read how a sweep was started. Raises BadInput if there is none of this name."""
    key = layout.sweep_spec(tenant, name)
    try:
        data, _ = store.get(key)
    except ObjectNotFound:
        raise BadInput(
            f"There is no sweep '{name}' of the tenant '{tenant}' in {store.uri}; start it with 'sweep run'."
        ) from None
    body = decode_record(data, SWEEP_FORMAT, key)
    return Header(body["tenant"], parse(SweepSpec, body["spec"], key), body["content"], body["created"])


def read_spec(store: Storage, tenant: str, name: str) -> SweepSpec:
    """Return the spec that continues a sweep: as started, with the settings of now. Raises BadInput if there is no such sweep."""
    header = read_header(store, tenant, name)
    stored = _read_settings(store, tenant, name)
    return stored.now.applied_to(header.spec) if stored else header.spec


def read_trials(store: Storage, tenant: str, name: str) -> list[Trial]:
    """Return all trials by number."""
    return [trial for trial, _ in _read_trials(store, tenant, name)]


def adjust(store: Storage, tenant: str, name: str, change: Callable[[Settings], Settings]) -> Settings:
    """Change the settings of a sweep, also while it is driven, and return the new ones. Raises BadInput if it has none yet."""
    key = layout.sweep_settings(tenant, name)
    while True:
        stored = _read_settings(store, tenant, name)
        if stored is None:
            read_header(store, tenant, name)
            raise BadInput(f"Sweep '{name}' has not begun yet; set its totals in its file.")
        changed = change(stored.now)
        try:
            store.compare_and_put(key, _settings_bytes(changed, stored.written), stored.etag)
            return changed
        except ConditionFailed:
            continue  # Somebody else changed them in between: change what stands there now.


def put_stop(store: Storage, tenant: str, name: str, now: float) -> None:
    """Wish that the driver of a sweep, if there is one, checkpoints its jobs and ends."""
    store.put(layout.sweep_stop(tenant, name), encode_record(STOP_FORMAT, {"asked": now}))


class Ledger:
    """The writing side, for the one driver that holds the sweep's claim in `epoch`.

    Methods raise ClaimLost once another driver has taken over. `trials` maps numbers to what is recorded.
    """

    def __init__(self, store: Storage, header: Header, epoch: int, clock: Callable[[], float] = time.time) -> None:
        self.header = header
        self._store, self._epoch, self._clock = store, epoch, clock
        self._tenant, self._name = header.tenant, header.spec.name
        found = _read_trials(store, self._tenant, self._name)
        self.trials: dict[int, Trial] = {trial.number: trial for trial, _ in found}
        self._etags = {trial.number: etag for trial, etag in found}
        self._next_seq = 1 + max((event.seq for trial in self.trials.values() for event in trial.events), default=-1)
        for trial in self.live():
            self._replace(replace(trial, epoch=epoch))

    def live(self) -> list[Trial]:
        """Return the trials without an end, by number."""
        return [trial for trial in self.trials.values() if trial.is_live]

    def ended(self) -> list[Trial]:
        """Return the trials with an end, by number."""
        return [trial for trial in self.trials.values() if not trial.is_live]

    def by_job(self, job_id: str) -> Trial | None:
        """Return the trial that carries out this job (not one that repeats it), None if there is none."""
        return next((trial for trial in self.trials.values() if trial.job_id == job_id and trial.duplicate_of is None), None)

    def last_told(self) -> Trial | None:
        """Return the trial that ended last, None if none has."""
        return max(self.ended(), key=lambda trial: trial.events[-1].seq, default=None)

    def start(self, params: Params, job_id: str, duplicate_of: int | None = None) -> Trial:
        """Record the next trial as running."""
        trial = self._new(params, (self._event("ask"),))
        return self._create(replace(trial, job_id=job_id, duplicate_of=duplicate_of))

    def start_infeasible(self, params: Params, reason: str) -> Trial:
        """Record the next trial as one that makes no job."""
        trial = self._new(params, (self._event("ask"), self._event("tell")))
        return self._create(replace(trial, status="infeasible", reason=reason, ended=trial.started))

    def report(self, number: int, step: int, value: float, kind: Literal["report", "copy"] = "report") -> Trial:
        """Record an intermediate value; of the kind "copy" it prunes nobody."""
        trial = self.trials[number]
        return self._replace(replace(trial, events=(*trial.events, self._event(kind, step, value))))

    def end(self, number: int, outcome: Outcome) -> Trial:
        """Record how a trial ended."""
        return self._replace(ended_as(self.trials[number], outcome, [self._event("tell")], self._clock()))

    def end_as_copy(self, number: int) -> Trial:
        """Record that a trial ended as the one it repeats, with that one's intermediate values."""
        trial = self.trials[number]
        assert trial.duplicate_of is not None, f"trial {number} repeats none"
        original = self.trials[trial.duplicate_of]
        copies = [self._event("copy", step, value) for step, value in sorted(original.reports.items())]
        return self._replace(ended_as(trial, outcome_of(original), [*copies, self._event("tell")], self._clock()))

    def agree_on_settings(self, wanted: Settings) -> Settings:
        """Return the settings in force: what the sweep's file asks for, unless 'extend' changed them since that was last read."""
        key = layout.sweep_settings(self._tenant, self._name)
        stored = _read_settings(self._store, self._tenant, self._name)
        try:
            if stored is None:
                self._store.put_if_absent(key, _settings_bytes(wanted, wanted))
            elif wanted in (stored.written, stored.now):
                return stored.now
            else:
                self._store.compare_and_put(key, _settings_bytes(wanted, wanted), stored.etag)
        except ConditionFailed:
            return self.agree_on_settings(wanted)  # 'extend' came in between.
        return wanted

    def settings(self) -> Settings:
        """Return the settings of now; another process may have changed them."""
        stored = _read_settings(self._store, self._tenant, self._name)
        return stored.now if stored else Settings.of(self.header.spec)

    def is_asked_to_stop(self) -> bool:
        """Tell whether another process wishes that this driver ends."""
        return self._store.head(layout.sweep_stop(self._tenant, self._name)) is not None

    def forget_stop(self) -> None:
        """Drop a wish to stop: it was obeyed, or meant the driver before."""
        self._store.delete(layout.sweep_stop(self._tenant, self._name))

    def _event(self, kind: Any, step: int | None = None, value: float | None = None) -> Event:
        event = Event(self._next_seq, kind, step, value)
        self._next_seq += 1
        return event

    def _new(self, params: Params, events: tuple[Event, ...]) -> Trial:
        return Trial(len(self.trials), params, "running", events, self._epoch, started=self._clock())

    def _create(self, trial: Trial) -> Trial:
        try:
            info = self._store.put_if_absent(self._key(trial.number), _trial_bytes(trial))
        except ConditionFailed:
            return self._take_over(trial)
        return self._keep(trial, info.etag)

    def _take_over(self, trial: Trial) -> Trial:
        """Put a trial where the driver before, thawed after its time, wrote one that nobody counted on."""
        data, info = self._store.get(self._key(trial.number))
        if data == _trial_bytes(trial):
            return self._keep(trial, info.etag)
        if decode_record(data, TRIAL_FORMAT, info.key)["epoch"] >= self._epoch:
            raise self._lost()
        self._etags[trial.number] = info.etag
        return self._replace(trial)

    def _replace(self, trial: Trial) -> Trial:
        try:
            info = self._store.compare_and_put(self._key(trial.number), _trial_bytes(trial), self._etags[trial.number])
        except ConditionFailed:
            # Something between the store and us may have sent it twice; no other driver writes these bytes.
            data, info = self._store.get(self._key(trial.number))
            if data != _trial_bytes(trial):
                raise self._lost() from None
        return self._keep(trial, info.etag)

    def _keep(self, trial: Trial, etag: str) -> Trial:
        self.trials[trial.number], self._etags[trial.number] = trial, etag
        return trial

    def _key(self, number: int) -> str:
        return layout.trial(self._tenant, self._name, number)

    def _lost(self) -> ClaimLost:
        return ClaimLost(f"Another driver took over the sweep '{self._name}'; this one ends.")


def _altering_part(job: Job) -> dict[str, Any]:
    """The part of a job's spec that alters its result; what is pinned by content stands beside it."""
    body = job.spec.model_dump(mode="json", include={"task_type", "peft", "training", "evaluation"})
    body["peft"].pop("init_adapter")
    body["resources"] = {"num_threads": job.spec.resources.num_threads}
    return body


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Name the parts that differ; of parts with keys, the keys."""
    moved = []
    for part in now:
        if canonical_json(before.get(part)) != canonical_json(now[part]):
            paths = _differing_paths(before.get(part), now[part])
            moved.append(f"{part} ({', '.join(paths)})" if paths else part)
    return moved


def _differing_paths(before: Any, now: Any) -> list[str]:
    if not isinstance(before, Mapping) or not isinstance(now, Mapping):
        return []
    paths = []
    for key in sorted({*before, *now}):
        if before.get(key) != now.get(key) or (key in before) != (key in now):
            inner = _differing_paths(before.get(key), now.get(key))
            paths += [f"{key}.{path}" for path in inner] or [f"{key}: {before.get(key)!r} -> {now.get(key)!r}"]
    return paths


def _read_trials(store: Storage, tenant: str, name: str) -> list[tuple[Trial, str]]:
    def read(key: str) -> tuple[Trial, str]:
        data, info = store.get(key)
        return Trial.from_json(decode_record(data, TRIAL_FORMAT, key)), info.etag

    with ThreadPoolExecutor(NUM_READERS) as pool:
        return list(pool.map(read, [entry.key for entry in store.list(layout.trials(tenant, name))]))


@dataclass(frozen=True)
class _StoredSettings:
    now: Settings
    written: Settings
    """What the sweep's file asked for when it was last read."""
    etag: str


def _read_settings(store: Storage, tenant: str, name: str) -> _StoredSettings | None:
    key = layout.sweep_settings(tenant, name)
    try:
        data, info = store.get(key)
    except ObjectNotFound:
        return None
    body = decode_record(data, SETTINGS_FORMAT, key)
    return _StoredSettings(parse(Settings, body["now"], key), parse(Settings, body["written"], key), info.etag)


def _settings_bytes(now: Settings, written: Settings) -> bytes:
    return encode_record(SETTINGS_FORMAT, {"now": now.model_dump(mode="json"), "written": written.model_dump(mode="json")})


def _trial_bytes(trial: Trial) -> bytes:
    return encode_record(TRIAL_FORMAT, trial.to_json())
