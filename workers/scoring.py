"""Many adapters of one base measured on many small sets of rows, in passes they share; the numbers are those of `Bench`.

A case is cut into portions of as many rows as `Bench` measures at a time; passes are filled with portions of whatever cases stand
next to each other, which alters no bit (see `engine.portions`). Rows are rendered once for all adapters they are measured with.
What is wrong with one case is told of that case alone.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from workers.adapter import Adapter
from workers.data.rows import Row
from workers.engine.batches import Tokens, make_sequence
from workers.engine.portions import Portion, Worn, have_effect, measure_portions
from workers.engine.resident import Measured, ResidentBase
from workers.evaluate import ROWS_PER_PASS, Bench, answer_rows, scores_of
from workers.memory import give_back_cache, is_out_of_memory
from workers.packing import CPU_TOKENS, CUDA_TOKENS
from workers.scores import RowScores
from workers.spec import BaseModelSpec, EvaluationSpec

SLOTS = 32
"""Adapters whose factors are held ready at a time."""
PROBES_AT_A_TIME = 16
"""Adapters of one effect test: their logits are kept until they have been compared."""
MAX_RENDERED = 64
"""Sets of rows that stay rendered: rows of a guard are measured with every adapter."""
Given = TypeVar("Given")
Found = TypeVar("Found")


@dataclass(frozen=True)
class ScoreCase:
    """An adapter (None: the plain base) to be measured on rows."""

    adapter: Adapter | None
    rows: Sequence[Row]
    evaluation: EvaluationSpec
    answers: bool = False
    """Whether an answer is generated for every row."""


@dataclass(frozen=True)
class _Rendered:
    """Rows as tensors. Holds the rows themselves, by whose identity it is found again."""

    rows: Sequence[Row]
    sequences: Sequence[Tokens]
    num_bytes: Sequence[int]

    @property
    def parts(self) -> list[Sequence[Tokens]]:
        """The rows that `Bench` measures together."""
        return [self.sequences[start : start + ROWS_PER_PASS] for start in range(0, len(self.sequences), ROWS_PER_PASS)]


@dataclass(frozen=True)
class _Ready:
    """A case that can be measured."""

    case: ScoreCase
    rendered: _Rendered
    worn: Worn


class PackedBench:
    """A base on which many stored adapters are measured in shared passes, in this process."""

    def __init__(
        self,
        path: Path,
        spec: BaseModelSpec,
        max_length: int,
        labels: Sequence[str] = (),
        *,
        device: str = "cpu",
        max_tokens: int | None = None,
        slots: int = SLOTS,
        base: ResidentBase | None = None,
    ) -> None:
        """Load a base as `Bench` does, or use one that is loaded.

        A pass holds `max_tokens` at most (None: what suits the device), but at least one portion, and `slots` adapters.
        """
        self._bench = Bench(path, spec, max_length, labels=labels, device=device, base=base)
        self._max_tokens = max_tokens or (CPU_TOKENS if self.base.device.type == "cpu" else CUDA_TOKENS)
        self._slots = slots
        self._rendered: OrderedDict[int, _Rendered] = OrderedDict()

    @property
    def base(self) -> ResidentBase:
        return self._bench.base

    def score(self, cases: Sequence[ScoreCase]) -> list[RowScores]:
        """Measure all cases; raise what the first one raised that cannot be measured."""
        return [_or_raise(found) for found in self.try_score(cases)]

    def try_score(self, cases: Sequence[ScoreCase]) -> list[RowScores | Exception]:
        """Measure all cases; in place of one that cannot be measured stands why."""
        found: list[RowScores | Exception] = []
        for block in _blocks(cases, self._slots):
            found += self._score_block(block)
        return found

    def effects(self, adapters: Sequence[Adapter]) -> list[bool]:
        """Tell of each adapter whether it moves the base's logits, to finite values; see `Bench.moves_logits`."""
        return [_or_raise(found) for found in self.try_effects(adapters)]

    def try_effects(self, adapters: Sequence[Adapter]) -> list[bool | Exception]:
        """As `effects`; in place of an adapter that does not fit the base stands why."""
        found: list[bool | Exception] = []
        for block in _blocks(adapters, PROBES_AT_A_TIME):
            fitting = _each(self._bench.worn, block)
            found += _where_ready(fitting, self._have_effect)
        return found

    def _have_effect(self, worn: Sequence[Worn]) -> list[bool | Exception]:
        return _together(lambda some: have_effect(self.base, some, self._bench.probe), worn, self.base)

    def _score_block(self, cases: Sequence[ScoreCase]) -> list[RowScores | Exception]:
        return _where_ready(_each(self._prepare, cases), self._measure)

    def _prepare(self, case: ScoreCase) -> _Ready:
        return _Ready(case, self._render(case.rows), self._bench.worn(case.adapter))

    def _render(self, rows: Sequence[Row]) -> _Rendered:
        key = id(rows)
        if key not in self._rendered:
            examples = self._bench.renderer.render_all(rows)
            sequences = [make_sequence(example, number, self.base.pooling) for number, example in enumerate(examples)]
            num_bytes = [self._bench.renderer.target_bytes([example]) for example in examples]
            self._rendered[key] = _Rendered(rows, sequences, num_bytes)
            while len(self._rendered) > MAX_RENDERED:
                self._rendered.popitem(last=False)
        self._rendered.move_to_end(key)
        return self._rendered[key]

    def _measure(self, ready: Sequence[_Ready]) -> list[RowScores | Exception]:
        """Measure cases that were prepared, in as few passes as they fit into."""
        portions = [Portion(part, one.worn) for one in ready for part in one.rendered.parts]
        measured: list[list[Measured] | Exception] = []
        for some in self._passes(portions):
            measured += _together(lambda these: measure_portions(self.base, these), some, self.base)
        waiting = iter(measured)
        own = [[next(waiting) for _ in one.rendered.parts] for one in ready]
        return _each(self._finish, list(zip(ready, own, strict=True)))

    def _passes(self, portions: Iterable[Portion]) -> Iterator[list[Portion]]:
        """Cut portions into passes that keep to the budget; a portion that exceeds it has a pass to itself."""
        chosen: list[Portion] = []
        room = self._max_tokens
        for portion in portions:
            if chosen and portion.num_tokens > room:
                yield chosen
                chosen, room = [], self._max_tokens
            chosen.append(portion)
            room -= portion.num_tokens
        if chosen:
            yield chosen

    def _finish(self, one: tuple[_Ready, Sequence[list[Measured] | Exception]]) -> RowScores:
        ready, parts = one
        measured = [row for part in parts for row in _or_raise(part)]
        case, answered = ready.case, None
        if case.answers:
            with self._bench.wearing(case.adapter):
                answered = answer_rows(self.base, self._bench.renderer, case.rows, case.evaluation.max_new_tokens)
        return scores_of(measured, ready.rendered.num_bytes, answered, case.evaluation.format_pattern)


def _blocks(values: Sequence[Given], size: int) -> Iterator[Sequence[Given]]:
    return (values[start : start + size] for start in range(0, len(values), size))


def _each(act: Callable[[Given], Found], values: Sequence[Given]) -> list[Found | Exception]:
    """Do something with each value; where it raises stands what it raised."""
    found: list[Found | Exception] = []
    for value in values:
        try:
            found.append(act(value))
        except Exception as error:
            found.append(error)
    return found


def _where_ready(
    prepared: Sequence[Given | Exception], act: Callable[[Sequence[Given]], list[Found | Exception]]
) -> list[Found | Exception]:
    """Act on those that could be prepared, all at once; the others keep what was wrong with them."""
    found = iter(act([one for one in prepared if not isinstance(one, Exception)]))
    return [one if isinstance(one, Exception) else next(found) for one in prepared]


def _together(
    act: Callable[[Sequence[Given]], Sequence[Found]], values: Sequence[Given], base: ResidentBase
) -> list[Found | Exception]:
    """Do something with values all at once; if that fails, with each alone, so that one of them harms none of the others."""
    if not values:
        return []
    try:
        return list(act(values))
    except Exception as error:
        if is_out_of_memory(error):
            give_back_cache(base.device)
        if len(values) == 1:
            return [error]
    return [found for value in values for found in _together(act, [value], base)]


def _or_raise(found: Found | Exception) -> Found:
    if isinstance(found, Exception):
        raise found
    return found
