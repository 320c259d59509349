"""What jobs bring to a host: the base they train on, their rows as tokens, and the weights they start from.

Trials of a sweep train on the same rows: a renderer, and rows rendered by it, are kept for those that come next.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from infra.errors import BadInput, WrongBase
from infra.storage import Storage
from workers.adapter_store import load_adapter
from workers.bases import materialise
from workers.data.contract import prompt_contract
from workers.data.render import Example, Renderer
from workers.data.rows import Row
from workers.data.store import load_rows
from workers.data.tokenizer import load_tokenizer
from workers.engine.resident import ResidentBase
from workers.engine.training import shape_of_adapter
from workers.job import DataRef, Job
from workers.loading import load_model

MAX_KEPT = 8
"""Renderers, and sets of rows, that are kept."""
Value = TypeVar("Value")


@dataclass(frozen=True)
class Inputs:
    """A job's rows, ready to train on."""

    renderer: Renderer
    train: list[Example]
    validation: list[Example]
    validation_rows: list[Row]

    @property
    def longest(self) -> int:
        """Tokens of the longest training row."""
        return max(len(example.input_ids) for example in self.train)


@dataclass
class HostInputs:
    """Fetches what jobs need from the store to this node. Used by one thread."""

    store: Storage
    cache_dir: Path
    device: str
    _path: Path = field(default_factory=Path)
    _kept: OrderedDict[Hashable, object] = field(default_factory=OrderedDict)

    def load_base(self, job: Job) -> ResidentBase:
        """Load the job's base. Raises WrongBase or BadInput if the folder is not what the job was resolved with."""
        self._kept.clear()
        self._path = materialise(job.base.base_id, Path(job.base.path), self.store, self.cache_dir)
        present = prompt_contract(self._path)
        if present != job.base.prompt_contract:  # a base's id does not cover its tokenizer
            raise WrongBase(
                f"the tokenizer or chat template in {self._path} is not the one the job was resolved with "
                f"({present[:12]}, not {job.base.prompt_contract[:12]}); restore the folder, or ask for the job anew."
            )
        return ResidentBase(load_model(self._path, job.spec.base_model, task_type=job.spec.task_type, device=self.device))

    def read(self, job: Job, base: ResidentBase) -> Inputs:
        """Return the rows of a job, rendered for the base that was loaded last."""
        how = (job.spec.training.max_length, job.labels)
        renderer = self._keep(("renderer", *how), lambda: self._renderer(job, base))
        train = self._examples(job, job.train, renderer, how)[1]
        rows, validation = self._examples(job, job.validation, renderer, how) if job.validation else ([], [])
        return Inputs(renderer, train, validation, rows)

    def initial_tensors(self, job: Job, base: ResidentBase) -> dict[str, Tensor] | None:
        """Return the weights a job continues from, None for fresh ones.

        Raises BadInput if they would be scaled otherwise: the adapter would jump.
        """
        if job.init_adapter_id is None:
            return None
        adapter = load_adapter(self.store, job.tenant, job.base.base_id, job.init_adapter_id).adapter
        _, scales = shape_of_adapter(base, job.spec.peft)
        for module in adapter.modules:
            wanted = scales.get(module)
            if wanted is not None and not math.isclose(adapter.scale(module), wanted, rel_tol=1e-6):
                raise BadInput(
                    f"the initial adapter scales its update by {adapter.scale(module):g}, and peft asks for {wanted:g}; "
                    "give peft.r, lora_alpha and use_rslora what that adapter has."
                )
        return dict(adapter.tensors)

    def _renderer(self, job: Job, base: ResidentBase) -> Renderer:
        tokenizer = load_tokenizer(self._path)
        max_length = job.spec.training.max_length
        return Renderer(tokenizer, max_length, context_length=base.context_length, labels=job.labels)

    def _examples(self, job: Job, data: DataRef, renderer: Renderer, how: Sequence[Hashable]) -> tuple[list[Row], list[Example]]:
        def render() -> tuple[list[Row], list[Example]]:
            rows = load_rows(self.store, job.tenant, data.digest)
            return rows, renderer.render_all(rows)

        return self._keep((job.tenant, data.digest, *how), render)

    def _keep(self, key: Hashable, make: Callable[[], Value]) -> Value:
        if key not in self._kept:
            self._kept[key] = make()
            while len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]  # type: ignore[return-value]
