"""A sweep's best as the recipe of other customers."""

from pathlib import Path

import pytest

from infra.errors import BadInput
from infra.fingerprint import id_of_bytes
from infra.local_storage import LocalStorage
from infra.strict import parse
from pipelines.nightly.recipes import recipe_of
from sweeps.ledger import Ledger, pin_sweep
from sweeps.spec import SweepSpec
from sweeps.trial import Outcome
from tests.pipelines.nightly.fleets import found_in, write_fleet, write_rows
from workers.job import BaseRef, DataRef, pin

SWEEP = {
    "name": "menus",
    "job": {
        "tenant": "acme",
        "task": "support",
        "base_model": {"name_or_path": "elsewhere"},
        "data": {"train": "elsewhere.jsonl"},
        "training": {"max_steps": 50},
    },
    "objective": {"metric": "eval/loss", "direction": "minimize"},
    "space": {
        "peft.r": {"type": "categorical", "choices": [4, 8]},
        "alpha_over_r": {"type": "categorical", "choices": [2]},
        "training.learning_rate": {"type": "float", "low": 1e-5, "high": 1e-1, "log": True},
    },
    "num_trials": 4,
}


def swept(store: LocalStorage) -> Ledger:
    """Record a sweep that has begun."""
    spec = parse(SweepSpec, SWEEP, "sweep")
    digest = id_of_bytes(b"any")
    job = pin(spec.base_job, BaseRef(digest, digest, digest, "elsewhere"), DataRef(digest, 9), DataRef(digest, 9), None, None)
    return Ledger(store, pin_sweep(store, spec, job, now=1.0), epoch=1)


def end(ledger: Ledger, r: int, rate: float, loss: float) -> None:
    params: dict[str, bool | int | float | str | None] = {"peft.r": r, "alpha_over_r": 2, "training.learning_rate": rate}
    trial = ledger.start(params, id_of_bytes(f"{r} {rate}".encode()))
    ledger.end(trial.number, Outcome("complete", values=(loss,), metrics={"eval/loss": loss}))


def test_a_recipe_is_the_best_trials_adapter_and_training_under_the_customers_own_overrides(tmp_path: Path) -> None:
    ledger = swept(LocalStorage(tmp_path / "store"))
    end(ledger, 4, 0.01, loss=2.0)
    end(ledger, 8, 0.02, loss=1.0)
    write_rows(tmp_path / "b" / "train.jsonl")
    text = """\
customers:
  - {tenant: a, data: ./a, recipe: acme/menus}
  - {tenant: b, data: ./b, recipe: acme/menus, set: {training.max_steps: 7}}
  - {tenant: c, data: ./c}
"""
    _, (a, b, c), refused = found_in(write_fleet(tmp_path, text))
    assert refused == []
    assert (a.job.peft.r, a.job.peft.lora_alpha, a.job.training.learning_rate, a.job.training.max_steps) == (8, 16, 0.02, 50)
    assert (b.job.peft.r, b.job.training.max_steps) == (8, 7)
    assert (c.job.peft.r, c.job.training.max_steps) == (16, None)
    for customer in (a, b, c):
        assert customer.job.base_model.name_or_path == str(tmp_path / "base")
        assert customer.job.data.train == customer.source


def test_a_sweep_without_a_complete_trial_is_no_recipe_yet(tmp_path: Path) -> None:
    store = LocalStorage(tmp_path / "store")
    ledger = swept(store)
    ledger.start({"peft.r": 4, "alpha_over_r": 2, "training.learning_rate": 0.01}, id_of_bytes(b"one"))
    with pytest.raises(BadInput, match="'lorafleet sweep resume acme/menus'"):
        recipe_of(store, "acme/menus")


@pytest.mark.parametrize("reference", ["menus", "acme/", "/menus", "Acme/menus", "acme/../../x"])
def test_what_names_no_sweep_is_refused(tmp_path: Path, reference: str) -> None:
    with pytest.raises(BadInput, match="names no sweep; write tenant/sweep"):
        recipe_of(LocalStorage(tmp_path / "store"), reference)
