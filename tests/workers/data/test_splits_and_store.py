"""Rows are found where people say they are, split by content, and kept by digest."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import BadInput, ObjectNotFound, ServiceUnavailable, WorkFailed
from infra.local_storage import LocalStorage
from infra.stores import open_store
from workers import layout
from workers.data.rows import Row, canonical_rows, digest_of
from workers.data.splits import load_splits, split_rows
from workers.data.store import load_rows, save_rows
from workers.spec import DataSpec


def texts(count: int, prefix: str = "row") -> list[dict[str, Any]]:
    return [{"text": f"{prefix} {number}"} for number in range(count)]


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jsonl(rows))


def refusal(spec: DataSpec, folder: Path) -> str:
    with pytest.raises(BadInput) as caught:
        load_splits(spec, folder)
    return str(caught.value)


def test_a_folder_gives_its_splits(tmp_path: Path) -> None:
    for name, count in (("train", 3), ("valid", 2), ("test", 1)):
        write(tmp_path / "acme" / f"{name}.jsonl", texts(count, name))
    splits = load_splits(DataSpec(train="acme"), tmp_path)
    assert [len(rows or []) for rows in (splits.train, splits.validation, splits.test)] == [3, 2, 1]
    assert splits.train[0].where == "acme/train.jsonl:1"
    assert splits.notes == []


def test_a_named_file_goes_before_the_one_in_the_folder(tmp_path: Path) -> None:
    write(tmp_path / "acme" / "train.jsonl", texts(3))
    write(tmp_path / "acme" / "validation.jsonl", texts(2, "folder"))
    write(tmp_path / "other.jsonl", texts(1, "named"))
    splits = load_splits(DataSpec(train="acme", validation="other.jsonl", validation_split=0.5), tmp_path)
    assert [row.body["text"] for row in splits.validation or []] == ["named 0"]
    assert splits.notes == ["data.validation_split has no effect, because there are validation rows."]


def test_a_glob_takes_its_files_in_order(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write(tmp_path / f"part-{name}.jsonl", texts(1, name))
    assert [row.where for row in load_splits(DataSpec(train="part-*.jsonl"), tmp_path).train] == [
        "part-a.jsonl:1",
        "part-b.jsonl:1",
    ]


def test_a_split_goes_by_content_and_not_by_order(tmp_path: Path) -> None:
    rows = texts(400)
    write(tmp_path / "one" / "data.jsonl", rows)
    random.Random(0).shuffle(rows)
    write(tmp_path / "two" / "data.jsonl", rows[:300])
    one, two = (load_splits(DataSpec(train=name, validation_split=0.25), tmp_path) for name in ("one", "two"))
    chosen = {row.body["text"] for row in one.validation or []}
    assert 60 < len(chosen) < 140
    assert {row.body["text"] for row in two.validation or []} == chosen & {row["text"] for row in rows[:300]}
    assert len(one.train) + len(chosen) == 400


def test_a_split_that_leaves_a_side_empty_is_refused() -> None:
    rows = [Row(body, "x:1") for body in texts(3)]
    with pytest.raises(BadInput, match=r"validation_split 1e-06 of 3 rows leaves none for validation"):
        split_rows(rows, 1e-6)


def test_duplicates_are_noted_and_kept(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [*texts(3), *texts(1)])
    write(tmp_path / "valid.jsonl", texts(2))
    splits = load_splits(DataSpec(train="."), tmp_path)
    assert len(splits.train) == 4
    assert splits.notes == [
        "1 of 4 training rows repeat an earlier one.",
        "2 of 2 validation rows stand in the training rows as well; their scores flatter.",
    ]


def test_sources_that_are_not_there_are_refused_with_what_is(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", texts(1))
    assert "Did you mean train.jsonl?" in refusal(DataSpec(train="trian.jsonl"), tmp_path)
    assert "no file matches x*.jsonl" in refusal(DataSpec(train="x*.jsonl"), tmp_path)
    assert "data.validation: . has no validation.* file" in refusal(DataSpec(train="train.jsonl", validation="."), tmp_path)
    (tmp_path / "empty").mkdir()
    assert "Nothing is there." in refusal(DataSpec(train="empty"), tmp_path)
    (tmp_path / "train.csv").write_text("text\nx\n")
    assert "holds train.csv and train.jsonl" in refusal(DataSpec(train="."), tmp_path)


def test_splits_of_two_kinds_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", texts(1))
    write(tmp_path / "valid.jsonl", [{"prompt": "a", "completion": "b"}])
    assert "is prompt_completion while" in refusal(DataSpec(train="."), tmp_path)


def test_rows_are_read_from_s3(s3_bucket: str, tmp_path: Path) -> None:
    store = open_store(f"{s3_bucket}/acme")
    for name in ("train", "valid"):
        store.put(f"{name}.jsonl", jsonl(texts(2, name)))
    store.put("older/train.jsonl", jsonl(texts(9)))
    splits = load_splits(DataSpec(train=f"{s3_bucket}/acme/"), tmp_path)
    assert [row.where for row in splits.train] == [f"{s3_bucket}/acme/train.jsonl:1", f"{s3_bucket}/acme/train.jsonl:2"]
    assert [row.body["text"] for row in splits.validation or []] == ["valid 0", "valid 1"]
    assert splits.test is None
    assert len(load_splits(DataSpec(train=f"{s3_bucket}/acme/*.jsonl"), tmp_path).train) == 4
    assert "Did you mean train.jsonl" in refusal(DataSpec(train=f"{s3_bucket}/acme/trian.jsonl"), tmp_path)
    assert "no object matches" in refusal(DataSpec(train=f"{s3_bucket}/acme/z*.csv"), tmp_path)
    with pytest.raises(ServiceUnavailable):
        load_splits(DataSpec(train=f"{s3_bucket}-is-not-there/train.jsonl"), tmp_path)


printable = st.text('ab \n\r\x85\u2028"é漢😀\x7f')


@settings(deadline=None)
@given(prompt=printable, completion=printable)
def test_canonical_bytes_do_not_depend_on_key_order(prompt: str, completion: str) -> None:
    one = Row({"prompt": prompt, "completion": completion}, "a:1")
    other = Row({"completion": completion, "prompt": prompt}, "b:2")
    assert canonical_rows([one]) == canonical_rows([other])
    assert json.loads(canonical_rows([one])) == one.body


@settings(deadline=None, max_examples=15)
@given(bodies=st.lists(st.fixed_dictionaries({"text": printable}), min_size=1, max_size=5))
def test_kept_rows_come_back_as_they_were(tmp_path_factory: pytest.TempPathFactory, bodies: list[dict[str, str]]) -> None:
    store = LocalStorage(tmp_path_factory.mktemp("store"))
    ref = save_rows(store, "acme", [Row(body, "x:1") for body in bodies])
    assert ref.num_rows == len(bodies)
    assert [row.body for row in load_rows(store, "acme", ref.digest)] == bodies


def test_saving_again_changes_nothing(local_store: LocalStorage) -> None:
    rows = [Row(body, "x:1") for body in texts(3)]
    ref = save_rows(local_store, "acme", rows)
    before = [(info.key, info.modified) for info in local_store.list("")]
    assert save_rows(local_store, "acme", rows) == ref
    assert [(info.key, info.modified) for info in local_store.list("")] == before
    assert [key for key, _ in before] == [f"{layout.data('acme', ref.digest)}{name}" for name in ("data.json", "rows.jsonl")]


def test_a_set_whose_record_was_not_written_yet_is_saved_again(local_store: LocalStorage) -> None:
    rows = [Row(body, "x:1") for body in texts(3)]
    ref = save_rows(local_store, "acme", rows)
    local_store.delete(f"{layout.data('acme', ref.digest)}data.json")
    with pytest.raises(ObjectNotFound, match="keeps no rows"):
        load_rows(local_store, "acme", ref.digest)
    assert save_rows(local_store, "acme", rows) == ref
    assert len(load_rows(local_store, "acme", ref.digest)) == 3


def test_damaged_rows_are_not_read(local_store: LocalStorage) -> None:
    ref = save_rows(local_store, "acme", [Row(body, "x:1") for body in texts(3)])
    local_store.put(f"{layout.data('acme', ref.digest)}rows.jsonl", jsonl(texts(2)))
    with pytest.raises(WorkFailed, match="does not match its digest"):
        load_rows(local_store, "acme", ref.digest)


def test_order_is_part_of_the_digest() -> None:
    rows = [Row(body, "x:1") for body in texts(2)]
    assert digest_of(canonical_rows(rows)) != digest_of(canonical_rows(rows[::-1]))
