"""`lorafleet doctor`: is everything there that lorafleet needs, and if not, what to do about it.

Looks only: what is made on first use (home, embedded MLflow, a local store) is not made here, and an embedded Ray is not started.
"""

import importlib
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from infra.errors import LorafleetError, ServiceUnavailable
from infra.launch import Resources
from infra.services import Services
from infra.tracking import refuse_server_with_local_store

MIN_FREE_BYTES = 1 << 30
"""Free disk under which a sweep of small adapters is likely to fill it."""
COLUMNS = ("", "what", "found", "way out")
LATER = "not there yet; made when first used"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    ok: bool
    found: str
    way_out: str = ""
    is_service: bool = False
    """Whether it is a service that others run: a problem with it is exit code 4."""


def examine(services: Services) -> list[Check]:
    """Look at everything, whatever was found before."""
    return [*_packages(), *_home(services.settings.home), _store(services), _mlflow(services), _ray(services), _hardware()]


def exit_code(checks: list[Check]) -> int:
    """Return 0 if all is well, 4 if a service is not reachable, else 1."""
    problems = [check for check in checks if not check.ok]
    return max((4 if check.is_service else 1 for check in problems), default=0)


def to_json(checks: list[Check]) -> list[dict[str, Any]]:
    """Return checks as JSON data."""
    return [{key: value for key, value in asdict(check).items() if key != "is_service"} for check in checks]


def rows_of(checks: list[Check]) -> list[list[str]]:
    """Return checks as rows of a table with the columns of COLUMNS."""
    return [["ok" if check.ok else "PROBLEM", check.name, check.found, check.way_out] for check in checks]


def _packages() -> Iterator[Check]:
    yield Check("python", True, platform.python_version())
    for text in requires("lorafleet") or []:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield _package(requirement)


def _package(requirement: Requirement) -> Check:
    way_out = f"pip install '{requirement}'"
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return Check(requirement.name, False, "not installed", way_out)
    fits = requirement.specifier.contains(found, prereleases=True)
    return Check(requirement.name, True, found) if fits else Check(requirement.name, False, f"{found}, too old", way_out)


def _home(home: Path) -> Iterator[Check]:
    there = next(folder for folder in (home, *home.parents) if folder.exists())
    where = str(home) if there == home else f"{home} ({LATER})"
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        fault = "is no folder" if not there.is_dir() else "may not be written to"
        yield Check("home", False, f"{there} {fault}", "set LORAFLEET_HOME to a folder you may write to")
        return
    yield Check("home", True, where)
    free = shutil.disk_usage(there).free
    enough = free >= MIN_FREE_BYTES
    found = f"{free / 2**30:.1f} GiB free"
    yield Check("disk", enough, found, "" if enough else "free some, or set LORAFLEET_HOME to another disk")


def _store(services: Services) -> Check:
    uri = services.settings.store
    if "://" not in uri and not Path(uri).exists():
        return Check("store", True, f"{uri} ({LATER})")

    def probe() -> None:
        importlib.import_module("infra.stores").probe(services.store)

    return _service("store", f"{services.settings.public()['store']}, keeps its conditions", probe)


def _mlflow(services: Services) -> Check:
    settings = services.settings
    uri = str(settings.public()["tracking_uri"])
    file = settings.tracking_uri.removeprefix("sqlite:///")
    if file != settings.tracking_uri and not Path(file).exists():
        return Check("MLflow", True, f"{uri} ({LATER})")

    def answer() -> None:
        refuse_server_with_local_store(settings.tracking_uri, settings.store)
        services.tracker().check()

    return _service("MLflow", f"{uri}, answers", answer)


def _ray(services: Services) -> Check:
    settings = services.settings
    if settings.launcher != "ray":
        return Check("Ray", True, f"not used (launcher = '{settings.launcher}')")
    if find_spec("ray") is None:
        return Check("Ray", False, "not installed", "pip install 'ray[default]'")
    if settings.ray_address is None:
        return Check("Ray", True, "started on this machine when needed")

    def connect() -> None:
        launcher = services.launcher()
        try:
            launcher.capacity(Resources())
        finally:
            launcher.close()

    return _service("Ray", f"{settings.ray_address}, answers", connect)


def _service(name: str, found: str, use: Callable[[], None]) -> Check:
    """Use a service; what goes wrong is told in its own words, which hold the way out."""
    try:
        use()
    except LorafleetError as error:
        fault, _, way_out = str(error).partition("; ")
        return Check(name, False, fault, way_out, is_service=isinstance(error, ServiceUnavailable))
    return Check(name, True, found, is_service=True)


def _hardware() -> Check:
    """Return what torch sees. A host uses as many threads as its job asks for, so their number is no problem."""
    try:
        hardware = importlib.import_module("workers.hardware").look()
    except (ImportError, OSError) as error:
        fault = f"cannot be loaded ({str(error).splitlines()[0][:200]})"
        return Check("torch", False, fault, "pip install --force-reinstall torch")
    accelerators = ", ".join(hardware.accelerators) or "no GPU: trains on the CPU"
    return Check("hardware", True, f"{hardware.num_cpus} CPUs, {hardware.num_threads} torch threads, {accelerators}")
