"""What a night is foretold to do and cost."""

from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.nightly.customers import Customer
from pipelines.nightly.forecast import Planned, predict
from pipelines.nightly.planning import Look, Skip, Train
from pipelines.nightly.records import Row, Signature
from tests.pipelines.nightly.fleets import only_customer


@pytest.fixture
def customer(tmp_path: Path) -> Customer:
    """Trains 2 epochs with 4 rows a step."""
    return only_customer(tmp_path)


def files(size: int) -> Signature:
    return Signature((("train.jsonl", size, "stamp"),))


def trained(tenant: str, *, rows: int, size: int, tokens: int, steps: int, seconds: float, cost: float) -> Row:
    told = {"num_rows": rows, "signature": files(size), "num_tokens": tokens, "num_steps": steps}
    return Row(tenant, "support", "promoted", seconds=seconds, cost=cost, **told)  # type: ignore[arg-type]


def test_a_customers_own_past_tells_what_its_grown_data_will_cost(customer: Customer) -> None:
    past = trained("acme", rows=100, size=10_000, tokens=5000, steps=50, seconds=10.0, cost=0.5)
    other = trained("globex", rows=10, size=10_000, tokens=100, steps=1, seconds=9.0, cost=9.0)
    [found] = predict([Planned(customer, Train("recipe", "-"), past, files(20_000))], [past, other]).forecasts
    assert (found.num_rows, found.num_steps, found.num_tokens, found.basis) == (200, 100, 10_000, "own")
    assert (found.seconds, found.cost) == (pytest.approx(20.0), pytest.approx(1.0))


def test_the_fleets_median_stands_in_for_customers_without_a_past(customer: Customer) -> None:
    history = [trained(f"t{n}", rows=100, size=10_000, tokens=100 * n, steps=10, seconds=n, cost=0.1 * n) for n in (1, 2, 3)]
    [found] = predict([Planned(customer, Look("new", "-"), None, files(4_000))], history).forecasts
    assert (found.action, found.num_rows, found.num_steps, found.num_tokens, found.basis) == ("look", 40, 20, 400, "fleet")
    assert found.seconds == pytest.approx(4.0)


def test_what_nobody_ever_trained_is_not_guessed(customer: Customer) -> None:
    outlook = predict([Planned(customer, Look("new", "-"), None, files(4_000))], [])
    assert (outlook.forecasts[0].num_tokens, outlook.forecasts[0].basis) == (None, "none")
    assert outlook.totals["num_unknown"] == 1


def test_the_latest_training_counts(customer: Customer) -> None:
    old = trained("acme", rows=100, size=10_000, tokens=50, steps=50, seconds=1.0, cost=0.0)
    new = replace(old, num_tokens=5000)
    [found] = predict([Planned(customer, Train("gates", "-"), new, files(10_000))], [old, new]).forecasts
    assert found.num_tokens == 5000


def test_totals_count_the_work_and_order_is_that_of_the_night(customer: Customer) -> None:
    past = trained("acme", rows=100, size=10_000, tokens=5000, steps=50, seconds=10.0, cost=0.5)
    urgent = replace(customer, tenant="urgent", priority=90)
    idle = replace(customer, tenant="idle", priority=100)
    planned = [
        Planned(idle, Skip(Row("idle", "support", "skipped", "unchanged")), None, None),
        Planned(customer, Train("deadline", "-"), past, files(10_000)),
        Planned(urgent, Look("data", "-"), past, files(10_000)),
    ]
    outlook = predict(planned, [past])
    assert [one.tenant for one in outlook.forecasts] == ["urgent", "acme", "idle"]
    body = outlook.to_json()
    assert body["totals"]["actions"] == {"train": 1, "look": 1, "skip": 1}
    assert (body["totals"]["num_tokens"], body["totals"]["num_unknown"]) == (10_000, 0)
    assert body["totals"]["accelerator_hours"] == pytest.approx(1.0)
    assert body["customers"][2]["because"] == "unchanged"
