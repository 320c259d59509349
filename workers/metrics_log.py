"""Metric points of a job as the lines of a chunk: what was measured between two checkpoints, safe in the store with the second.

One JSON object a line. Numbers that JSON has no word for are written "NaN", "Infinity" and "-Infinity".
"""

import json
import math
from collections.abc import Sequence
from typing import Any

from infra.fingerprint import canonical_json
from infra.tracking import Point


def encode_number(value: float) -> float | str:
    """Return `value`, or the word for it if it is not finite."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")


def decode_number(value: float | str) -> float:
    """Undo `encode_number`."""
    return float(value)


def encode_points(points: Sequence[Point]) -> bytes:
    """Return the bytes of a chunk."""
    return b"".join(canonical_json({**vars(point), "value": encode_number(point.value)}) + b"\n" for point in points)


def decode_points(chunk: bytes) -> list[Point]:
    """Read a chunk back."""
    lines: list[dict[str, Any]] = [json.loads(line) for line in chunk.splitlines()]
    return [Point(**{**line, "value": decode_number(line["value"])}) for line in lines]
