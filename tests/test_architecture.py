"""The two rules that carry the house: imports point down only, and one vendor has one place."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
LEVELS = ("infra", "workers", "sweeps", "pipelines")  # from the ground up

COMPUTING = (
    "workers/engine/",
    "workers/methods/",
    "workers/data/",
    "workers/adapter",
    "workers/audit",
    "workers/bases",
    "workers/checkpoint",
    "workers/evaluate",
    "workers/export",
    "workers/fitting",
    "workers/hardware",
    "workers/host",
    "workers/identity",
    "workers/loading",
    "workers/memory",
    "workers/merge_report",
    "workers/merging",
    "workers/pretraining",
    "workers/served",
    "workers/sharded",
)
"""Modules that may load torch and its kin."""

PLACES = {
    "ray": ("infra/ray_",),
    "grpc": ("infra/ray_",),
    "boto3": ("infra/s3",),
    "botocore": ("infra/s3",),
    "mlflow": ("infra/mlflow_",),
    "sqlalchemy": ("infra/mlflow_",),
    "optuna": ("sweeps/",),
    "model_signing": ("pipelines/signing",),
    "apprise": ("pipelines/nightly/notify",),
    "typer": ("pipelines/",),
    "rich": ("pipelines/",),
    "torch": COMPUTING,
    "transformers": COMPUTING,
    "peft": COMPUTING,
    "tokenizers": COMPUTING,
    "safetensors": COMPUTING,
    "bitsandbytes": COMPUTING,
    "deepspeed": COMPUTING,
    "accelerate": COMPUTING,
}
"""Where each vendor may be imported: paths that start so."""

HEAVY = ("torch", "transformers", "peft", "ray", "mlflow", "optuna", "boto3", "deepspeed", "bitsandbytes", "apprise")

MOST_LINES_OF_A_FUNCTION = 60
MOST_LINES_OF_A_MODULE = 500


@dataclass(frozen=True)
class Import:
    path: str
    line: int
    name: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line} imports {self.name}"


def modules() -> list[Path]:
    return sorted(path for level in LEVELS for path in (REPOSITORY / level).rglob("*.py"))


def imports_in(source: str, path: str) -> Iterator[Import]:
    """Yield every import of a module, wherever it stands in it."""
    package = path.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (Import(path, node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            yield Import(path, node.lineno, ".".join([*above, *([node.module] if node.module else [])]))


def all_imports() -> list[Import]:
    found = ((path.read_text(), path.relative_to(REPOSITORY).as_posix()) for path in modules())
    return [one for source, path in found for one in imports_in(source, path)]


def points_up(one: Import) -> bool:
    here, there = one.path.partition("/")[0], one.name.partition(".")[0]
    return there in LEVELS and LEVELS.index(there) > LEVELS.index(here)


def is_misplaced(one: Import) -> bool:
    places = PLACES.get(one.name.partition(".")[0])
    return places is not None and not one.path.startswith(places)


def test_imports_point_down_only() -> None:
    assert [str(one) for one in all_imports() if points_up(one)] == []


def test_a_vendor_is_imported_in_its_place_only() -> None:
    assert [str(one) for one in all_imports() if is_misplaced(one)] == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("infra/x.py", "import workers.spec"),
        ("workers/engine/x.py", "def f():\n    from pipelines import cli"),
        ("infra/x.py", "from . import y\nfrom sweeps.spec import SweepSpec"),
        ("workers/x.py", "from ray import remote"),
        ("pipelines/x.py", "if True:\n    import torch.nn"),
        ("workers/spec.py", "from transformers import AutoConfig"),
    ],
)
def test_the_rules_see_a_breach_wherever_it_stands(path: str, source: str) -> None:
    assert any(points_up(one) or is_misplaced(one) for one in imports_in(source, path))


def test_the_engine_is_plain_pytorch() -> None:
    allowed = {"infra.errors", "infra.fingerprint", "infra.strict"}
    engine = [one for one in all_imports() if one.path.startswith("workers/engine/")]
    assert engine
    assert [str(one) for one in engine if one.name.startswith("infra") and one.name not in allowed] == []


def loaded_by(code: str) -> set[str]:
    """Run `code` in a fresh process and return the heavy packages it has loaded."""
    tell = f"import json, sys\nprint(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{tell}"], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_help_and_the_specs_load_nothing_heavy() -> None:
    ask_for_help = "import pipelines.cli\npipelines.cli._run(['--help'])"
    specs = "import workers.spec, sweeps.spec, infra.settings, infra.services"
    assert loaded_by(f"{ask_for_help}\n{specs}") == set()


def test_what_a_night_would_do_is_told_without_anything_heavy() -> None:
    assert loaded_by("import pipelines.nightly.looking, workers.resolve") == set()


def test_what_is_loaded_is_seen() -> None:
    assert loaded_by("import optuna") >= {"optuna"}


def test_functions_and_modules_stay_readable() -> None:
    too_long = []
    for path in modules():
        source, name = path.read_text(), path.relative_to(REPOSITORY).as_posix()
        if source.count("\n") > MOST_LINES_OF_A_MODULE:
            too_long.append(f"{name} has {source.count(chr(10))} lines")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                length = node.end_lineno - node.lineno + 1
                if length > MOST_LINES_OF_A_FUNCTION:
                    too_long.append(f"{name}:{node.lineno} {node.name} has {length} lines")
    assert too_long == []
