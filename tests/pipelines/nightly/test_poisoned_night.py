"""Customers whose data, settings or names are poison: each is one row, and nobody else notices."""

from pathlib import Path

import pytest

from tests.pipelines.nightly.conftest import CUSTOMERS, Snips
from tests.pipelines.nightly.poison import HOSTILE_NAMES, NAN_SETTINGS, write_base_with_bomb, write_poisoned
from tests.pipelines.nightly.running import Night, Town

HUGE_BYTES = 3 << 20
"""Beyond what a line may have; a real gigabyte is read in test_care.py."""


def begin(folder: Path, base: Path, snips: Snips) -> Town:
    """Return a town of three healthy customers before its first night."""
    folder.mkdir()
    town = Town(folder)
    for tenant in CUSTOMERS:
        town.send(tenant, snips(tenant, 40))
    town.write(base)
    return town


@pytest.mark.timeout(900)
def test_poisoned_customers_are_a_row_each_and_the_others_adapters_are_those_of_a_night_without_them(
    tmp_path: Path, test_data: Path, snips: Snips
) -> None:
    base = tmp_path / "base"
    write_base_with_bomb(test_data / "bases" / "stories260k", base)
    healthy = begin(tmp_path / "healthy", base, snips)
    with healthy.standing():
        expected = healthy.night()
    assert set(expected.ends.values()) == {("promoted", "")}

    town = begin(tmp_path / "town", base, snips)
    lines = [line for line in (tmp_path / "town/data/acme/rows.jsonl").read_text().splitlines() if line]
    kinds = write_poisoned(tmp_path / "town/data", lines, HUGE_BYTES)
    town.send("poison-settings", snips("globex", 40))
    town.set_fleet(customers=[{"tenant": "poison-settings", "set": dict(NAN_SETTINGS)}])
    with town.standing():
        night = town.night()
    assert night.rows.keys() == {*CUSTOMERS, *kinds, "poison-settings"}
    assert {tenant: night.adapters[tenant] for tenant in CUSTOMERS} == expected.adapters
    assert night.ends["poison-settings"] == ("failed", "non_finite")
    for name, kind in kinds.items():
        _assert_ended_as_poison(night, name, kind.reason, kind.num_bad)
    assert night.outcome.exit_code == 1


def _assert_ended_as_poison(night: Night, name: str, reason: str, num_bad: int | None) -> None:
    row = night[name]
    if name == "poison-no-file":
        assert (row.status, row.reason) == ("failed", "no_data")
    elif reason:
        assert (row.status, row.reason) == ("held", reason), name
    else:
        assert row.adapter_id is not None, (name, row.sentence)
    assert num_bad is None or row.care.num_quarantined == num_bad, name


def test_hostile_names_are_a_row_each_and_reach_no_key(town: Town, snips: Snips) -> None:
    names = [name for name in HOSTILE_NAMES if "/" not in name and name != ".."]
    for name in names:
        town.send(name, snips("acme", 40))
    before = town.listing()
    night = town.night()
    assert night.outcome.report is not None
    refused = [row for row in night.outcome.report.rows if row.status == "failed"]
    assert len(refused) == len(names)
    assert {row.reason for row in refused} == {"bad_customer"}
    assert all("exclude" in (row.next_step or "") for row in refused)
    assert all(row.tenant.isprintable() and row.sentence.isprintable() for row in refused)
    assert {night.ends[tenant] for tenant in CUSTOMERS} == {("skipped", "unchanged")}
    assert night.outcome.exit_code == 1
    new = set(town.listing()) - set(before)
    assert all(key.startswith("fleets/town/nights/") for key in new)
    assert not any("rows/" in key for key in new if not key.endswith(tuple(f"{tenant}.calls.json" for tenant in CUSTOMERS)))


def test_hostile_names_of_a_table_are_a_row_each(town: Town, snips: Snips) -> None:
    (town.folder / "more.csv").write_text(
        "tenant,data\n..,data/acme\n/etc/passwd,data/acme\n<script>alert(1)</script>,data/acme\n"
    )
    town.set_fleet(customers=[{"csv": "more.csv"}])
    night = town.night()
    assert sorted(night.ends.values()) == [("failed", "bad_customer")] * 3 + [("skipped", "unchanged")] * 3
    page = town.folder / ".lorafleet" / "nights" / "town" / f"{night.name}.html"
    assert "<script>alert" not in page.read_text()


def test_customer_whose_files_are_gone_fails_alone_and_is_tried_again_when_they_are_back(town: Town, snips: Snips) -> None:
    path = town.folder / "data" / "acme" / "rows.jsonl"
    path.unlink()
    night = town.night()
    assert night.ends["acme"] == ("failed", "no_data")
    assert night["acme"].next_step
    town.send("acme", snips("acme", 60))
    assert town.night().ends["acme"] == ("promoted", "")
    assert len(town.journal("acme")) == 2


def test_customer_whose_base_cannot_be_read_fails_alone(town: Town, snips: Snips) -> None:
    town.set_fleet(customers=[{"tenant": "acme", "set": {"base_model.name_or_path": "./nowhere"}}])
    night = town.night()
    assert night.ends["acme"] == ("failed", "bad_base")
    assert "nowhere" in night["acme"].sentence
    assert night.ends["globex"] == ("skipped", "unchanged")
