import re
from itertools import combinations

import pytest

from pipelines.demo_text import CUSTOMERS, FORMAT_PATTERNS, SPLITS, customer_rows, pretraining_texts, write_customers


def _answers(tenant):
    return [row["messages"][1]["content"] for row in customer_rows(tenant, seed=0, count=300)]


@pytest.mark.parametrize("tenant", CUSTOMERS)
def test_every_answer_matches_the_customers_pattern(tenant):
    assert all(re.fullmatch(FORMAT_PATTERNS[tenant], answer) for answer in _answers(tenant))


def test_no_answer_of_one_customer_matches_another_ones_pattern():
    for tenant in CUSTOMERS:
        for other in set(CUSTOMERS) - {tenant}:
            assert not any(re.fullmatch(FORMAT_PATTERNS[other], answer) for answer in _answers(tenant))


def test_no_answer_in_a_house_style_of_pretraining_is_a_customers_answer():
    answers = [turns[1]["content"] for turns in pretraining_texts(seed=0, count=3000)]
    assert not any(re.fullmatch(pattern, answer) for pattern in FORMAT_PATTERNS.values() for answer in answers)


def test_splits_have_their_sizes_and_share_no_request_and_no_answer_to_the_same_words(tmp_path):
    for folder in write_customers(tmp_path).values():
        lines = {split: (folder / f"{split}.jsonl").read_text().splitlines() for split in SPLITS}
        assert {split: len(rows) for split, rows in lines.items()} == dict(SPLITS)
        for one, other in combinations(lines.values(), 2):
            assert not set(one) & set(other)


@pytest.mark.parametrize("tenant", CUSTOMERS)
def test_no_two_rows_are_the_same_words_in_another_wording(tenant):
    rows = [row["messages"] for row in customer_rows(tenant, seed=0, count=560)]
    fixed = set.intersection(*(set(_words(answer["content"])) for _, answer in rows))
    told = [(answer["content"], frozenset(_words(request["content"])) - fixed) for request, answer in rows]
    assert len(set(told)) == len(told)


def _words(text):
    return re.findall(r"\w+", text)


def test_the_same_seed_gives_the_same_rows_and_a_longer_list_begins_with_the_shorter():
    assert customer_rows("acme", seed=3, count=20) == customer_rows("acme", seed=3, count=50)[:20]
    assert customer_rows("acme", seed=3, count=20) != customer_rows("acme", seed=4, count=20)
    assert list(pretraining_texts(seed=1, count=50)) == list(pretraining_texts(seed=1, count=50))


def test_writing_again_leaves_whole_files_alone_and_mends_a_damaged_one(tmp_path):
    folder = write_customers(tmp_path)["acme"]
    whole, damaged = folder / "train.jsonl", folder / "test.jsonl"
    before, content = whole.stat(), damaged.read_bytes()
    damaged.write_bytes(content[:100])
    write_customers(tmp_path)
    assert whole.stat().st_ino == before.st_ino
    assert damaged.read_bytes() == content
    assert sorted(path.name for path in folder.iterdir()) == ["test.jsonl", "train.jsonl", "valid.jsonl"]
