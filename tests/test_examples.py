"""Every example is loaded as a person would load it."""

import tomllib
from pathlib import Path

import pytest

from infra.errors import BadInput
from infra.settings import Settings
from infra.strict import parse
from pipelines.files import load_job, load_sweep
from pipelines.gates import load_gates
from pipelines.nightly.spec import load_fleet

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_the_example_job_is_a_job() -> None:
    spec, folder = load_job(EXAMPLES / "job.yaml")
    assert (spec.tenant, folder) == ("acme", EXAMPLES)


def test_the_example_sweep_varies_the_example_job() -> None:
    spec, job, _ = load_sweep(EXAMPLES / "sweep.yaml")
    assert spec.name == "acme-support"
    assert job.task == "support"
    assert "peft.lora_dropout" in spec.space


def test_the_example_settings_are_settings(tmp_path: Path) -> None:
    written = tomllib.loads((EXAMPLES / "lorafleet.toml").read_text())
    assert parse(Settings, {"home": tmp_path, **written}, "lorafleet.toml").store.startswith("s3://")


def test_the_example_classifier_classifies() -> None:
    spec, _ = load_job(EXAMPLES / "classifier.yaml")
    assert spec.task_type == "SEQ_CLS"


def test_the_example_of_a_base_in_four_bits_is_one() -> None:
    spec, _ = load_job(EXAMPLES / "qlora.yaml")
    assert spec.base_model.quantization is not None
    assert spec.peft.rank_pattern == {"down_proj": 32}


def test_the_example_gates_are_gates_and_so_is_the_one_to_be_taken_in(tmp_path: Path) -> None:
    gates = load_gates(EXAMPLES / "gates.yaml")
    assert [gate.name for gate in gates.gates] == ["better_than_champion", "better_than_base", "effect"]
    assert gates.folder == EXAMPLES
    gates.check_files()
    (tmp_path / "gates.yaml").write_text((EXAMPLES / "gates.yaml").read_text().replace("# - {kind", "- {kind"))
    with pytest.raises(BadInput, match=r"guard.jsonl, which does not exist; put it there"):
        load_gates(tmp_path / "gates.yaml").check_files()


def test_the_example_fleet_is_a_fleet_of_the_example_job() -> None:
    fleet = load_fleet(EXAMPLES / "fleet.yaml")
    assert (fleet.spec.name, fleet.template.task) == ("prod", "support")
    assert len(fleet.spec.customers) == 3


def test_no_example_is_forgotten_here() -> None:
    known = ["classifier.yaml", "fleet.yaml", "gates.yaml", "job.yaml", "lorafleet.toml", "qlora.yaml", "sweep.yaml"]
    assert sorted(path.name for path in EXAMPLES.iterdir()) == known
