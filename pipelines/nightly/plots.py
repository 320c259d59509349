"""Drawings of a night's page as inline SVG: bars, stacked by status, and a line. Colours are the page's, by class.

Nothing but elements and classes, so that a page whose policy forbids foreign scripts and inline styles can show them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from pipelines.nightly.figures import quantile

WIDTH, HEIGHT = 640, 220
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 10, 34
MOST_LABELS = 8
NUM_BINS = 24
OUTSIDE = 0.01
"""Share of values at each end that is counted in the outermost bin: one customer of 5,000 should not flatten all others."""


@dataclass(frozen=True)
class Plot:
    """A titled drawing; the caption says what it shows to those who cannot see it, too."""

    title: str
    caption: str
    svg: Markup


def stacked_bars(label: str, names: Sequence[str], series: Mapping[str, Sequence[float]], *, axis: str = "") -> Markup:
    """Return bars over `names`, stacked in the order of `series` (class of the colour -> a value >= 0 for each name)."""
    totals = [math.fsum(values[index] for values in series.values()) for index in range(len(names))]
    top = max(totals, default=0.0) or 1.0
    step = (WIDTH - LEFT - RIGHT) / max(1, len(names))
    bars = [
        bar
        for index, name in enumerate(names)
        for bar in _stack(name, index, step, top, {kind: values[index] for kind, values in series.items()})
    ]
    ticks = [(LEFT + (index + 0.5) * step, name) for index, name in enumerate(names)]
    return _figure(label, [*_scale(0.0, top), *bars, *_names(ticks), *_axis(axis)])


def histogram(label: str, groups: Mapping[str, Sequence[float]], *, axis: str) -> Markup:
    """Return how many values lie where, by group. At least one value is given."""
    values = [value for group in groups.values() for value in group]
    low, high = quantile(values, OUTSIDE), quantile(values, 1 - OUTSIDE)
    width = (high - low) / NUM_BINS or max(abs(low), 1.0) / NUM_BINS
    counts = {kind: [0.0] * NUM_BINS for kind in groups}
    for kind, group in groups.items():
        for value in group:
            counts[kind][min(NUM_BINS - 1, max(0, int((value - low) / width)))] += 1
    return stacked_bars(label, [short(low + (index + 0.5) * width) for index in range(NUM_BINS)], counts, axis=axis)


def line(label: str, names: Sequence[str], values: Sequence[float | None], *, axis: str = "") -> Markup:
    """Return a line through the values that are there. At least one is."""
    known = [value for value in values if value is not None]
    low, high = min(0.0, *known), max(0.0, *known)
    span = (high - low) or 1.0
    step = (WIDTH - LEFT - RIGHT) / max(1, len(names))
    at = [LEFT + (index + 0.5) * step for index in range(len(names))]
    points = [
        (x, _height(value - low, span), name, value)
        for x, name, value in zip(at, names, values, strict=True)
        if value is not None
    ]
    path = Markup('<polyline class="line" points="{}"/>').format(" ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in points))
    dots = [
        Markup('<circle class="dot" cx="{}" cy="{}" r="3"><title>{}: {}</title></circle>').format(
            f"{x:.1f}", f"{y:.1f}", name, short(value)
        )
        for x, y, name, value in points
    ]
    return _figure(label, [*_scale(low, span), path, *dots, *_names(list(zip(at, names, strict=True))), *_axis(axis)])


def short(value: float) -> str:
    """Return a number with as many digits as a label has room for."""
    if value == int(value) and abs(value) < 1e4:
        return str(int(value))
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _figure(label: str, parts: Sequence[Markup]) -> Markup:
    body = Markup("").join(parts)
    opening = Markup('<svg role="img" viewBox="0 0 {} {}" preserveAspectRatio="xMidYMid meet"><title>{}</title>')
    return opening.format(WIDTH, HEIGHT, label) + body + Markup("</svg>")


def _stack(name: str, index: int, step: float, top: float, values: Mapping[str, float]) -> list[Markup]:
    width = min(0.8 * step, 60.0)
    left = LEFT + (index + 0.5) * step - width / 2
    below, bars = 0.0, []
    for kind, value in values.items():
        if value > 0:
            upper = _height(below + value, top)
            bars.append(
                Markup('<rect class="{}" x="{}" y="{}" width="{}" height="{}"><title>{}: {} {}</title></rect>').format(
                    f"bar {kind}",
                    f"{left:.1f}",
                    f"{upper:.1f}",
                    f"{width:.1f}",
                    f"{_height(below, top) - upper:.1f}",
                    name,
                    short(value),
                    kind,
                )
            )
            below += value
    return bars


def _scale(low: float, span: float) -> list[Markup]:
    """Three lines across, each with its value."""
    lines = []
    for share in (0.0, 0.5, 1.0):
        y = f"{_height(share * span, span):.1f}"
        rule = Markup('<line class="rule" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(LEFT, WIDTH - RIGHT, y, y)
        text = Markup('<text class="tick end" x="{}" y="{}" dy="4">{}</text>').format(LEFT - 6, y, short(low + share * span))
        lines.append(rule + text)
    return lines


def _names(ticks: Sequence[tuple[float, str]]) -> list[Markup]:
    """Some of the names, evenly chosen, so that they do not run into each other."""
    every = max(1, math.ceil(len(ticks) / MOST_LABELS))
    return [
        Markup('<text class="tick middle" x="{}" y="{}">{}</text>').format(f"{x:.1f}", HEIGHT - BOTTOM + 14, name)
        for x, name in ticks[::every]
    ]


def _axis(axis: str) -> list[Markup]:
    return [Markup('<text class="tick end" x="{}" y="{}">{}</text>').format(WIDTH - RIGHT, HEIGHT - 4, axis)] if axis else []


def _height(value: float, span: float) -> float:
    return TOP + (HEIGHT - TOP - BOTTOM) * (1 - value / span)
