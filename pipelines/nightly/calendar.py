"""When nights are: their names and deadlines, in the fleet's time zone and right where clocks change.

A night is named by the date of its deadline, so that whoever starts it, before or after midnight, means the same one. Where
clocks go forward over a deadline, it is as much later by the clock; where they go back over it, the first of the two counts.
"""

from datetime import UTC, date, datetime, time, timedelta
from zoneinfo import ZoneInfo

from infra.errors import BadInput
from pipelines.nightly.spec import LimitsSpec

_DATE_LENGTH = len("2026-11-23")


def night_name(now: float, limits: LimitsSpec) -> str:
    """Return the name of the night that `now` (seconds since the epoch) belongs to: the date of the next deadline after it.

    Without a deadline it is the date there and now.
    """
    zone = ZoneInfo(limits.timezone)
    today = datetime.fromtimestamp(now, zone).date()
    if limits.deadline is None:
        return today.isoformat()
    # A deadline that clocks move may belong to the day before or fall after midnight of the next.
    days = (today + timedelta(days) for days in (-1, 0, 1, 2))
    return next(day for day in days if _epoch_seconds(day, limits.deadline, zone) > now).isoformat()


def deadline_of(name: str, limits: LimitsSpec) -> float | None:
    """Return the deadline of the night `name`, in seconds since the epoch; None if there is none.

    A further night of the same date ("2026-11-23-2") has the same one. Raises BadInput for what is no night's name.
    """
    day = date_of(name)
    return None if limits.deadline is None else _epoch_seconds(day, limits.deadline, ZoneInfo(limits.timezone))


def date_of(name: str) -> date:
    """Return the date in a night's name. Raises BadInput if it has none."""
    try:
        return datetime.strptime(name[:_DATE_LENGTH], "%Y-%m-%d").date()
    except ValueError:
        raise BadInput(f"{name[:80]!r} is no night; nights are named by their date, such as 2026-11-23.") from None


def _epoch_seconds(day: date, deadline: str, zone: ZoneInfo) -> float:
    hours, minutes = map(int, deadline.split(":"))
    return datetime.combine(day, time(hours, minutes), zone).astimezone(UTC).timestamp()
