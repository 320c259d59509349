"""The demo's base model: made once by this project's own code, then found again.

Training runs in a process of its own with one compute thread: the caller loads no torch, and one thread is steady where two
would wait for each other whenever something else takes a core.
"""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from infra.errors import WorkFailed
from pipelines.demo_text import pretraining_texts, write_jsonl
from workers.pretraining_recipe import PretrainingRecipe

DEMO_BASE_NAME = "demo-base-v1"
"""Folder of the demo's base. The number counts up whenever recipe or texts change, so that no old base stands for a new one."""

BASE_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
"""What a base folder holds at least."""

_TEXTS_SEED = 0
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def ensure_demo_base(
    folder: Path, progress: Callable[[str], None], recipe: PretrainingRecipe = PretrainingRecipe(), name: str = DEMO_BASE_NAME
) -> Path:
    """Return `folder`/`name` with the demo's base in it; build it if it is not there (about a minute).

    `progress` receives a line now and then. The folder appears whole or not at all; of several callers one builds and the
    others wait for it. A recipe other than the default needs a name of its own. Raises WorkFailed if the training process fails.
    """
    base = folder / name
    if not _is_complete(base):
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder / f".{name}.lock") as lock:
            if not _is_complete(base):
                _build(base, folder / f".{name}.partial", recipe, progress, lock)
    return base


def _is_complete(base: Path) -> bool:
    return all((base / file).is_file() for file in BASE_FILES)


@contextmanager
def _lock(path: Path) -> Iterator[int]:
    """Hold the lock on `path`; yields its file descriptor."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def _build(base: Path, partial: Path, recipe: PretrainingRecipe, progress: Callable[[str], None], lock: int) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    progress(f"making the demo's base model in {base} (about a minute, once)")
    recipe_file, texts_file, made = partial / "recipe.json", partial / "texts.jsonl", partial / "base"
    recipe_file.write_text(json.dumps(asdict(recipe)))
    write_jsonl(texts_file, list(pretraining_texts(_TEXTS_SEED, recipe.num_texts)))
    _train([str(recipe_file), str(texts_file), str(made)], partial / "errors.log", progress, lock)
    shutil.rmtree(base, ignore_errors=True)
    made.rename(base)
    shutil.rmtree(partial)


def _train(arguments: list[str], errors: Path, progress: Callable[[str], None], lock: int) -> None:
    """Run the training process. It shares the lock: should this process be killed, the next caller waits until both are gone."""
    command = [sys.executable, "-m", "workers.pretraining", *arguments]
    environment = os.environ | _ENVIRONMENT
    with errors.open("w") as log:
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True, pass_fds=[lock]
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                progress(line.rstrip())
    if process.returncode != 0:
        last = (errors.read_text().strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        raise WorkFailed(
            f"The demo's base model could not be made ({last}); details are in {errors}, run the same command again."
        )
