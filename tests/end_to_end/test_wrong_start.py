"""What is wrong when a sweep starts is told in one sentence with the documented exit code, before anything is done."""

from pathlib import Path

import pytest
import yaml

from pipelines import cli
from tests.contracts.storage_servers import S3Server, free_port
from tests.end_to_end.ground import Ground

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
]


@pytest.fixture
def ground(tmp_path: Path, test_data: Path, monkeypatch: pytest.MonkeyPatch) -> Ground:
    """A sweep that would run, in the current folder of this process."""
    ground = Ground(tmp_path)
    ground.write_sweep(test_data, num_trials=1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORAFLEET_HOME", str(ground.home))
    monkeypatch.setenv("LORAFLEET_LAUNCHER", "in-process")
    return ground


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Run a command in this process, as `lorafleet` would; give its exit code and the sentence on stderr."""

    def run(*arguments: str, **environment: str) -> tuple[int, str]:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        code = cli._run(arguments)
        return code, " ".join(capsys.readouterr().err.split())

    return run


def nothing_done(ground: Ground) -> bool:
    """Tell whether no trial was begun."""
    store = ground.home / "store"
    return not list(store.rglob("trials/*.json")) and not list(store.rglob("state.json"))


def test_mlflow_that_does_not_answer_ends_it_with_4(ground: Ground, run, moto: S3Server) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    services = {"LORAFLEET_STORE": f"s3://{moto.new_bucket()}/x", "LORAFLEET_S3_ENDPOINT_URL": moto.url}
    code, sentence = run("sweep", "run", "sweep.yaml", LORAFLEET_TRACKING_URI=address, **services)
    assert code == 4
    assert address in sentence


def test_mlflow_server_with_a_local_store_ends_it_with_2(ground: Ground, run) -> None:
    code, sentence = run("sweep", "run", "sweep.yaml", LORAFLEET_TRACKING_URI=f"http://127.0.0.1:{free_port()}")
    assert code == 2
    assert "store" in sentence
    assert nothing_done(ground)


def test_ray_address_that_does_not_answer_ends_it_with_4(ground: Ground, run) -> None:
    address = f"127.0.0.1:{free_port()}"
    code, sentence = run("sweep", "run", "sweep.yaml", LORAFLEET_LAUNCHER="ray", LORAFLEET_RAY_ADDRESS=address)
    assert code == 4
    assert f"Ray at {address} does not answer; start it with" in sentence
    assert nothing_done(ground)


@pytest.mark.parametrize("what", ["no server", "no bucket"])
def test_s3_store_that_is_not_there_ends_it_with_4(ground: Ground, run, moto: S3Server, what: str) -> None:
    url = moto.url if what == "no bucket" else f"http://127.0.0.1:{free_port()}"
    store = "s3://no-such-bucket-here/lorafleet"
    code, sentence = run("sweep", "run", "sweep.yaml", LORAFLEET_STORE=store, LORAFLEET_S3_ENDPOINT_URL=url)
    assert code == 4
    assert "no-such-bucket-here" in sentence or url in sentence


def test_store_that_ignores_conditions_ends_it(ground: Ground, run, rclone: S3Server) -> None:
    store = f"s3://{rclone.new_bucket()}/lorafleet"
    code, sentence = run("sweep", "run", "sweep.yaml", LORAFLEET_STORE=store, LORAFLEET_S3_ENDPOINT_URL=rclone.url)
    assert code in (2, 4)
    assert "condition" in sentence


def test_store_without_permission_ends_it(ground: Ground, run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, sentence = run("sweep", "run", "sweep.yaml", LORAFLEET_STORE=str(tmp_path / "file" / "store"))
    assert code in (2, 4)
    assert str(tmp_path / "file") in sentence


def change_data(sweep: dict) -> None:
    Path("train.jsonl").write_text("\n".join(Path("train.jsonl").read_text().splitlines()[:40]) + "\n")


def change_job(sweep: dict) -> None:
    sweep["job"]["training"]["max_steps"] = 4


def change_space(sweep: dict) -> None:
    sweep["space"]["peft.r"]["choices"] = [2, 4]


@pytest.mark.parametrize(
    ("change", "named"),
    [(change_data, "data (train)"), (change_job, "training.max_steps: 2 -> 4"), (change_space, "space (peft.r.choices")],
)
def test_sweep_goes_on_only_with_what_it_was_started_with(ground: Ground, run, change, named: str) -> None:
    sweep = yaml.safe_load(Path("sweep.yaml").read_text())
    sweep["job"]["training"] |= {"max_steps": 2, "eval_steps": 2}
    Path("sweep.yaml").write_text(yaml.safe_dump(sweep))
    assert run("sweep", "run", "sweep.yaml")[0] == 0
    change(sweep)
    Path("sweep.yaml").write_text(yaml.safe_dump(sweep))
    code, sentence = run("sweep", "run", "sweep.yaml")
    assert code == 2
    assert named in sentence
    assert len(ground.trials()) == 1
