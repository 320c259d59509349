"""A study rebuilt from its trials, at any point, goes on exactly as one that was never interrupted."""

import hashlib
import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import optuna
import pytest

from sweeps.space import apply
from sweeps.spec import SweepSpec
from sweeps.study import Study, StudyMirror
from sweeps.trial import Event, Trial
from tests.sweeps.curves import BASE, loss_of, sweep
from workers.job import DataRef, pin

ASHA = {"type": "asha", "min_resource": 10, "reduction_factor": 2}
FINITE = {
    "peft.r": {"type": "categorical", "choices": [4, 8, 16, 64]},
    "peft.target_modules": {"type": "categorical", "choices": ["attention", "all-linear"]},
    "peft.lora_dropout": {
        "type": "float",
        "low": 0.0,
        "high": 0.1,
        "step": 0.05,
        "when": {"peft.target_modules": ["all-linear"]},
    },
}


class Game:
    """Plays a sweep with three live trials against a study, keeping the trials as a ledger would."""

    def __init__(self, spec: SweepSpec, restart_every: int | None = None, width: int = 3) -> None:
        self.spec, self.restart_every, self.width = spec, restart_every, width
        self.trials: list[Trial] = []
        self.verdicts: list[tuple[int, int, bool]] = []
        self.seq = 0
        self.study = Study(spec)

    def play(self, total: int) -> "Game":
        while len(self.trials) < total or any(trial.is_live for trial in self.trials):
            live = [trial for trial in self.trials if trial.is_live]
            if len(live) < self.width and len(self.trials) < total:
                self.ask()
            else:
                self.go_on(live[self.seq % len(live)])
        return self

    def ask(self) -> None:
        number = len(self.trials)
        params = self.study.ask(number)
        self.trials.append(Trial(number, params, "running", (), 1))
        self.happened(number, "ask")
        if params["peft.r"] == 64:
            self.end(number, status="infeasible")

    def go_on(self, trial: Trial) -> None:
        step = 10 * (1 + len(trial.reports))
        job = pin(apply(self.spec.base_job, trial.params), BASE, DataRef("d" * 32, 1), None, None, None)
        value = loss_of(job, step)
        if step > 40:
            failed = trial.number % 7 == 6
            self.end(trial.number, status="failed") if failed else self.end(trial.number, status="complete", values=(value,))
            return
        verdict = self.study.report(trial.number, step, value)
        self.verdicts.append((trial.number, step, verdict))
        self.happened(trial.number, "report", step, value)
        if verdict:
            self.end(trial.number, status="pruned")

    def end(self, number: int, **facts: object) -> None:
        self.trials[number] = replace(self.trials[number], **facts)  # type: ignore[arg-type]
        self.study.tell(self.trials[number])
        self.happened(number, "tell")

    def happened(self, number: int, kind: str, step: int | None = None, value: float | None = None) -> None:
        trial = self.trials[number]
        event = Event(self.seq, kind, step, value)  # type: ignore[arg-type]
        self.trials[number] = replace(trial, events=(*trial.events, event))
        self.seq += 1
        # Through JSON, as a ledger has it. An end and its event are written together, so never in between.
        if self.restart_every and self.seq % self.restart_every == 0 and (trial.is_live or kind == "tell"):
            self.study = Study(self.spec, [Trial.from_json(json.loads(json.dumps(one.to_json()))) for one in self.trials])


SPECS = {
    "tpe": sweep(sampler={"type": "tpe", "seed": 3}),
    "tpe with asha": sweep(sampler={"type": "tpe", "seed": 4}, pruner=ASHA),
    "tpe without conditions": sweep(space={path: FINITE[path] for path in ("peft.r", "peft.target_modules")}, pruner=ASHA),
    "random": sweep(sampler={"type": "random", "seed": 5}, pruner=ASHA),
    "grid": sweep(sampler={"type": "grid"}, space=FINITE, pruner=ASHA),
    "enqueued": sweep(enqueue=[{"peft.r": 16}, {"training.learning_rate": 1e-3}]),
}


@pytest.mark.parametrize("name", SPECS)
def test_rebuilt_study_suggests_and_prunes_as_the_uninterrupted_one(name: str) -> None:
    spec, total = SPECS[name], 16 if name == "grid" else 22
    straight = Game(spec).play(total)
    restarted = Game(spec, restart_every=1).play(total)
    assert [trial.params for trial in restarted.trials] == [trial.params for trial in straight.trials]
    assert restarted.verdicts == straight.verdicts
    assert restarted.trials == straight.trials


def test_games_reach_what_they_are_to_show() -> None:
    for name in ("tpe with asha", "random"):
        assert {trial.status for trial in Game(SPECS[name]).play(22).trials} >= {"complete", "pruned", "infeasible"}
    assert {trial.status for trial in Game(SPECS["tpe"]).play(22).trials} == {"complete", "infeasible", "failed"}
    tpe = Game(SPECS["tpe"]).play(22)
    conditional = ["peft.lora_dropout" in trial.params for trial in tpe.trials]
    assert any(conditional)
    assert not all(conditional)


def test_suggestions_do_not_depend_on_the_hash_seed() -> None:
    program = "from tests.sweeps.test_study import fingerprint; print(fingerprint())"
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        printed = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        ).stdout
        assert printed.strip() == fingerprint()


def fingerprint() -> str:
    """Digest of all suggestions of a game beyond TPE's random start."""
    params = [trial.params for trial in Game(SPECS["tpe"]).play(22).trials]
    return hashlib.sha256(json.dumps(params).encode()).hexdigest()


def test_seeds_give_different_suggestions() -> None:
    first, second = (Study(sweep(sampler={"type": "random", "seed": seed})) for seed in (1, 2))
    assert first.ask(0) != second.ask(0)
    assert first.ask(1) != second.ask(1)


def test_known_step_gets_its_old_answer() -> None:
    study = Study(SPECS["random"])
    study.ask(0)
    study.ask(1)
    study.report(0, 10, 1.0)
    assert study.report(1, 10, 2.0) is True
    assert study.report(1, 10, 2.0) is True
    assert study.is_condemned(1)
    assert not study.is_condemned(0)


def test_enqueued_trial_is_never_pruned() -> None:
    study = Study(sweep(enqueue=[{"peft.r": 16}], sampler={"type": "random", "seed": 5}, pruner=ASHA))
    for number in range(3):
        study.ask(number)
    for number, value in ((2, 1.0), (1, 2.0), (0, 9.0)):
        verdict = study.report(number, 10, value)
        assert verdict is (number == 1)


def num_large_asked(status: str) -> int:
    """How many of the last 30 of 60 trials ask for more than 50 where these end with `status` and all others are equally good."""
    study = Study(sweep(space={"peft.r": {"type": "int", "low": 1, "high": 100}}, sampler={"type": "tpe", "seed": 1}))
    is_large = []
    for number in range(60):
        trial = Trial(number, study.ask(number), "running", (), 1)
        is_large.append(trial.params["peft.r"] > 50)
        outcome = {"status": status} if is_large[-1] else {"status": "complete", "values": (1.0,)}
        study.tell(replace(trial, **outcome))
    return sum(is_large[-30:])


def test_sampler_keeps_away_from_infeasible_points_but_learns_nothing_from_failures() -> None:
    assert 2 * num_large_asked("infeasible") <= num_large_asked("failed")


def test_mirror_shows_ended_trials_once_in_optunas_storage(tmp_path: Path) -> None:
    spec, url = SPECS["random"], f"sqlite:///{tmp_path / 'studies.db'}"
    game = Game(spec).play(8)
    for _ in range(2):
        mirror = StudyMirror(url, "acme/curves", spec)
        for trial in game.trials:
            mirror(trial, game.study)
    found = optuna.load_study(storage=url, study_name="acme/curves").trials
    assert [trial.user_attrs["lorafleet.trial"] for trial in found] == list(range(8))
    assert [trial.params for trial in found] == [trial.params for trial in game.trials]
    assert sum(trial.state == optuna.trial.TrialState.COMPLETE for trial in found) == sum(
        trial.status == "complete" for trial in game.trials
    )


def test_mirror_that_fails_is_reported_once_and_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    game = Game(SPECS["random"]).play(3)
    mirror = StudyMirror(f"sqlite:///{tmp_path / 'no' / 'such' / 'folder.db'}", "acme/curves", SPECS["random"])
    with caplog.at_level(logging.WARNING, logger="sweeps.study"):
        for trial in game.trials:
            mirror(trial, game.study)
    assert [record.name for record in caplog.records].count("sweeps.study") == 1
