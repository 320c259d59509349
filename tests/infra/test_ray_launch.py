"""What Ray adds: processes with an environment of their own, which die alone and with their driver."""

import importlib.metadata
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray

from infra.errors import BadInput, ServiceUnavailable
from infra.launch import Handle, Resources
from infra.ray_cluster import connect
from infra.ray_launch import RayLauncher
from tests.contracts.test_launcher import PATIENCE_SECONDS, SMALL, end_of, receive, wait_for
from tests.infra import launched

TOKEN = "0123456789abcdef" * 4

DRIVER = """
import sys
from infra.launch import Resources
from infra.ray_launch import RayLauncher
from tests.infra import launched

launcher = RayLauncher(sys.argv[1] if len(sys.argv) > 1 else None, num_cpus=1)
handle = launcher.launch(launched.spin, "spin", Resources())
handle.channel.receive(60.0)
print(handle.place.pid, flush=True)
sys.stdin.readline()
print(handle.poll(), flush=True)
launcher.close()
"""


TWICE = """
import os
from infra.errors import ServiceUnavailable
from infra.ray_launch import RayLauncher

for _ in range(2):
    RayLauncher(num_cpus=1).close()
    os.environ.pop("RAY_AUTH_TOKEN", None)
    try:
        RayLauncher("127.0.0.1:9")  # nobody is there, and the person's own token has been read
    except ServiceUnavailable:
        pass
"""


@pytest.fixture(scope="module")
def launcher() -> Iterator[RayLauncher]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_REGION_OF_THIS_TEST", "nowhere-1")
        launcher = RayLauncher(num_cpus=2)
    yield launcher
    launcher.close()


def pid_of(handle: Handle) -> int:
    wait_for(lambda: handle.place)
    assert handle.place is not None
    return handle.place.pid


def test_a_task_finds_its_environment_before_it_loads_torch(launcher: RayLauncher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAFLEET_CRASHPOINT", "nowhere:1")
    handle = launcher.launch(launched.tell_environment, "environment", Resources(num_cpus=0.5, num_threads=2))
    (told,) = receive(handle, 1)
    assert isinstance(told, dict)
    assert not told["loaded"]
    assert told["threads"] == 2
    expected = {
        "OMP_NUM_THREADS": "2",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "LORAFLEET_CRASHPOINT": "nowhere:1",  # set after Ray had started
        "AWS_REGION_OF_THIS_TEST": "nowhere-1",  # inherited by a Ray that was started here
    }
    assert {name: told["environment"].get(name) for name in expected} == expected


def test_a_killed_process_is_lost_and_its_neighbour_is_not(launcher: RayLauncher, capfd: pytest.CaptureFixture[str]) -> None:
    victim, neighbour = (launcher.launch(launched.echo, name, SMALL) for name in ("victim", "neighbour"))
    os.kill(pid_of(victim), signal.SIGKILL)
    ended = end_of(victim)
    assert (ended.kind, ended.reason) == ("lost", "The process of task victim is gone.")
    assert victim.channel.closed
    neighbour.channel.send("hello")
    assert receive(neighbour, 1) == ["hello"]
    neighbour.kill()
    assert capfd.readouterr() == ("", "")


def test_a_task_that_never_listens_can_be_killed(launcher: RayLauncher) -> None:
    handle = launcher.launch(launched.spin, "spin", SMALL)
    assert receive(handle, 1) == ["spinning"]
    handle.kill()
    wait_for(lambda: not psutil.pid_exists(pid_of(handle)))
    assert end_of(handle).kind == "lost"


def test_a_node_with_another_version_is_refused(launcher: RayLauncher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "99.0")
    ended = end_of(launcher.launch(launched.echo, "other version", SMALL))
    assert ended.kind == "raised"
    assert "the driver has 99.0; install the same on all nodes" in ended.reason


def test_ray_started_here_listens_on_loopback_only(launcher: RayLauncher) -> None:
    running = launcher.launch(launched.echo, "listening", SMALL)
    pid_of(running)
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    listening = [
        connection.laddr.ip.removeprefix("::ffff:")
        for process in processes
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    running.kill()
    assert len(listening) > 3
    assert {ip for ip in listening if not ip.startswith("127.") and ip != "::1"} == set()


@pytest.mark.parametrize("address", ["auto", "ray://127.0.0.1:10001", "127.0.0.1", "host:port"])
def test_an_address_without_host_and_port_is_bad_input(address: str) -> None:
    with pytest.raises(BadInput, match="host:port"):
        connect(address)


@pytest.mark.parametrize("listening", [False, True], ids=["nothing listens", "what listens is no Ray"])
def test_an_address_that_does_not_answer_is_told_in_one_sentence(listening: bool) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if listening:
            server.listen()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ServiceUnavailable, match=f"Ray at {address} does not answer; start it with .*unset ray_address"):
            connect(address)


def start_driver(*arguments: str, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
        cwd=Path(__file__).resolve().parents[2],
        start_new_session=True,
    )


def first_line(driver: "subprocess.Popen[str]") -> str:
    assert driver.stdout is not None
    return driver.stdout.readline()


def test_tasks_survive_ctrl_c_and_die_with_a_killed_driver(tmp_path: Path) -> None:
    # Ctrl-C goes to the whole process group: hosts must live on, so that they can be asked for a checkpoint.
    driver = start_driver(HOME=str(tmp_path))
    pid = int(first_line(driver))
    task, ray_processes = psutil.Process(pid), psutil.Process(driver.pid).children()
    for process in [task, *ray_processes]:
        process.send_signal(signal.SIGINT)
    with pytest.raises(psutil.TimeoutExpired):
        task.wait(timeout=0.5)
    driver.kill()
    driver.communicate()
    _, alive = psutil.wait_procs([task, *ray_processes], timeout=PATIENCE_SECONDS)
    assert alive == []
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def external_cluster() -> Iterator[str]:
    """A Ray cluster that is not ours, on loopback and behind a token."""
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--head", f"--port={port}", "--num-cpus=1", "--include-dashboard=false", "--object-store-memory=100000000"]
    ports = ["--min-worker-port=0", "--max-worker-port=0", "--block"]
    with subprocess.Popen(
        [Path(sys.executable).with_name("ray"), "start", *options, *ports],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as head:
        wait_for(lambda: _listens(port))
        children = psutil.Process(head.pid).children(recursive=True)
        yield f"127.0.0.1:{port}"
        head.terminate()
        head.wait(PATIENCE_SECONDS)
        for process in psutil.wait_procs(children, timeout=10.0)[1]:
            process.kill()


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def test_a_driver_uses_an_external_cluster_with_its_token_only(external_cluster: str) -> None:
    driver = start_driver(external_cluster, RAY_AUTH_TOKEN=TOKEN)
    os.kill(int(first_line(driver)), signal.SIGKILL)
    stranger = start_driver(external_cluster, RAY_AUTH_TOKEN="f" * 64)
    assert f"Ray at {external_cluster} does not accept this machine's token" in stranger.communicate()[1]
    out, errors = driver.communicate("go on\n")
    assert "kind='lost'" in out
    assert (driver.returncode, errors) == (0, "")


def test_ray_starts_again_although_the_environment_was_put_back_and_another_token_was_read(tmp_path: Path) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(TOKEN)
    kept = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_TOKEN"} | {"HOME": str(tmp_path)}
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", TWICE], env=kept, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_connection_of_this_process_is_left_standing_by_a_second_launcher(launcher: RayLauncher) -> None:
    RayLauncher().close()
    assert ray.is_initialized()
