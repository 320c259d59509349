"""Gates: what an adapter must show before it becomes champion; `gates.yaml` and the verdicts of each gate.

A gate looks at one case through a `GateContext`, which measures what it is asked for (see `judging`), and returns a `Verdict`.
The gates here and those of other packages are the same to whoever runs them. A package brings a gate under the entry point group
`lorafleet.gates`: the entry point's name is the `kind` in gates.yaml, and what it names is called with the other keys of that
entry; it returns a `Gate`.

Reading gates.yaml loads neither torch nor scipy.
"""

from __future__ import annotations

import difflib
import glob
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from pydantic import BaseModel, Field, RootModel

from infra.errors import BadInput
from infra.fingerprint import id_of_json
from infra.storage import Storage
from infra.strict import StrictModel, parse
from pipelines.files import read_yaml
from pipelines.journal import Entry
from workers.manifests import AdapterRef
from workers.metrics_log import encode_number
from workers.scores import LOWER_IS_BETTER, Metric, Parts, RowScores, parts_of

if TYPE_CHECKING:
    from pipelines.bootstrap import Improvement

GROUP = "lorafleet.gates"
FILE_NAME = "gates.yaml"
Side = Literal["challenger", "champion", "base"]


@dataclass(frozen=True)
class Verdict:
    """What one gate found."""

    gate: str
    """The gate's name."""
    passed: bool
    sentence: str
    """Why, with the numbers, for a person."""
    figures: Mapping[str, float | int | str] = field(default_factory=dict)
    """The numbers for programs."""

    def to_json(self) -> dict[str, Any]:
        """Return the verdict as JSON data; numbers that JSON has no word for are words."""
        told = {name: encode_number(one) if isinstance(one, float) else one for name, one in self.figures.items()}
        return {"gate": self.gate, "passed": self.passed, "sentence": self.sentence, "figures": told}


class GateContext(Protocol):
    """One case: an adapter that is to become champion of a task. Measurements are made once, when first asked for."""

    @property
    def store(self) -> Storage: ...

    @property
    def challenger(self) -> AdapterRef:
        """The adapter that is to become champion."""

    @property
    def task(self) -> str: ...

    @property
    def manifest(self) -> Mapping[str, Any]:
        """The challenger's manifest."""

    @property
    def champion(self) -> Entry | None:
        """The journal's head, whose adapter is champion now; None before the first promotion."""

    @property
    def folder(self) -> Path:
        """Where relative paths of gates.yaml start."""

    def scores(self, side: Side, data: str | None, metric: str) -> RowScores:
        """Measure a side on each row of `data` (None: the test rows of the challenger's job, or its validation rows)."""

    def compare(self, against: Side, data: str | None, metric: str, confidence: float, seed: int) -> Improvement:
        """Measure the challenger and another side on the same rows; return the gain and its lower bound."""

    def has_effect(self) -> bool:
        """Tell whether the challenger fits its base and moves its logits to finite values."""


class Gate(Protocol):
    """What an entry of gates.yaml becomes."""

    @property
    def name(self) -> str:
        """As it stands in tables of verdicts."""

    def evaluate(self, context: GateContext) -> Verdict:
        """Look at a case. Raises BadInput with one sentence if it cannot be looked at; never passes by an error."""


class _Better(StrictModel):
    metric: Metric = Field("eval/loss", description="What is compared.")
    min_effect: Annotated[float, Field(ge=0)] = Field(
        0.0, description="The lower end of the gain's confidence interval must exceed this; in the metric's unit."
    )
    confidence: Annotated[float, Field(ge=0.5, lt=1.0)] = Field(0.95, description="Of the one-sided interval of the gain.")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(0, description="Of the bootstrap's draws.")
    data: str | None = Field(
        None,
        description="Rows to compare on, from the folder of the gates file; None: held-out rows of the adapter's job.",
    )

    def _verdict(self, name: str, context: GateContext, against: Side) -> Verdict:
        found = context.compare(against, self.data, self.metric, self.confidence, self.seed)
        sentence = (
            f"{self.metric} {found.challenger:.4f}, {_told(against)} {found.other:.4f}: better by {found.gain:.4f}, with "
            f"{self.confidence:.0%} confidence by {found.lower:.4f}; asked is more than {self.min_effect:g}"
        )
        figures = {"metric": self.metric, "against": against, **vars(found), "min_effect": self.min_effect}
        return Verdict(name, found.lower > self.min_effect, sentence, figures)


class BetterThanChampion(_Better):
    """Better than the present champion by a paired bootstrap over rows; the first one is compared with the plain base."""

    kind: Literal["better_than_champion"]

    @property
    def name(self) -> str:
        return "better_than_champion"

    def evaluate(self, context: GateContext) -> Verdict:
        return self._verdict(self.name, context, "base" if context.champion is None else "champion")


class BetterThanBase(_Better):
    """Better than the base without any adapter, by a paired bootstrap over rows."""

    kind: Literal["better_than_base"]

    @property
    def name(self) -> str:
        return "better_than_base"

    def evaluate(self, context: GateContext) -> Verdict:
        return self._verdict(self.name, context, "base")


class Guard(StrictModel):
    """No worse than the champion (the first one: than the plain base) on rows of a file."""

    kind: Literal["guard"]
    data: str = Field(
        min_length=1, description="Rows that must not get worse: a file or glob from the folder of the gates file, or s3://."
    )
    metric: Metric = Field("eval/loss", description="What is compared.")
    max_regression: Annotated[float, Field(ge=0)] = Field(0.0, description="How much worse it may be, in the metric's unit.")

    @property
    def name(self) -> str:
        return f"guard {self.data}"

    def evaluate(self, context: GateContext) -> Verdict:
        against: Side = "base" if context.champion is None else "champion"
        mine, other = (value_of(context, side, self.data, self.metric) for side in ("challenger", against))
        worse = mine - other if self.metric in LOWER_IS_BETTER else other - mine
        sentence = f"{self.metric} {mine:.4f}, {_told(against)} {other:.4f}; allowed is worse by {self.max_regression:g}"
        figures = {"metric": self.metric, "against": against, "challenger": mine, "other": other, "regression": worse}
        return Verdict(self.name, worse <= self.max_regression, sentence, figures)


class Effect(StrictModel):
    """The adapter fits its base tensor by tensor, and moves its logits to finite values."""

    kind: Literal["effect"]

    @property
    def name(self) -> str:
        return "effect"

    def evaluate(self, context: GateContext) -> Verdict:
        moves = context.has_effect()
        told = "moves the base's logits, to finite values" if moves else "leaves the base's logits as they are, or not finite"
        return Verdict(self.name, moves, told)


class SignedBy(StrictModel):
    """The adapter bears a signature by the holder of a key."""

    kind: Literal["signed_by"]
    public_key: str = Field(min_length=1, description="File of the public key, PEM.")

    @property
    def name(self) -> str:
        return "signed_by"

    def evaluate(self, context: GateContext) -> Verdict:
        path = context.folder / self.public_key
        if not path.is_file():
            raise BadInput(f"the gate signed_by names the public key {path}, which is no file; correct public_key.")
        signing = importlib.import_module("pipelines.signing")  # here, since signatures need packages that gates do without
        signed = bool(signing.is_signed_by(context.store, context.challenger, path))
        return Verdict(self.name, signed, f"{'is' if signed else 'is not'} signed with the key of {path.name}")


GateSpec = BetterThanChampion | BetterThanBase | Guard | Effect | SignedBy
KINDS: dict[str, type[BaseModel]] = {
    "better_than_champion": BetterThanChampion,
    "better_than_base": BetterThanBase,
    "guard": Guard,
    "effect": Effect,
    "signed_by": SignedBy,
}


class GatesFile(RootModel[list[Annotated[GateSpec, Field(discriminator="kind")]]]):
    """gates.yaml: a list of gates, all of which must pass. Installed packages may bring further kinds."""


@dataclass(frozen=True)
class Gates:
    """The gates of a file."""

    gates: tuple[Gate, ...]
    written: tuple[Mapping[str, Any], ...]
    """As they stand in the file, with defaults filled in where the kind is one of KINDS."""
    folder: Path
    """Where relative paths in them start."""

    @property
    def digest(self) -> str:
        """Names the gates in evidence. What their files hold is named there beside it."""
        return id_of_json(list(self.written))

    def check_files(self) -> None:
        """Raise BadInput if a local file that our own gates read is not there. Rows on S3 are not looked for."""
        for number, gate in enumerate(self.gates, 1):
            key = "public_key" if isinstance(gate, SignedBy) else "data"
            named = getattr(gate, key, None) if isinstance(gate, _Better | Guard | SignedBy) else None
            if named is None or "://" in named or glob.has_magic(named):
                continue
            path = self.folder / Path(named).expanduser()
            if not path.exists():
                kind = self.written[number - 1]["kind"]
                raise BadInput(f"gate {number} ({kind}) needs {path}, which does not exist; put it there, or correct {key}.")


def load_gates(path: Path) -> Gates:
    """Read gates.yaml. Raises BadInput with one sentence that names the gate that is wrong."""
    return parse_gates(read_yaml(path), str(path), path.parent)


def parse_gates(raw: Any, source: str, folder: Path) -> Gates:
    """Return the gates of plain data; mistakes name `source`, and relative paths start at `folder`. Raises BadInput."""
    if not isinstance(raw, list):
        raise BadInput(f"{source} should be a list of gates, each '- {{kind: ...}}'; see 'lorafleet schema gates'.")
    made = [_gate(entry, f"{source}: gate {number}") for number, entry in enumerate(raw, 1)]
    return Gates(tuple(gate for gate, _ in made), tuple(written for _, written in made), folder)


def find_gates(named: Path | None, home: Path) -> Gates | None:
    """Return the gates of the file that was named, else of `gates.yaml` in the home; None if there is none."""
    if named is not None:
        return load_gates(named)
    return load_gates(home / FILE_NAME) if (home / FILE_NAME).exists() else None


def data_of(gates: Sequence[Gate]) -> list[str | None]:
    """Return the rows that our own gates compare on, each once; None stands for those of the adapter's job."""
    named = [gate.data for gate in gates if isinstance(gate, _Better | Guard)]
    return list(dict.fromkeys(named))


def metrics_of(gates: Sequence[Gate], data: str | None) -> set[str]:
    """Return the metrics that our own gates compare on some rows."""
    return {gate.metric for gate in gates if isinstance(gate, _Better | Guard) and gate.data == data}


def value_of(context: GateContext, side: Side, data: str | None, metric: str) -> float:
    """Return a metric of one side over all rows of `data`. Raises BadInput if it is not finite."""
    return finite_parts(context, side, data, metric).value


def finite_parts(context: GateContext, side: Side, data: str | None, metric: str) -> Parts:
    """Return a metric's parts of one side. Raises BadInput if it is not finite: such an adapter can be compared with nothing."""
    parts = parts_of(context.scores(side, data, metric), metric)
    if not parts.is_finite:
        raise BadInput(f"{metric} of {_told(side)} is not finite on these rows; such an adapter cannot be compared.")
    return parts


def _gate(entry: Any, where: str) -> tuple[Gate, Mapping[str, Any]]:
    kind = entry.get("kind") if isinstance(entry, dict) else None
    if not isinstance(kind, str):
        raise BadInput(f"{where} names no kind; write for example '- {{kind: effect}}'.")
    if kind in KINDS:
        spec: Any = parse(KINDS[kind], entry, f"{where} ({kind})")
        return spec, spec.model_dump(mode="json")
    plugins = {found.name: found for found in entry_points(group=GROUP)}
    if kind in plugins:
        return _brought(plugins[kind], {key: value for key, value in entry.items() if key != "kind"}, where), entry
    known = [*KINDS, *plugins]
    close = difflib.get_close_matches(kind, known, n=1)
    hint = f"Did you mean '{close[0]}'?" if close else f"There is: {', '.join(known)}."
    raise BadInput(f"{where}: there is no kind of gate '{kind[:80]}'. {hint}")


def _brought(entry_point: EntryPoint, options: Mapping[str, Any], where: str) -> Gate:
    """Make a gate that another package brings."""
    try:
        gate: Gate = entry_point.load()(**options)
        _ = gate.name, gate.evaluate
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise BadInput(
            f"{where}: the gate '{entry_point.name}' of {entry_point.value} cannot be made ({type(error).__name__}: {error}); "
            "correct its keys, or the package."
        ) from error
    return gate


def _told(side: Side) -> str:
    return {"challenger": "the challenger", "champion": "the champion", "base": "the plain base"}[side]
