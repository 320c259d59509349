"""Bases held in 4 bits are loaded, trained on as PEFT's QLoRA does, packed, and evaluated in the form they were trained on."""

import hashlib
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from infra.errors import BadInput
from tests.workers.engine.packs import Alone, examples_of, padded_loss_sum, specs_of
from tests.workers.jobs import Ground
from tests.workers.tiny_bases import FAMILIES, copy_with_config, make_base, make_model
from workers.adapter import build_adapter
from workers.data.render import Example
from workers.engine.batches import rows_of_step
from workers.engine.frozen import frozen_of
from workers.engine.pack import Pack
from workers.engine.resident import ResidentBase, measure
from workers.engine.schedule import learning_rate_at
from workers.engine.training import Training
from workers.evaluate import Bench
from workers.identity import training_view
from workers.loading import load_model, quiet
from workers.spec import BaseModelSpec, EvaluationSpec, QuantizationSpec
from workers.targets import can_be_adapted

FORMS = [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False)]
WIDTHS: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16},
    "qwen2": {"hidden_size": 64, "intermediate_size": 128},
    "gpt2": {"n_embd": 64, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
}
"""Widths that are multiples of the block of 64, where bitsandbytes' own products are right on every CPU."""
QUANTIZED = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def quantized(quant_type: str = "nf4", double: bool = True, dtype: Any = "float32") -> BaseModelSpec:
    form = QuantizationSpec.model_validate(
        {"load_in_4bit": True, "bnb_4bit_quant_type": quant_type, "bnb_4bit_use_double_quant": double}
    )
    return BaseModelSpec(name_or_path="x", dtype=dtype, quantization=form)


def packed_bytes(model: PreTrainedModel) -> dict[str, str]:
    """Return a digest of every parameter, and of the constants of those in 4 bits."""
    found = {}
    for name, tensor in model.state_dict().items():
        found[name] = hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("quant_type", "double"), FORMS)
def test_what_an_adapter_may_touch_is_held_in_4_bits_and_the_rest_as_it_is(
    tmp_path: Path, family: str, quant_type: str, double: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    model = load_model(make_base(tmp_path, family), quantized(quant_type, double))
    original = make_model(family)
    linears = [(name, module) for name, module in model.named_modules() if frozen_of(module) is not None]
    assert any(isinstance(module, Linear4bit) for _, module in linears)
    for name, module in linears:
        assert isinstance(module, Linear4bit) == can_be_adapted(name)
        ours, plain = frozen_of(module), frozen_of(original.get_submodule(name))
        assert ours is not None
        assert plain is not None
        assert (ours.in_features, ours.out_features) == (plain.in_features, plain.out_features)
        if isinstance(module, Linear4bit):
            weight: Any = module.weight
            assert (weight.quant_type, weight.quant_state.nested) == (quant_type, double)
            assert module.compute_dtype == torch.float32
            exact = plain.product(torch.eye(plain.in_features))
            assert (ours.product(torch.eye(ours.in_features)) - exact).abs().mean() < 0.12 * exact.std()
    others = {name: tensor for name, tensor in model.named_parameters() if tensor.is_floating_point()}
    assert {"gpt2": "transformer.wte.weight"}.get(family, "model.embed_tokens.weight") in others
    assert all(torch.equal(tensor, original.get_parameter(name)) for name, tensor in others.items())
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("double", [True, False])
def test_every_load_gives_the_same_packed_bytes(tmp_path: Path, double: bool) -> None:
    make_base(tmp_path)
    first, second = (packed_bytes(load_model(tmp_path, quantized(double=double))) for _ in range(2))
    assert first == second
    assert first != packed_bytes(load_model(tmp_path, quantized(double=not double)))
    make_base(tmp_path, seed=1)
    assert first != packed_bytes(load_model(tmp_path, quantized(double=double)))


def test_weights_that_are_missing_for_a_4_bit_base_are_refused(tmp_path: Path) -> None:
    base = copy_with_config(make_base(tmp_path / "base"), tmp_path / "deeper", lambda raw: raw.update(num_hidden_layers=3))
    with pytest.raises(BadInput, match=r"has no weights for model.layers.2"):
        load_model(base, quantized())


def test_a_base_whose_weights_were_quantised_before_is_refused(tmp_path: Path, test_data: Path) -> None:
    ground = Ground(tmp_path, test_data)
    stored = copy_with_config(
        ground.base, tmp_path / "stored", lambda raw: raw.update(quantization_config={"quant_method": "bitsandbytes"})
    )
    with pytest.raises(BadInput, match="holds weights that were quantised before; give the base they were made of"):
        ground.job(base_model={"name_or_path": str(stored)})


WITHOUT = """
import sys
from pathlib import Path
from infra.errors import BadInput
from workers.loading import load_model
from workers.spec import BaseModelSpec, QuantizationSpec
spec = BaseModelSpec(name_or_path="x", quantization=QuantizationSpec(load_in_4bit=True))
assert "bitsandbytes" not in sys.modules
sys.modules["bitsandbytes"] = None
try:
    load_model(Path(sys.argv[1]), spec)
except BadInput as error:
    print(error)
load_model(Path(sys.argv[1]), BaseModelSpec(name_or_path="x"))
del sys.modules["bitsandbytes"]
load_model(Path(sys.argv[1]), spec)
"""


def test_without_bitsandbytes_a_4_bit_base_is_a_sentence_and_with_it_loads_quietly(tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, "-c", WITHOUT, make_base(tmp_path)], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith("4-bit bases need the package bitsandbytes, which cannot be imported")
    assert run.stdout.count("\n") == 1


def test_training_views_tell_the_forms_of_a_base_apart() -> None:
    forms = [quantized(*form, dtype) for form in FORMS for dtype in ("float32", "bfloat16")]
    views = {training_view(spec) for spec in [*forms, BaseModelSpec(name_or_path="x")]}
    assert len(views) == 9


def pack_on(base: Path, *form: Any) -> Pack:
    return Pack(ResidentBase(load_model(base, quantized(*form))))


def rows_of(count: int, seed: int) -> list[Example]:
    """Ragged rows within the vocabulary of the tiny bases."""
    return [replace(row, input_ids=[token % 64 for token in row.input_ids]) for row in examples_of(count, seed)]


def join(pack: Pack, seed: int, **changes: Any) -> Training:
    peft, training = specs_of(seed=seed, **{"r": 2 + 3 * (seed % 3), "max_steps": 5, **changes})
    return pack.join(peft, training, rows_of(12 + seed, seed), rows_of(5, 100 + seed))


def run(pack: Pack, trainings: Sequence[Training]) -> None:
    while left := [one for one in trainings if not one.is_done]:
        pack.advance(left)
        if due := [one for one in left if one.evaluation_is_due and not one.is_mid_step]:
            pack.evaluate(due)


@pytest.mark.parametrize("form", [("nf4", True), ("fp4", False)])
def test_adapters_of_a_pack_on_a_4_bit_base_are_those_trained_alone(tmp_path: Path, form: tuple[str, bool]) -> None:
    base = make_base(tmp_path)
    pack = pack_on(base, *form)
    together = [join(pack, seed) for seed in range(4)]
    run(pack, together)
    for seed, one in enumerate(together):
        by_itself = pack_on(base, *form)
        alone = join(by_itself, seed)
        run(by_itself, [alone])
        assert all(torch.equal(a, b) for a, b in zip(one.kept_tensors().values(), alone.kept_tensors().values(), strict=True))
        assert one.standing == alone.standing


@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_switched_in_measures_what_it_measured_in_its_pack(tmp_path: Path, form: tuple[str, bool]) -> None:
    pack = pack_on(make_base(tmp_path), *form)
    training = join(pack, 1, learning_rate=3e-2)
    run(pack, [training])
    pack.base.switch(training.kept_factors())
    measured = measure(pack.base, training.validation, 3).metrics(0)
    assert measured["eval/loss"] == pytest.approx(training.kept_metrics()["eval/loss"], rel=1e-6)


class Counting(TorchDispatchMode):
    """Counts the dequantisations while it is open."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += str(func).startswith("bitsandbytes.dequantize_4bit")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("size", [1, 8])
def test_a_pass_dequantises_each_linear_once_forward_and_once_backward(tmp_path: Path, size: int) -> None:
    pack = pack_on(make_base(tmp_path))
    trainings = [join(pack, seed) for seed in range(size)]
    with Counting() as forward:
        pack.evaluate(trainings)
    with Counting() as both:
        pack.advance(trainings)
    num_linears = len(pack.base.layers)
    assert num_linears == 14
    assert forward.count == num_linears
    # the input of the first block's query, key and value is the embedding, which has no gradient
    assert both.count == 2 * num_linears - 3


def test_an_adapter_is_evaluated_on_the_base_as_it_was_held_in_training(tmp_path: Path, test_data: Path) -> None:
    ground = Ground(tmp_path, test_data)
    job, plain = ground.job(base_model={"quantization": QUANTIZED}), ground.job()
    assert job.base.base_id == plain.base.base_id
    assert job.job_id != plain.job_id
    splits, renderer = ground.resolver.read(job.spec)
    rows = splits.validation or []
    pack = Pack(ResidentBase(load_model(ground.base, job.spec.base_model)))
    training = pack.join(job.spec.peft, job.spec.training, renderer.render_all(splits.train), renderer.render_all(rows))
    run(pack, [training])
    adapter = build_adapter(job.spec.peft, pack.base.model, training.kept_tensors(), str(ground.base))
    benches = [Bench(ground.base, one.spec.base_model, one.spec.training.max_length) for one in (job, plain)]
    losses = [bench.evaluate(adapter, rows, EvaluationSpec())["eval/loss"] for bench in benches]
    assert losses[0] == pytest.approx(training.kept_metrics()["eval/loss"], rel=1e-6)
    assert losses[1] != pytest.approx(losses[0], rel=1e-4)


def test_an_adapter_for_a_4_bit_gpt2_is_described_as_one_for_the_plain_base(tmp_path: Path) -> None:
    base = make_base(tmp_path, "gpt2")
    configs = []
    for spec in (quantized(), BaseModelSpec(name_or_path="x")):
        pack = Pack(ResidentBase(load_model(base, spec)))
        training = join(pack, 0, target_modules=["c_attn"])
        configs.append(build_adapter(training.peft, pack.base.model, training.kept_tensors(), "gpt2").config)
    assert configs[0] == configs[1]
    assert configs[0]["fan_in_fan_out"] is True


def peft_qlora(base: Path, quant_type: str, double: bool, rank: int, alpha: Any, targets: list[str]) -> nn.Module:
    """Return PEFT's model on the base as transformers quantises it. In training mode, where bitsandbytes leaves weights alone."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.float32)
    lora = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM")
    peft_model: nn.Module = get_peft_model(model, lora)
    return peft_model.train()


def peft_losses(model: nn.Module, ours: Alone) -> list[float]:
    """Train PEFT's model with torch's AdamW from our initial weights, on the rows of our steps."""
    training, trainable = ours.training, [one for one in model.parameters() if one.requires_grad]
    initial, spec = training.kept_tensors(), training.training
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(initial.pop(name.replace(".default", "")))
    assert not initial
    optimizer = torch.optim.AdamW(trainable, lr=0.0, weight_decay=spec.weight_decay)
    losses = []
    for step in range(training.num_steps):
        parts = [
            padded_loss_sum(model, [training.train[row] for row in rows])
            for rows in rows_of_step(spec, len(training.train), step)
        ]
        loss = torch.stack([part for part, _ in parts]).sum() / sum(count for _, count in parts)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, spec.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(spec, step, training.num_steps)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize(
    ("family", "quant_type", "double"),
    [("llama", *form) for form in FORMS] + [("qwen2", "nf4", True), ("gpt2", "nf4", True)],
)
def test_qlora_gives_the_losses_of_peft(tmp_path: Path, family: str, quant_type: str, double: bool) -> None:
    base = make_base(tmp_path, family, **WIDTHS[family])
    targets = ["c_attn", "c_proj", "c_fc"] if family == "gpt2" else ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
    peft, training = specs_of(
        target_modules=targets,
        max_steps=10,
        gradient_accumulation_steps=2,
        weight_decay=0.1,
        max_grad_norm=0.5,
        learning_rate=1e-2,
    )
    pack = pack_on(base, quant_type, double)
    ours = Alone(pack, pack.join(peft, training, rows_of(22, 0), []))
    expected = peft_losses(peft_qlora(base, quant_type, double, peft.r, peft.lora_alpha, targets), ours)
    losses = ours.run()
    assert len(losses) == 10
    assert losses == pytest.approx(expected, abs=1e-5)
    assert losses[-1] < losses[0] - 0.01
