"""Nights as values, for tests of what is told of them: every status, words of hostile customers, as many as asked."""

import math
import random
from dataclasses import replace

from pipelines.nightly.records import Care, NightReport, NightSummary, Row, Signature

HOSTILE = "</script><img src=x onerror=\"document.title='stolen'\"> \ud800 \x1b[31m \u202e & 'quoted' {{ 7 * 7 }}"
REFUSED = {"gate": "better_than_champion", "passed": False, "sentence": "eval/loss better by -0.1, asked is more than 0.005"}
STARTED = 1_795_456_800.0
"""2026-11-23 in the evening, UTC."""


def row(tenant: str, status: str, **values: object) -> Row:
    """Return a customer's row."""
    return Row(tenant=tenant, task="support", status=status, **values)  # type: ignore[arg-type]


def failed(tenant: str, **values: object) -> Row:
    """Return the row of a customer whose training failed."""
    told = {"sentence": "The loss was NaN at step 12.", "next_step": "Look at its rows."}
    return row(tenant, "failed", reason="non_finite", **told | values)


def promoted(tenant: str, *, challenger: float, champion: float | None, **values: object) -> Row:
    """Return the row of a customer whose adapter was better."""
    measured = {"challenger": challenger, "champion": champion, "base": 5.5, "generation": 4, "num_rows": 200}
    verdict = {"gate": "better_than_champion", "passed": True, "sentence": "eval/loss better by 0.2, asked is more than 0.005"}
    spent = {"seconds": 12.5, "num_steps": 75, "num_tokens": 60_000, "cost": 0.0035}
    return row(tenant, "promoted", verdicts=(verdict,), adapter_id="a" * 32, **measured | spent | values)


def a_night() -> NightReport:
    """Return a night with a customer of each status, and nights before it."""
    bad = Care(
        num_read=90, num_quarantined=3, quarantine=(("train.jsonl:7", f"not JSON: {HOSTILE}"), ("train.jsonl:9", "no answer"))
    )
    lost = {"sentence": "12 rows, 97 % fewer than the 400 of last time.", "next_step": "Look at its export."}
    carried = {"challenger": 1.0, "champion": 1.5, "num_tokens": 77, "cost": 9.0, "seconds": 99.0, "generation": 7}
    spent = {"num_rows": 150, "seconds": 9.0, "num_tokens": 9_000, "cost": 0.002, "verdicts": (REFUSED,)}
    grown = Care(num_read=220, num_new=25, num_deleted=2, drift=0.12)
    rows = (
        promoted("acme", challenger=1.2, champion=1.4, care=grown, is_canary=True),
        promoted("globex", challenger=2.0, champion=None, seconds=30.0),
        row("initech", "rejected", reason="better_than_champion", challenger=1.9, champion=1.8, base=5.1, **spent),
        row("umbrella", "held", reason="collapsed", care=Care(num_read=12, drift=0.6), **lost),
        failed("evil", care=bad, challenger=math.nan, sentence=f"The loss was NaN after {HOSTILE}"),
        row("hooli", "skipped", reason="unchanged", num_rows=300, signature=Signature((("a.jsonl", 5, "x"),)), **carried),
        row("pied-piper", "skipped", reason="too_few_new_rows", care=Care(num_new=3), num_rows=80),
    )
    return NightReport(
        fleet="prod",
        night="2026-11-24",
        timezone="Europe/Berlin",
        started=STARTED,
        ended=STARTED + 5430,
        is_finished=True,
        rows=rows,
        remarks=("MLflow did not answer from 01:10 to 01:25.",),
        trend=tuple(earlier(number) for number in range(1, 8)),
    )


def earlier(number: int) -> NightSummary:
    """Return one of the nights before."""
    counts = {"promoted": number, "trained": 0, "rejected": 1, "held": 0, "failed": number % 2, "skipped": 5}
    gain = None if number == 3 else 0.05 * number
    return NightSummary(
        f"2026-11-{16 + number}", STARTED - 86_400 * (8 - number), 4000.0 + 100 * number, counts, 50_000, 0.4, gain
    )


def large_night(num_customers: int) -> NightReport:
    """Return a night of so many customers, most of them unchanged."""
    draw = random.Random(0)
    return replace(a_night(), rows=tuple(_one_of_many(draw, number) for number in range(num_customers)))


def _one_of_many(draw: random.Random, number: int) -> Row:
    tenant, chance, champion = f"customer-{number:05d}", draw.random(), 1.0 + draw.random()
    if chance < 0.85:
        return row(tenant, "skipped", reason="unchanged", num_rows=draw.randrange(100, 300), generation=draw.randrange(9))
    if chance < 0.97:
        care = Care(num_read=220, num_new=draw.randrange(20, 60), drift=draw.random() / 3)
        gain = draw.gauss(0.15, 0.1)
        made = promoted(tenant, challenger=champion - gain, champion=champion, care=care, seconds=draw.gauss(14, 2))
        return made if gain > 0 else replace(made, status="rejected", reason="better_than_champion", verdicts=(REFUSED,))
    if chance < 0.99:
        return row(tenant, "held", reason="collapsed", sentence="Its rows dropped by 95 %.", next_step="Look at its export.")
    return failed(tenant)
