"""From a spec to a job: find the base and its identity, read the data and keep it in the store, check that it can train.

Everything a person may have got wrong is found here, before anything is launched. One `Resolver` serves a whole sweep: base
and data are looked at once, however many trials ask.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infra.errors import BadInput
from infra.storage import Storage
from infra.stores import open_store
from workers.bases import add_base, find_base, read_base
from workers.data.classification import labels_of
from workers.data.contract import prompt_contract
from workers.data.render import Renderer
from workers.data.rows import Row
from workers.data.sources import OpenUri
from workers.data.splits import Splits, load_splits
from workers.data.store import save_rows
from workers.families import BERTS, ENCODERS, POOLER_PARTS, refuse_other_families
from workers.forgotten import refuse_forgotten
from workers.identity import BaseIdentity, identify, training_view
from workers.job import BaseRef, DataRef, Job, pin
from workers.manifests import AdapterRef, check_base, read_manifest
from workers.spec import BaseModelSpec, DataSpec, JobSpec, TaskType
from workers.targets import alphas_of, check_ranks, linears_of_tensors, ranks_of, select_targets

AdapterFinder = Callable[[str, str], tuple[str, str]]
"""(tenant, reference) -> (base_id, adapter_id) of a stored adapter; raises BadInput."""


@dataclass(frozen=True)
class _Base:
    path: Path
    identity: BaseIdentity
    ref: BaseRef


@dataclass(frozen=True)
class _Data:
    splits: Splits
    labels: tuple[str, ...]
    train: DataRef
    validation: DataRef | None
    test: DataRef | None


@dataclass
class Resolver:
    """Pins specs whose paths are relative to `folder`."""

    store: Storage
    folder: Path
    cache_dir: Path
    find_adapter: AdapterFinder
    open_uri: OpenUri = open_store
    """Opens an s3:// prefix that holds data."""
    notes: list[str] = field(default_factory=list)
    """Sentences about what was noticed and is no error (duplicates between splits, ...)."""
    _bases: dict[BaseModelSpec, _Base] = field(default_factory=dict)
    _descriptors: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By base_id, of bases that adapters were trained on; written once, so read once."""
    _renderers: dict[BaseModelSpec, Renderer] = field(default_factory=dict)
    """One for each base: those of jobs share its tokenizer, and the child process of its chat template."""
    _data: dict[tuple[str, DataSpec, TaskType], _Data] = field(default_factory=dict)
    _rendered: set[tuple[DataSpec, TaskType, int]] = field(default_factory=set)

    def resolve(self, spec: JobSpec) -> Job:
        """Return the pinned job. Raises BadInput, WrongBase or ServiceUnavailable with one sentence."""
        base = self._base(spec.base_model)
        _refuse_other_tasks(spec, base.identity)
        self._check_adapter(spec, base)
        initial = self._initial_adapter(spec, base)
        return self._pinned(spec, base, self._data_of(spec), initial)

    def resolve_rows(self, spec: JobSpec, splits: Splits, *, is_rendered: bool = False) -> Job:
        """Return the pinned job of rows that are there already: `spec.data` is not read, and the rows are not remembered.

        The checks are those of `resolve`. With `is_rendered` the caller vouches that every row has been rendered by
        `renderer(spec, labels)` and has a target. Raises BadInput, WrongBase or ServiceUnavailable.
        """
        refuse_forgotten(self.store, spec.tenant)
        base = self._base(spec.base_model)
        _refuse_other_tasks(spec, base.identity)
        self._check_adapter(spec, base)
        initial = self._initial_adapter(spec, base)
        data = self._kept(spec, splits, is_rendered)
        return self._pinned(spec, base, data, initial)

    def read(self, spec: JobSpec) -> tuple[Splits, Renderer]:
        """Return the rows of a spec and what renders them, without storing anything; the rows are not rendered yet."""
        splits = load_splits(spec.data, self.folder, self.open_uri)
        return splits, self.renderer(spec, _labels(spec, splits))

    def identity(self, spec: JobSpec) -> BaseIdentity:
        """Return the identity of a spec's base."""
        return self._base(spec.base_model).identity

    def renderer(self, spec: JobSpec, labels: Sequence[str] = ()) -> Renderer:
        """Return the renderer that turns a spec's rows into tokens as training does; `labels` are those of a classifier."""
        held = spec.base_model
        if held not in self._renderers:
            from workers.data.tokenizer import load_tokenizer  # transformers, which it takes to read rows, not to know a base

            base = self._base(held)
            context_length = base.identity.context_length
            self._renderers[held] = Renderer(load_tokenizer(base.path), spec.training.max_length, context_length=context_length)
        return self._renderers[held].for_job(spec.training.max_length, labels)

    def _pinned(self, spec: JobSpec, base: _Base, data: _Data, initial: Mapping[str, Any] | None) -> Job:
        if initial is not None:
            _refuse_other_labels(initial, data.labels)
        init_adapter_id = None if initial is None else str(initial["adapter_id"])
        self._check_answers(spec, base, data.splits.validation)
        return pin(spec, base.ref, data.train, data.validation, data.test, init_adapter_id, data.labels)

    def _base(self, spec: BaseModelSpec) -> _Base:
        if spec not in self._bases:
            path = find_base(spec, self.folder)
            identity = identify(path, self.cache_dir)
            add_base(self.store, path, identity, upload=False)
            ref = BaseRef(identity.base_id, training_view(spec), prompt_contract(path), str(path.resolve()))
            self._bases[spec] = _Base(path, identity, ref)
        return self._bases[spec]

    def _check_adapter(self, spec: JobSpec, base: _Base) -> None:
        if "quantization_config" in base.identity.architecture:
            raise BadInput(
                f"the base {base.path} holds weights that were quantised before; give the base they were made of, "
                "and set base_model.quantization for 4 bits."
            )
        shapes = linears_of_tensors(base.identity.shapes)
        targets = select_targets(spec.peft.target_modules, list(shapes))
        check_ranks(ranks_of(spec.peft, targets), shapes)
        alphas_of(spec.peft, targets)

    def _initial_adapter(self, spec: JobSpec, base: _Base) -> dict[str, Any] | None:
        """Return the manifest of the adapter to continue from, if there is one."""
        if spec.peft.init_adapter is None:
            return None
        base_id, adapter_id = self.find_adapter(spec.tenant, spec.peft.init_adapter)
        manifest = read_manifest(self.store, AdapterRef(spec.tenant, base_id, adapter_id))
        trained_on = self._descriptors.get(base_id) or read_base(self.store, base_id)
        if trained_on is not None:
            self._descriptors[base_id] = trained_on
        check_base(manifest, base.identity, prompt_contract=base.ref.prompt_contract, trained_on=trained_on)
        if (manifest["task_type"] == "SEQ_CLS") != (spec.task_type == "SEQ_CLS"):
            raise BadInput(
                f"peft.init_adapter {adapter_id[:12]} is of task_type {manifest['task_type']}, and this job of {spec.task_type}; "
                "start from one of its kind, or set init_adapter to null."
            )
        return manifest

    def _data_of(self, spec: JobSpec) -> _Data:
        key = (spec.tenant, spec.data, spec.task_type)
        rendering = (spec.data, spec.task_type, spec.training.max_length)
        if key not in self._data:
            refuse_forgotten(self.store, spec.tenant)
            splits = load_splits(spec.data, self.folder, self.open_uri)
            self._data[key] = self._kept(spec, splits, is_rendered=False)
            self.notes += splits.notes
            self._rendered.add(rendering)
        elif rendering not in self._rendered:
            self._check_renders(spec, self._data[key].splits, self._data[key].labels)
            self._rendered.add(rendering)
        return self._data[key]

    def _kept(self, spec: JobSpec, splits: Splits, is_rendered: bool) -> _Data:
        labels = _labels(spec, splits)
        if not is_rendered:
            self._check_renders(spec, splits, labels)
        train = save_rows(self.store, spec.tenant, splits.train)
        return _Data(splits, labels, train, self._saved(spec, splits.validation), self._saved(spec, splits.test))

    def _check_answers(self, spec: JobSpec, base: _Base, validation: list[Row] | None) -> None:
        """Make sure that answers can be generated where the job asks for them: they are when it has been trained."""
        evaluation, context = spec.evaluation, base.identity.context_length
        if not evaluation.generate:
            return
        if context is not None and evaluation.max_new_tokens >= context:
            raise BadInput(
                f"evaluation.max_new_tokens is {evaluation.max_new_tokens}, and the base's context holds {context} tokens, "
                "prompt included; lower it."
            )
        if validation:
            self.renderer(spec).prompt_ids(validation[0])

    def _saved(self, spec: JobSpec, rows: list[Row] | None) -> DataRef | None:
        return save_rows(self.store, spec.tenant, rows) if rows else None

    def _check_renders(self, spec: JobSpec, splits: Splits, labels: tuple[str, ...]) -> None:
        """Render every row once, so that a row that cannot be trained on is named before anything is stored or launched."""
        renderer = self.renderer(spec, labels)
        for rows in (splits.train, splits.validation, splits.test):
            if rows:
                renderer.render_all(rows)


def _labels(spec: JobSpec, splits: Splits) -> tuple[str, ...]:
    return labels_of(splits.train) if spec.task_type == "SEQ_CLS" else ()


def _refuse_other_tasks(spec: JobSpec, base: BaseIdentity) -> None:
    """Raise BadInput unless the base, and what is to be measured, suit the task type."""
    family = str(base.architecture.get("model_type"))
    if spec.task_type == "CAUSAL_LM":
        if family in ENCODERS:
            raise BadInput(
                f"base_model is an encoder ({family}), which writes no text; set task_type: SEQ_CLS to train a classifier, or "
                "use a causal language model."
            )
        return
    refuse_other_families(family)
    if family in BERTS and not all(any(_ends_with(name, part) for name in base.shapes) for part in POOLER_PARTS):
        raise BadInput(
            "base_model stores no pooler (pooler.dense), and a BERT classifier reads what it makes of [CLS]; use a base that "
            "was saved with it (transformers' BertModel)."
        )
    if spec.evaluation.generate or spec.evaluation.format_pattern is not None:
        raise BadInput(
            "evaluation: a classifier (task_type SEQ_CLS) generates no answers; leave generate at 0 and format_pattern at null. "
            "Accuracy and macro F1 are measured on all validation rows."
        )


def _ends_with(name: str, part: str) -> bool:
    return name == part or name.endswith(f".{part}")


def _refuse_other_labels(manifest: Mapping[str, Any], labels: tuple[str, ...]) -> None:
    """Raise BadInput unless the head of an adapter that is continued has these labels, in their order."""
    before = tuple(manifest.get("labels", ()))
    if before != labels:
        moved = sorted(set(before) ^ set(labels))
        what = f"{moved[0][:60]!r} is a label of one of them only" if moved else "they are in another order"
        raise BadInput(
            f"peft.init_adapter {manifest['adapter_id'][:12]} tells apart other labels than these training rows ({what}); "
            "set init_adapter to null."
        )
