"""Scores of single rows: what the whole set gives, row by row, and the same whoever stands beside a row."""

from pathlib import Path

import pytest
import torch

from tests.workers.tiny_bases import make_encoder_base
from workers.adapter import A_SUFFIX, B_SUFFIX, PREFIX, Adapter, lora_config, make_adapter
from workers.data.rows import Row
from workers.evaluate import Bench
from workers.scores import parts_of
from workers.spec import BaseModelSpec, EvaluationSpec

MODULE = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def bench(test_data: Path) -> Bench:
    base = test_data / "bases" / "stories260k"
    return Bench(base, BaseModelSpec(name_or_path=str(base)), 64)


def noise(bench: Bench, scale: float) -> Adapter:
    layer, generator = bench.base.layers[MODULE], torch.Generator().manual_seed(0)
    tensors = {
        f"{PREFIX}{MODULE}{A_SUFFIX}": torch.randn(2, layer.in_features, generator=generator),
        f"{PREFIX}{MODULE}{B_SUFFIX}": torch.randn(layer.out_features, 2, generator=generator) * scale,
    }
    config = lora_config(
        r=2, lora_alpha=4, lora_dropout=0.0, use_rslora=False, target_modules=["q_proj"], base_model_name_or_path="base"
    )
    return make_adapter(config, tensors, "a test")


def rows(number: int) -> list[Row]:
    return [
        Row({"prompt": f"Count to {n}:", "completion": " ".join(map(str, range(n)))}, f"row {n}") for n in range(1, number + 1)
    ]


def test_rows_add_up_to_what_the_set_measures(bench: Bench) -> None:
    adapter, some = noise(bench, 0.5), rows(20)
    scores = bench.scores(adapter, some, EvaluationSpec())
    whole = bench.evaluate(adapter, some, EvaluationSpec())
    assert scores.num_rows == 20
    for metric in ("eval/loss", "eval/token_accuracy", "eval/bits_per_byte"):
        assert parts_of(scores, metric).value == pytest.approx(whole[metric], rel=1e-12), metric
    assert scores != bench.scores(None, some, EvaluationSpec())
    assert scores.exact_match is None


def test_score_of_a_row_does_not_depend_on_the_others(bench: Bench) -> None:
    adapter, some = noise(bench, 0.5), rows(20)
    together = bench.scores(adapter, some, EvaluationSpec())
    for number in (0, 7, 19):
        alone = bench.scores(adapter, some[number : number + 1], EvaluationSpec())
        assert alone.loss[0] == pytest.approx(together.loss[number], rel=1e-5)
        assert alone.num_targets[0] == together.num_targets[number]


def test_answers_are_generated_for_every_row_where_they_are_asked_for(bench: Bench) -> None:
    asked = EvaluationSpec(generate=1, max_new_tokens=2, format_pattern=".*")
    scores = bench.scores(None, rows(3), asked, answers=True)
    assert scores.exact_match is not None
    assert len(scores.exact_match) == 3
    assert scores.format_validity == (True, True, True)


def test_adapter_has_an_effect_or_has_none(bench: Bench) -> None:
    assert bench.moves_logits(noise(bench, 0.5))
    assert not bench.moves_logits(noise(bench, 0.0))


def test_rows_of_a_classifier_are_scored_one_by_one(tmp_path: Path) -> None:
    base = make_encoder_base(tmp_path / "bert")
    bench = Bench(base, BaseModelSpec(name_or_path=str(base)), 32, labels=("greet", "pay"))
    some = [Row({"text": text, "label": label}, text) for text, label in (("hello you", "greet"), ("pay my bill now", "pay"))]
    scores = bench.scores(None, some, EvaluationSpec())
    assert scores.loss == pytest.approx((0.6931, 0.6931), abs=1e-4), "the plain base tells nothing apart"
    assert scores.num_targets == (1, 1)
    assert parts_of(scores, "eval/accuracy").value == bench.evaluate(None, some, EvaluationSpec())["eval/accuracy"]
