"""Names and deadlines of nights, also where clocks change."""

from datetime import datetime
from zoneinfo import ZoneInfo

import pytest

from infra.errors import BadInput
from pipelines.nightly.calendar import deadline_of, night_name
from pipelines.nightly.spec import LimitsSpec

BERLIN = "Europe/Berlin"


def limits(deadline: str | None, zone: str = BERLIN) -> LimitsSpec:
    return LimitsSpec(deadline=deadline, timezone=zone)


def seconds(text: str, zone: str = BERLIN, fold: int = 0) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone), fold=fold).timestamp()


@pytest.mark.parametrize(
    ("now", "name"),
    [
        ("2026-11-22 22:00", "2026-11-23"),
        ("2026-11-23 00:30", "2026-11-23"),
        ("2026-11-23 05:59:59", "2026-11-23"),
        ("2026-11-23 06:00", "2026-11-24"),
        ("2026-12-31 23:00", "2027-01-01"),
    ],
)
def test_a_night_is_named_by_the_date_of_its_next_deadline(now: str, name: str) -> None:
    assert night_name(seconds(now), limits("06:00")) == name


def test_without_a_deadline_a_night_is_named_by_the_date_where_the_fleet_is() -> None:
    late = seconds("2026-11-22 23:30", "America/New_York")
    assert night_name(late, limits(None, "America/New_York")) == "2026-11-22"
    assert night_name(late, limits(None, "UTC")) == "2026-11-23"
    assert deadline_of("2026-11-22", limits(None)) is None


def test_a_night_before_clocks_go_forward_ends_by_the_new_clock() -> None:
    assert deadline_of("2026-03-29", limits("06:00")) == seconds("2026-03-29 06:00")
    whole = seconds("2026-03-29 06:00") - seconds("2026-03-28 06:00")
    assert whole == 23 * 3600


def test_a_deadline_that_clocks_jump_over_is_an_hour_later_by_the_clock() -> None:
    skipped = deadline_of("2026-03-29", limits("02:30"))
    assert skipped == seconds("2026-03-29 03:30")
    assert night_name(seconds("2026-03-29 03:20"), limits("02:30")) == "2026-03-29"
    assert night_name(seconds("2026-03-29 03:30"), limits("02:30")) == "2026-03-30"


def test_of_a_deadline_that_comes_twice_the_first_counts() -> None:
    first, second = seconds("2026-10-25 02:30"), seconds("2026-10-25 02:30", fold=1)
    assert second - first == 3600
    assert deadline_of("2026-10-25", limits("02:30")) == first
    assert night_name(first - 1, limits("02:30")) == "2026-10-25"
    assert night_name(second, limits("02:30")) == "2026-10-26"


@pytest.mark.parametrize("day", ["2026-03-28", "2026-03-29", "2026-10-24", "2026-10-25"])
@pytest.mark.parametrize("deadline", ["00:00", "02:30", "06:00", "23:59"])
@pytest.mark.parametrize("zone", [BERLIN, "America/New_York", "Australia/Lord_Howe", "Pacific/Apia"])
def test_every_moment_belongs_to_the_night_whose_deadline_comes_next(day: str, deadline: str, zone: str) -> None:
    rules = limits(deadline, zone)
    start = seconds(f"{day} 00:00", zone)
    for minute in range(0, 3 * 24 * 60, 17):
        now = start + 60 * minute
        name = night_name(now, rules)
        ends = deadline_of(name, rules)
        assert ends is not None
        assert 0 < ends - now <= 25 * 3600
        assert night_name(ends - 1, rules) == name
        assert night_name(ends, rules) > name


def test_a_further_night_of_a_date_has_the_same_deadline() -> None:
    rules = limits("06:00")
    assert deadline_of("2026-11-23-2", rules) == deadline_of("2026-11-23", rules)


@pytest.mark.parametrize("name", ["yesterday", "2026-13-01", "2026-02-30", ""])
def test_what_is_no_nights_name_is_refused(name: str) -> None:
    with pytest.raises(BadInput, match="is no night"):
        deadline_of(name, limits("06:00"))
