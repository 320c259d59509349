"""Scores of many adapters in shared passes: those that each has alone, and nobody's mistake is another's."""

import itertools
import random
from pathlib import Path

import pytest
import torch

from infra.errors import BadInput
from tests.workers.tiny_adapters import classify_with_peft, train_with_peft
from tests.workers.tiny_bases import WORDS, make_base, make_encoder_base, write_tokenizer
from workers.adapter import A_SUFFIX, B_SUFFIX, PREFIX, Adapter, lora_config, make_adapter
from workers.adapter_files import read_adapter_folder
from workers.data.rows import Row
from workers.evaluate import Bench
from workers.scores import RowScores
from workers.scoring import PackedBench, ScoreCase
from workers.spec import BaseModelSpec, EvaluationSpec

TARGETS = [["q_proj"], ["q_proj", "k_proj", "v_proj"], ["gate_proj", "down_proj"], ["o_proj", "up_proj"]]
MAX_LENGTH = 96
ASKED = EvaluationSpec()


def spec_of(base: Path) -> BaseModelSpec:
    return BaseModelSpec(name_or_path=str(base))


@pytest.fixture(scope="module")
def stories(test_data: Path) -> Path:
    return test_data / "bases" / "stories260k"


@pytest.fixture(scope="module")
def bench(stories: Path) -> Bench:
    return Bench(stories, spec_of(stories), MAX_LENGTH)


@pytest.fixture(scope="module")
def packed(stories: Path) -> PackedBench:
    return PackedBench(stories, spec_of(stories), MAX_LENGTH)


def noise(bench: Bench, seed: int, *, r: int = 4, scale: float = 0.3) -> Adapter:
    """An adapter of random factors; `scale` 0 makes one that does nothing."""
    targets, generator = TARGETS[seed % len(TARGETS)], torch.Generator().manual_seed(seed)
    tensors = {}
    for name, layer in bench.base.layers.items():
        if name.rpartition(".")[2] in targets:
            tensors[f"{PREFIX}{name}{A_SUFFIX}"] = torch.randn(r, layer.in_features, generator=generator)
            tensors[f"{PREFIX}{name}{B_SUFFIX}"] = torch.randn(layer.out_features, r, generator=generator) * scale
    config = lora_config(
        r=r, lora_alpha=r + seed, lora_dropout=0.0, use_rslora=False, target_modules=targets, base_model_name_or_path="base"
    )
    return make_adapter(config, tensors, "a test")


def rows(number: int, seed: int) -> list[Row]:
    words = ("once", "upon", "a", "time", "there", "was", "a", "girl", "who", "loved", "to", "play", "with", "her", "red", "ball")
    drawn = random.Random(seed)
    texts = [" ".join(drawn.choices(words, k=drawn.randint(1, 18))) for _ in range(number)]
    return [Row({"prompt": f"Say {len(text)}:", "completion": text}, f"row {place}") for place, text in enumerate(texts)]


@pytest.fixture(scope="module")
def cases(bench: Bench) -> list[ScoreCase]:
    """Customers with 1 to 40 rows, each with two adapters and the plain base."""
    found = []
    for number, size in enumerate((1, 3, 16, 17, 40)):
        own = rows(size, number)
        adapters = [noise(bench, number, r=number + 1), noise(bench, number + 7, r=16), None]
        found += [ScoreCase(adapter, own, ASKED) for adapter in adapters]
    return found


@pytest.fixture(scope="module")
def alone(bench: Bench, cases: list[ScoreCase]) -> list[RowScores]:
    return [bench.scores(case.adapter, case.rows, case.evaluation) for case in cases]


def test_scores_in_shared_passes_are_those_of_each_case_alone(packed, cases, alone) -> None:
    assert packed.score(cases) == alone


@pytest.mark.parametrize("seed", range(3))
def test_scores_do_not_depend_on_order_or_budget_or_slots(stories, packed, cases, alone, seed: int) -> None:
    drawn = random.Random(seed)
    order = drawn.sample(range(len(cases)), len(cases))
    tight = PackedBench(
        stories,
        spec_of(stories),
        MAX_LENGTH,
        max_tokens=drawn.choice([32, 700, 4096]),
        slots=drawn.choice([1, 4]),
        base=packed.base,
    )
    found = dict(zip(order, tight.score([cases[place] for place in order]), strict=True))
    assert [found[place] for place in range(len(cases))] == alone


def test_case_that_is_wrong_is_told_of_that_case_alone(packed, cases, alone) -> None:
    other = make_adapter(
        lora_config(r=1, lora_alpha=1, lora_dropout=0.0, use_rslora=False, target_modules=["q_proj"], base_model_name_or_path=""),
        {
            f"{PREFIX}model.layers.0.self_attn.q_proj{A_SUFFIX}": torch.ones(1, 7),
            f"{PREFIX}model.layers.0.self_attn.q_proj{B_SUFFIX}": torch.ones(7, 1),
        },
        "a test",
    )
    empty = [Row({"prompt": "a " * 200, "completion": "cut away"}, "row 1")]
    wrong = [ScoreCase(other, cases[0].rows, ASKED), ScoreCase(None, empty, ASKED)]
    first, *found, last = packed.try_score([wrong[0], *cases, wrong[1]])
    assert found == alone
    assert isinstance(first, BadInput)
    assert "does not fit this base" in str(first)
    assert isinstance(last, BadInput)
    assert "no supervised token" in str(last)
    with pytest.raises(BadInput, match="does not fit this base"):
        packed.score(wrong)


def test_adapter_that_overflows_harms_none_of_its_neighbours(bench, packed, cases, alone) -> None:
    huge = ScoreCase(noise(bench, 1, scale=1e37), cases[3].rows, ASKED)
    found = packed.score([huge, *cases[:6], huge])
    assert found[1:-1] == alone[:6]
    assert not all(torch.isfinite(torch.tensor(found[0].loss)))


def test_answers_are_those_that_each_adapter_gives_alone(bench, packed, cases) -> None:
    asked = EvaluationSpec(max_new_tokens=3, format_pattern=".*")
    some = [ScoreCase(case.adapter, case.rows, asked, answers=True) for case in cases[3:6]]
    assert packed.score(some) == [bench.scores(case.adapter, case.rows, asked, answers=True) for case in some]


def test_effects_are_found_together_as_alone(bench, packed) -> None:
    adapters = [noise(bench, seed, scale=0.0 if seed % 3 == 0 else 0.3) for seed in range(20)]
    adapters[4] = noise(bench, 4, scale=1e37)
    found = packed.effects(adapters)
    assert found == [bench.moves_logits(adapter) for adapter in adapters]
    assert found == [seed % 3 != 0 and seed != 4 for seed in range(20)], "what does nothing, and what is not finite, has none"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_families_keep_the_bits_of_an_adapter_alone(tmp_path: Path, family: str) -> None:
    base = make_base(tmp_path / "base", family)
    write_tokenizer(base, family)
    for number in range(3):
        train_with_peft(tmp_path / str(number), family, seed=number, r=number + 2)
    check_packed(base, [read_adapter_folder(tmp_path / str(number)) for number in range(3)])


@pytest.mark.parametrize("family", ["bert", "roberta", "llama"])
def test_classifiers_keep_the_bits_of_an_adapter_alone(tmp_path: Path, family: str) -> None:
    base = make_encoder_base(tmp_path / "base", family)
    for number in range(3):
        classify_with_peft(tmp_path / str(number), family, seed=number, r=number + 2)
    check_packed(base, [read_adapter_folder(tmp_path / str(number)) for number in range(3)])


def check_packed(base: Path, adapters: list[Adapter]) -> None:
    labels = adapters[0].labels
    drawn, cases = random.Random(0), []
    for adapter, size in itertools.product([*adapters, None], (1, 5, 20)):
        texts = [" ".join(drawn.choices(WORDS, k=drawn.randint(1, 20))) for _ in range(size)]
        bodies = [{"text": text, "label": drawn.choice(labels)} if labels else {"text": text} for text in texts]
        cases.append(ScoreCase(adapter, [Row(body, "a row") for body in bodies], ASKED))
    bench, packed = Bench(base, spec_of(base), 32, labels=labels), PackedBench(base, spec_of(base), 32, labels)
    drawn.shuffle(cases)
    assert packed.score(cases) == [bench.scores(case.adapter, case.rows, ASKED) for case in cases]
    assert packed.effects(adapters) == [bench.moves_logits(adapter) for adapter in adapters] == [True] * len(adapters)
