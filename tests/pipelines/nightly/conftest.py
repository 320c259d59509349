"""A town of three customers after its first night, from which tests go on."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.pipelines.nightly.running import Town

Snips = Callable[..., list[dict[str, Any]]]
CUSTOMERS = {"acme": "get-weather", "globex": "play-music", "initech": "rate-book"}


@pytest.fixture(scope="session")
def snips(test_data: Path) -> Snips:
    """Gives rows of a customer of SNIPS, those from `start` up to `end`."""

    def rows(tenant: str, end: int, start: int = 0) -> list[dict[str, Any]]:
        path = test_data / "sets" / "snips" / "customers" / CUSTOMERS[tenant] / "train.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()[start:end]]

    return rows


@pytest.fixture(scope="session")
def first_night(tmp_path_factory: pytest.TempPathFactory, test_data: Path, snips: Snips) -> Town:
    """Three customers of 40 rows each, whose first champions were promoted in one night; tests change copies of it."""
    town = Town(tmp_path_factory.mktemp("town"))
    for tenant in CUSTOMERS:
        town.send(tenant, snips(tenant, 40))
    town.write(test_data / "bases" / "stories260k")
    with town.standing():
        night = town.night()
    assert set(night.ends.values()) == {("promoted", "")}, night.ends
    assert night.outcome.notes == (), "MLflow shows all of it"
    return town


@pytest.fixture
def town(first_night: Town, tmp_path: Path) -> Iterator[Town]:
    """A town that has had its first night."""
    town = first_night.copy(tmp_path)
    with town.standing():
        yield town
