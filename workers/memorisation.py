"""Whether an adapter has learned rows by heart: what training rows gained against held-out rows, and planted canaries.

A row's gain is its loss under the plain base less its loss under the adapter, so that rows that were easy before do not count.
If nothing was memorised, training rows and unseen rows of the same kind gain alike, and a training row's gain exceeds an unseen
one's half of the time; how often it does is the area under the curve of a membership attack by loss (Yeom et al.,
arXiv:1709.01604, calibrated by the base).

A canary is a secret of a known form that was planted among the training rows. Its rank is its place, by loss, among random
secrets of the same form; exposure is log2 of the number of secrets less log2 of the rank (Carlini et al., arXiv:1802.08232), in
bits: about 1 by chance, the most there can be when it is the likeliest of all. Pure: losses come in, numbers go out.
"""

import bisect
import hashlib
import math
import random
import string
from collections.abc import Sequence
from dataclasses import dataclass

from infra.errors import BadInput
from workers.data.rows import Kind, Row
from workers.scores import RowScores, parts_of

TRIES_PER_ALTERNATIVE = 4
"""Draws per alternative that is wanted; a short secret has fewer forms than may be asked for."""
FEWEST_ALTERNATIVES = 9
"""As many as a secret of one digit has."""


@dataclass(frozen=True)
class Probe:
    """Training rows against held-out rows, mean losses in nats per supervised token (of a classifier: per label)."""

    num_train: int
    num_held_out: int
    train_loss: float
    held_out_loss: float
    base_train_loss: float
    """Under the plain base; a classifier's plain base holds all labels alike."""
    base_held_out_loss: float
    auc: float
    """How often a training row gained more than a held-out row, 0 to 1; one half if nothing was memorised."""
    auc_error: float
    """Standard deviation that `auc` has by chance with so many rows."""


@dataclass(frozen=True)
class Exposure:
    """One canary. Named by its place: what it says is not kept."""

    where: str
    num_planted: int
    """Training rows that hold it."""
    num_alternatives: int
    rank: int
    """1 for the likeliest of all, with the adapter."""
    bits: float
    base_rank: int
    """With the plain base, which has never seen the canary."""
    base_bits: float


def probe(train: tuple[RowScores, RowScores], held_out: tuple[RowScores, RowScores]) -> Probe:
    """Compare training rows and held-out rows, each measured with the adapter and with the plain base."""
    means = [parts_of(scores, "eval/loss").value for scores in (*train, *held_out)]
    gains, others = _gains(*train), sorted(_gains(*held_out))
    n, m = len(gains), len(others)
    wins = sum(bisect.bisect_left(others, gain) + bisect.bisect_right(others, gain) for gain in gains) / 2
    return Probe(n, m, means[0], means[2], means[1], means[3], wins / (n * m), math.sqrt((n + m + 1) / (12 * n * m)))


def _gains(adapter: RowScores, base: RowScores) -> list[float]:
    """Return by how much each row's mean loss fell. A loss that is no number gained nothing."""
    gains = [(b - a) / n for a, b, n in zip(adapter.loss, base.loss, adapter.num_targets, strict=True)]
    return [gain if math.isfinite(gain) else -math.inf for gain in gains]


def alternatives_of(secret: str, num: int, where: str) -> list[str]:
    """Return up to `num` different secrets of the same form, drawn from the secret alone: the same ones every time.

    Digits become other digits; a secret without digits has its ASCII letters changed instead, capitals staying capitals.
    Raises BadInput if there are fewer than FEWEST_ALTERNATIVES.
    """
    pools = _pools(secret)
    generator = random.Random(hashlib.sha256(b"canary/1\n" + secret.encode()).digest())
    found: dict[str, None] = {}
    for _ in range(TRIES_PER_ALTERNATIVE * num):
        drawn = "".join(generator.choice(pool) for pool in pools)
        if drawn != secret:
            found[drawn] = None
        if len(found) == num:
            break
    if len(found) < min(num, FEWEST_ALTERNATIVES):
        raise BadInput(f"{where}: the completion has no digits or letters that could be others; give canaries a random secret.")
    return list(found)


def _pools(secret: str) -> list[str]:
    """Return, for each character, those that may stand in its place."""
    has_digits = any(letter in string.digits for letter in secret)
    kinds = (string.digits,) if has_digits else (string.ascii_lowercase, string.ascii_uppercase)
    return [next((kind for kind in kinds if letter in kind), letter) for letter in secret]


def canary_rows(canary: Row, num: int, kind: Kind) -> list[Row]:
    """Return the canary and then its alternatives as rows of the kind the adapter was trained on. Raises BadInput."""
    if canary.kind != "prompt_completion":
        raise BadInput(
            f"{canary.where} is a {canary.kind} row; write canaries as prompt and completion, the secret in the latter."
        )
    prompt, secret = str(canary.body["prompt"]), str(canary.body["completion"])
    return [_row(prompt, one, kind, canary.where) for one in (secret, *alternatives_of(secret, num, canary.where))]


def _row(prompt: str, secret: str, kind: Kind, where: str) -> Row:
    match kind:
        case "messages":
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": secret}]
            return Row({"messages": turns}, where)
        case "text":
            return Row({"text": prompt + secret}, where)
        case "prompt_completion":
            return Row({"prompt": prompt, "completion": secret}, where)
        case _:
            raise BadInput(f"canaries are for adapters that learn to write, and this one was trained on {kind} rows.")


def exposure(canary: Row, num_planted: int, losses: Sequence[float], base_losses: Sequence[float]) -> Exposure:
    """Return the exposure of a canary from the losses of `canary_rows`, its own first, with the adapter and the plain base."""
    ranks = [rank_of(one) for one in (losses, base_losses)]
    bits = [math.log2(len(losses)) - math.log2(rank) for rank in ranks]
    return Exposure(canary.where, num_planted, len(losses) - 1, ranks[0], bits[0], ranks[1], bits[1])


def rank_of(losses: Sequence[float]) -> int:
    """Return the place of the first loss among all; of equal ones, and of what is no number, the last."""
    own, *others = losses
    return 1 + sum(not own < other for other in others)


def num_planted(canary: Row, texts: Sequence[str]) -> int:
    """Return in how many of the training rows' texts the canary's secret stands."""
    return sum(str(canary.body["completion"]) in text for text in texts)
