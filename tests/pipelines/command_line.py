"""The command line as a person has it, in a folder of its own, run in this process."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from infra.local_storage import LocalStorage
from pipelines.cli import _run


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def sentence(self) -> str:
        """The one line on stderr that says what was wrong; there may be no other, nor a traceback."""
        assert "Traceback" not in self.err
        lines = [line for line in self.err.splitlines() if not line.startswith("home ")]
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: ")
        return lines[0]


@dataclass(frozen=True)
class CommandLine:
    """Runs commands in one installation."""

    folder: Path
    capsys: pytest.CaptureFixture[str]

    @property
    def home(self) -> Path:
        return self.folder / ".lorafleet"

    @property
    def store(self) -> LocalStorage:
        return LocalStorage(self.home / "store")

    def __call__(self, *arguments: str | Path) -> Ended:
        self.capsys.readouterr()
        code = _run([str(argument) for argument in arguments])
        captured = self.capsys.readouterr()
        return Ended(code, captured.out, captured.err)

    def listing(self) -> dict[str, str]:
        """Key -> etag of everything in the store."""
        return {info.key: info.etag for info in self.store.list("")}


@contextmanager
def installation(folder: Path) -> Iterator[None]:
    """Stand in `folder` with nothing of the person's own settings in the way; hosts run in this process."""
    root = logging.getLogger()
    before = list(root.handlers)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("LORAFLEET_HOME", str(folder / ".lorafleet"))
        patch.setenv("LORAFLEET_LAUNCHER", "in-process")
        patch.setenv("LORAFLEET_LEASE_SECONDS", "3")
        patch.setenv("COLUMNS", "80")
        yield
    for handler in [handler for handler in root.handlers if handler not in before]:
        root.removeHandler(handler)
        handler.close()
    logging.captureWarnings(False)
