"""A real MLflow server on loopback for tests: started once per test process, shared by the modules that import the fixture.

Import `mlflow_server` into a test module and name it as an argument; `MlflowServer` is for tests that stop and start one.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest


class MlflowServer:
    """`mlflow server` over a SQLite file in `folder`, on one port of 127.0.0.1 for its whole life."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Return when the server answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self._folder}/server.db"]
        command += ["--artifacts-destination", str(self._folder / "artifacts")]
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        self._wait_until_it_answers()

    def stop(self) -> None:
        """Kill the server and all its processes."""
        if self._process is not None:
            os.killpg(self._process.pid, 9)
            self._process.wait()
            self._process = None

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            assert self._process is not None
            assert self._process.poll() is None, (self._folder / "server.log").read_text()
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=1):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        raise TimeoutError((self._folder / "server.log").read_text())


_shared: list[MlflowServer] = []


@pytest.fixture(scope="session")
def mlflow_server() -> Iterator[MlflowServer]:
    """A running server; tests share it, so they name their runs and models with their own words."""
    if _shared:  # another module's copy of this fixture started it, and will stop it
        yield _shared[0]
        return
    folder = Path(tempfile.mkdtemp(prefix="mlflow-server-"))
    server = MlflowServer(folder)
    try:
        server.start()
        _shared.append(server)
        yield server
    finally:
        _shared.clear()
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)
