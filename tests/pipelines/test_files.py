"""Files that people write mean what they look like, and every mistake in them gets one sentence."""

import subprocess
import sys
from pathlib import Path

import pytest

from infra.errors import BadInput
from pipelines.files import load_job, load_sweep, parse_yaml, read_yaml, set_overrides

JOB = """
tenant: acme
task: support
base_model: {name_or_path: bases/small}
data: {train: data/acme}
training: {learning_rate: 2e-4, max_steps: 60}
"""
SWEEP = """
name: acme-support
job: job.yaml
num_trials: 4
space:
  peft.r: {type: categorical, choices: [4, 8]}
  training.learning_rate: {type: float, low: 1e-5, high: 1.0e-2, log: true}
"""


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def sentence_of(text: str) -> str:
    with pytest.raises(BadInput) as raised:
        parse_yaml(text, "job.yaml")
    assert raised.value.exit_code == 2
    return str(raised.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("2.0e-4", 2.0e-4),
        ("1E5", 1e5),
        ("-.5", -0.5),
        ("3.", 3.0),
        ("16", 16),
        ("+3", 3),
        ("0", 0),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("no", "no"),
        ("on", "on"),
        ("Yes", "Yes"),
        ("0123", "0123"),
        ("0x1F", "0x1F"),
        ("1_000", "1_000"),
        ("12:30:45", "12:30:45"),
        ("2026-11-02", "2026-11-02"),
        ("'16'", "16"),
        ('"true"', "true"),
        ("=", "="),
        ("1.2.3", "1.2.3"),
        ("[a, {b: 1}]", ["a", {"b": 1}]),
        ("on: off", {"on": "off"}),
        ("<<: {a: 1}", {"<<": {"a": 1}}),
    ],
)
def test_scalars_mean_what_they_look_like(text: str, value: object) -> None:
    read = parse_yaml(text, "job.yaml")
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "place", "way_out"),
    [
        ("a: &x [1]\nb: *x", ":1:4", "alias"),
        ("a: 1\nb: *x", ":2:4", "alias"),
        ("? &k a\n: 1", ":1:3", "alias"),
        ("a: 1\nb: 2\na: 3", ":3:1", "the key 'a' a second time"),
        ("a: {b: 1, 'b': 2}", ":1:11", "the key 'b' a second time"),
        ("a: 1\n---\nb: 2", ":2:1", "one document per file"),
        ("a: !!python/object/apply:os.system [ls]", ":1:4", "tag"),
        ("a: !!binary aGk=", ":1:4", "tag"),
        ("!x a: 1", ":1:1", "tag"),
        ("16: a", ":1:1", "quotes"),
        ("true: a", ":1:1", "quotes"),
        ("[a, b]: c", ":1:1", "quotes"),
        ("a:\n\tb: 1", ":2:1", "indent with spaces"),
        ("a: [1, 2\nb: 3", ":2:2", "while parsing a flow sequence (line 1)"),
        ("a: b: c", ":1:5", "not valid YAML"),
        ("a: " + "9" * 5000, ":1:4", "digits"),
        ('a: "\\0"', ":1:4", "NUL"),
        ("a: 1\nb: \x07", ":2", "U+0007"),
        ("a: " + "[" * 40 + "]" * 40, ":1:35", "deeper than 32"),
        ("a: " + "{b: " * 100_000, ":1:", "deeper than 32"),
    ],
)
def test_what_is_refused_is_named_with_its_place(text: str, place: str, way_out: str) -> None:
    sentence = sentence_of(text)
    assert sentence.startswith(f"job.yaml{place}")
    assert way_out in sentence
    assert "\n" not in sentence


def test_alias_bomb_is_refused_before_it_grows() -> None:
    levels = "\n".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]" for n in range(1, 12))
    assert ":1:5 uses an alias or anchor" in sentence_of(f"l0: &l0 boom\n{levels}")


def test_missing_file_names_the_close_one(tmp_path: Path) -> None:
    write(tmp_path, "sweep.yaml", "a: 1")
    with pytest.raises(BadInput, match=r"Did you mean '.*sweep\.yaml'\?"):
        read_yaml(tmp_path / "swep.yaml")
    with pytest.raises(BadInput, match=r"the YAML files there: sweep\.yaml"):
        read_yaml(tmp_path / "zzz")
    with pytest.raises(BadInput, match="the folder .* does not exist"):
        read_yaml(tmp_path / "nowhere" / "sweep.yaml")


def test_folder_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is not a file"):
        read_yaml(tmp_path)


def test_text_that_is_not_utf8_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes("a: 1\nb: gr\xfcn\n".encode("latin-1"))
    with pytest.raises(BadInput, match=r"job\.yaml:2 is not UTF-8 text \(byte 0xfc\)"):
        read_yaml(path)


def test_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n")
    assert read_yaml(path) == {"a": 1, "b": 2}


def test_file_beyond_a_mebibyte_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "job.yaml", "a: 1\n" + "#" * (1 << 20))
    with pytest.raises(BadInput, match="larger than 1 MiB"):
        read_yaml(path)


def test_job_comes_with_the_folder_of_its_file(tmp_path: Path) -> None:
    path = write(tmp_path, "conf/job.yaml", JOB)
    spec, folder = load_job(path)
    assert (spec.tenant, spec.training.learning_rate, spec.training.max_steps) == ("acme", 2e-4, 60)
    assert folder == tmp_path / "conf"


def test_job_mistakes_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"job\.yaml: unknown key 'training.learning_rat'. Did you mean 'learning_rate'\?"):
        load_job(write(tmp_path, "job.yaml", JOB.replace("learning_rate", "learning_rat")))
    with pytest.raises(BadInput, match="job.yaml is empty; expected a job"):
        load_job(write(tmp_path, "job.yaml", "# nothing\n"))
    with pytest.raises(BadInput, match="holds a list; expected a job"):
        load_job(write(tmp_path, "job.yaml", "- a\n"))
    with pytest.raises(BadInput, match="'training.learning_rate': should be a finite number"):
        load_job(write(tmp_path, "job.yaml", JOB.replace("2e-4", ".inf")))
    with pytest.raises(BadInput, match="'training.max_steps': should be a valid integer, got str '0123'"):
        load_job(write(tmp_path, "job.yaml", JOB.replace("60", "0123")))


def test_sweep_reads_its_job_beside_itself(tmp_path: Path) -> None:
    write(tmp_path, "jobs/job.yaml", JOB)
    sweep, job, folder = load_sweep(write(tmp_path, "sweep.yaml", SWEEP.replace("job.yaml", "jobs/job.yaml")))
    assert job.tenant == "acme"
    assert sweep.job == job
    assert sweep.space["training.learning_rate"].model_dump()["low"] == 1e-5
    assert folder == tmp_path / "jobs"


def test_sweep_may_hold_its_job(tmp_path: Path) -> None:
    inline = "job:" + JOB.replace("\n", "\n  ") + "\n"
    path = write(tmp_path, "sweep.yaml", SWEEP.replace("job: job.yaml\n", inline))
    sweep, job, folder = load_sweep(path)
    assert (sweep.job, folder) == (job, tmp_path)
    path.write_text(path.read_text().replace("max_steps", "max_stepz"))
    with pytest.raises(BadInput, match=r"sweep\.yaml \(job\): unknown key 'training.max_stepz'. Did you mean 'max_steps'\?"):
        load_sweep(path)


def test_sweep_names_the_job_file_that_is_missing_or_wrong(tmp_path: Path) -> None:
    path = write(tmp_path, "sweep.yaml", SWEEP)
    with pytest.raises(BadInput, match=r"there is no file .*job\.yaml"):
        load_sweep(path)
    write(tmp_path, "job.yaml", JOB.replace("acme", "Acme", 1))
    with pytest.raises(BadInput, match=r"job\.yaml: 'tenant': 'Acme' is not a name"):
        load_sweep(path)
    with pytest.raises(BadInput, match="the key 'job' is missing"):
        load_sweep(write(tmp_path, "sweep.yaml", SWEEP.replace("job: job.yaml\n", "")))


def test_overrides_reach_any_depth_and_leave_the_original(tmp_path: Path) -> None:
    raw = {"training": {"max_steps": 60}, "task": "support"}
    changed = set_overrides(
        raw, ["training.max_steps=50", "training.learning_rate=1e-4", "peft.target_modules=[q_proj]", "task="]
    )
    assert changed == {
        "training": {"max_steps": 50, "learning_rate": 1e-4},
        "task": None,
        "peft": {"target_modules": ["q_proj"]},
    }
    assert raw == {"training": {"max_steps": 60}, "task": "support"}


def test_overrides_of_a_sweep_reach_into_job_and_space(tmp_path: Path) -> None:
    write(tmp_path, "job.yaml", JOB)
    new = "space.training.max_length={type: int, low: 8, high: 16}"
    overrides = ["num_trials=2", "job.training.max_steps=9", "space.peft.r.choices=[2]", new]
    sweep, job, _ = load_sweep(write(tmp_path, "sweep.yaml", SWEEP), overrides)
    assert (sweep.num_trials, job.training.max_steps, sweep.space["peft.r"].model_dump()["choices"]) == (2, 9, [2])
    assert sweep.space["training.max_length"].model_dump()["high"] == 16


def test_fleet_taken_for_a_job_or_a_sweep_is_told(tmp_path: Path) -> None:
    fleet = write(tmp_path, "fleet.yaml", "name: prod\ncustomers: [{tenant: acme, data: ./acme}]\n")
    with pytest.raises(BadInput, match=r"fleet\.yaml is a fleet, expected a job; run it with 'lorafleet nightly run'"):
        load_job(fleet)
    with pytest.raises(BadInput, match="is a fleet, expected a sweep"):
        load_sweep(fleet)


def test_job_and_sweep_taken_for_one_another_are_told_apart(tmp_path: Path) -> None:
    job, sweep = write(tmp_path, "job.yaml", JOB), write(tmp_path, "sweep.yaml", SWEEP)
    with pytest.raises(BadInput, match=r"sweep\.yaml is a sweep, expected a job; run it with 'lorafleet sweep run'"):
        load_job(sweep)
    with pytest.raises(BadInput, match=r"job\.yaml is a job, expected a sweep; train it with 'lorafleet train'"):
        load_sweep(job)
    with pytest.raises(BadInput, match=r"for a job write --set training\.max_steps=9\."):
        load_job(job, ["job.training.max_steps=9"])


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("max_steps", "is not of the form key=value"),
        ("=3", "is not of the form key=value"),
        ("training..seed=3", "is not of the form key=value"),
        ("task.name=x", "'task' holds str and has no keys below it"),
        ("peft.r=[1", "--set peft.r"),
    ],
)
def test_wrong_overrides_are_sentences(override: str, sentence: str) -> None:
    with pytest.raises(BadInput) as raised:
        set_overrides({"task": "support"}, [override])
    assert sentence in str(raised.value)


def test_wrong_override_of_a_job_names_the_key(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="'training.max_steps': should be a valid integer, got str 'many'"):
        load_job(write(tmp_path, "job.yaml", JOB), ["training.max_steps=many"])


def test_reading_a_file_loads_no_heavy_library(tmp_path: Path) -> None:
    path = write(tmp_path, "job.yaml", JOB)
    heavy = "{'torch', 'ray', 'mlflow', 'optuna', 'boto3', 'transformers'}"
    code = f"import sys, pathlib, pipelines.files as f; f.load_job(pathlib.Path(sys.argv[1])); print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
