"""fleet.yaml: what it takes, and the sentence that each mistake gets."""

from pathlib import Path

import pytest

from infra.errors import BadInput
from pipelines.nightly.spec import load_fleet
from tests.pipelines.nightly.fleets import JOB, found_in, write_fleet, write_rows

ONE = "customers: [{tenant: acme, data: ./acme}]\n"


def test_a_fleet_of_three_lines_has_the_defaults_of_the_design(tmp_path: Path) -> None:
    spec = load_fleet(write_fleet(tmp_path, ONE)).spec
    defaults = spec.defaults
    assert (defaults.min_new_rows, defaults.max_age_days, defaults.warm_start, defaults.priority) == (20, None, "champion", 50)
    assert (defaults.holdout, defaults.gates, defaults.resweep) == (0.1, "gates.yaml", None)
    assert (spec.limits.max_promotions_share, spec.limits.timezone, spec.limits.canary) == (0.25, "UTC", [])
    assert spec.notify is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("customers: []\n", "'customers'"),
        ("customers: [{tenant: acme, date: ./acme}]\n", "unknown key 'customers.0.date'. Did you mean 'data'?"),
        ("customers: [{tenant: Acme, data: ./acme}]\n", "'customers.0.tenant': 'Acme' is not a name"),
        ("customers: [{tenant: a, data: ./a, priority: 101}]\n", "'customers.0.priority'"),
        ("customers: [{csv: a.csv, serparator: x}]\n", "unknown key 'customers.0.serparator'"),
        ("customers: [{discover: data/}]\n", "should hold {tenant} once"),
        ("customers: [{discover: 'data/*/{tenant}/'}]\n", "should hold {tenant} once"),
        ("customers: [{discover: 's3://{tenant}/data/'}]\n", "should name a bucket"),
        (ONE + "limits: {deadline: '6:00'}\n", "'6:00' is no time of day; write hours and minutes, such as 06:00"),
        (ONE + "limits: {timezone: Europe/Atlantis}\n", "'Europe/Atlantis' is no time zone"),
        (ONE + "limits: {timezone: ../../etc/passwd}\n", "is no time zone"),
        (ONE + "defaults: {warm_start: chamipon}\n", "'defaults.warm_start'"),
        (ONE + "notify: {urls: ['https://example.org']}\n", "unknown key 'notify.urls'"),
        ("customers: [{tenant: a, data: ./a}, {tenant: a, data: ./b}]\n", "customers.1 lists a.support a second time"),
        ("customers: [{tenant: a, data: ./a, set: {training.epochs: 3}}]\n", "customers.0.set: unknown key 'training.epochs'"),
        ("customers: [{tenant: a, data: ./a, set: {training.num_train_epochs: many}}]\n", "'training.num_train_epochs'"),
        ("customers: [{tenant: a, data: ./a, set: {data.train: ./b}}]\n", "'data.train' is not set so; write the entry's data"),
        ("customers: [{tenant: a, data: ./a, set: {peft.init_adapter: x}}]\n", "write warm_start"),
        ("customers: [{discover: 'd/{tenant}/', set: {peft.r: 0}}]\n", "'peft.r'"),
        ("customers: [{tenant: a, data: ./a, set: {task_type.deeper: 1}}]\n", "goes through 'task_type', which holds str"),
        ("customers: [{tenant: a, data: ./a, gates: strict.yaml}]\n", "customers.0: there is no file"),
        (ONE + "defaults: {gates: strict.yaml}\n", "write the gates there (see 'lorafleet schema gates'), or set gates to null"),
        (ONE + "defaults: {gates: guarded.yaml}\n", "guard.jsonl, which does not exist; put it there, or correct data"),
        (ONE + "defaults: {resweep: {sweep: sweep.yaml}}\n", "defaults: there is no file"),
        (ONE + "defaults: {job: jobs.yaml}\n", "Did you mean"),
    ],
)
def test_a_mistake_in_the_file_is_one_sentence_that_names_its_place(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "guarded.yaml").write_text("- {kind: effect}\n- {kind: guard, data: guard.jsonl}\n")
    with pytest.raises(BadInput) as raised:
        load_fleet(write_fleet(tmp_path, text, JOB + "task_type: CAUSAL_LM\n"))
    assert told in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_job_or_a_sweep_is_told_from_a_fleet(tmp_path: Path) -> None:
    path = write_fleet(tmp_path, ONE)
    with pytest.raises(BadInput, match="is a job, expected a fleet; run it with 'lorafleet train'"):
        load_fleet(path.parent / "job.yaml")


def test_a_template_that_continues_from_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="set warm_start in the fleet's file"):
        load_fleet(write_fleet(tmp_path, ONE, JOB + "peft: {init_adapter: acme.support@champion}\n"))


def test_a_task_stands_somewhere_or_the_file_is_refused(tmp_path: Path) -> None:
    without = JOB.replace("task: support\n", "")
    with pytest.raises(BadInput, match="customers.0 has no task"):
        load_fleet(write_fleet(tmp_path, ONE, without))
    write_rows(tmp_path / "acme" / "train.jsonl")
    _, [customer], _ = found_in(write_fleet(tmp_path, ONE + "defaults: {task: returns}\n", without))
    assert customer.name == "acme.returns"
