"""Read leniently, a source gives its good rows and a list; only a store that is away stops it."""

import json
import random
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.data.rows import Row
from workers.data.sifting import GIVE_UP_AFTER, MAX_LISTED, Quarantine, SiftedRows, printable, sift_source
from workers.data.splits import load_splits
from workers.spec import DataSpec

ASK = {"prompt": "Why?", "completion": "So."}
CHAT = {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]}


def write(path: Path, *lines: dict[str, Any] | bytes) -> Path:
    path.write_bytes(b"".join((json.dumps(line).encode() if isinstance(line, dict) else line) + b"\n" for line in lines))
    return path


def sift(source: Path, **options: Any) -> tuple[SiftedRows, Quarantine]:
    quarantine = Quarantine()
    spec = DataSpec(train=str(source), **options.pop("data", {}))
    return sift_source(spec, source.parent, quarantine, **options), quarantine


def problems(quarantine: Quarantine) -> list[str]:
    return [problem for _, problem in quarantine.entries]


def test_healthy_files_read_as_they_do_strictly(test_data: Path) -> None:
    folder = test_data / "sets/snips/customers/get-weather"
    sifted, quarantine = sift(folder)
    strict = load_splits(DataSpec(train=str(folder)), folder)
    assert (sifted.train, sifted.validation, sifted.test) == (strict.train, strict.validation, strict.test)
    assert (quarantine.entries, quarantine.num_rows, quarantine.unread) == ([], 0, [])


def test_the_form_of_most_rows_wins_though_the_first_is_another(tmp_path: Path) -> None:
    sifted, quarantine = sift(write(tmp_path / "train.jsonl", ASK, CHAT, CHAT, {"text": "x"}))
    assert [row.body for row in sifted.train] == [CHAT, CHAT]
    assert quarantine.entries[0] == (
        f"{tmp_path}/train.jsonl:1", "is prompt_completion while most rows are messages; keep one format per source",
    )  # fmt: skip
    assert quarantine.num_rows == 2


def test_held_out_rows_of_another_kind_are_put_aside(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", CHAT, CHAT)
    write(tmp_path / "test.jsonl", ASK)
    sifted, quarantine = sift(tmp_path)
    assert (len(sifted.train), sifted.validation, sifted.test) == (2, None, [])
    assert "while the training rows are messages" in problems(quarantine)[0]


def test_a_long_line_is_one_bad_row_and_the_next_follows(tmp_path: Path) -> None:
    fits = {"text": "x" * (1000 - len('{"text": ""}\n'))}
    path = write(tmp_path / "train.jsonl", fits, {"text": "y" * 5000}, {"text": "z"}, b"w" * 999)
    sifted, quarantine = sift(path, max_line_bytes=1000)
    assert [row.body["text"][0] for row in sifted.train] == ["x", "z"]
    assert [where.rpartition(":")[2] for where, _ in quarantine.entries] == ["2", "4"]


CSV = b"prompt,completion\na,b\n%s\nc,d\n"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"only one", "has 1 cells where the first line names 2 columns"),
        (b"caf\xe9,x", "is not UTF-8"),
        (b"x," + b"y" * 2000, "is longer than"),
        (b'"x"y,z', "is not valid CSV"),
        (b"x,", "'completion' is empty"),
    ],
)
def test_a_bad_line_of_csv_is_one_bad_row(tmp_path: Path, line: bytes, problem: str) -> None:
    (tmp_path / "train.csv").write_bytes(CSV % line)
    sifted, quarantine = sift(tmp_path / "train.csv", max_line_bytes=1024)
    assert [row.body["prompt"] for row in sifted.train] == ["a", "c"]
    assert [row.where.rpartition(":")[2] for row in sifted.train] == ["2", "4"]
    assert problem in problems(quarantine)[0]
    assert quarantine.entries[0][0].endswith(":3")
    assert not quarantine.unread


@pytest.mark.parametrize("content", [CSV % b'"x', b'"prompt,completion\na,b\n', CSV % (b'"x\n' + b"y\n" * 1000)])
def test_an_open_quote_loses_the_rest_of_the_file_and_says_so(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "train.csv").write_bytes(content)
    _, quarantine = sift(tmp_path / "train.csv", max_line_bytes=1024)
    assert "where the next row begins is not known" in quarantine.unread[0]


def test_a_value_of_parquet_that_is_no_text_is_one_bad_row(tmp_path: Path) -> None:
    texts = pyarrow.array([b"a", b"\xff\xfe", *[b"c"] * 200]).cast(pyarrow.string(), safe=False)
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "train.parquet")
    sifted, quarantine = sift(tmp_path / "train.parquet")
    assert len(sifted.train) == 201
    assert quarantine.entries[0][0].endswith("train.parquet:2")
    assert sifted.train[-1].where.endswith(":202")


def test_a_damaged_file_beside_good_ones_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", CHAT)
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and no more")
    sifted, quarantine = sift(tmp_path / "*")
    assert len(sifted.train) == 1
    assert "b.parquet is not a readable Parquet file" in quarantine.unread[0]


def test_a_file_of_garbage_is_left_early_and_its_list_is_bounded(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", *[b"garbage"] * (GIVE_UP_AFTER + 500))
    _, quarantine = sift(tmp_path / "train.jsonl")
    assert "are bad" in quarantine.unread[0]
    assert quarantine.num_rows == GIVE_UP_AFTER
    assert len(quarantine.entries) <= MAX_LISTED + 1


def test_more_rows_than_a_night_has_room_for_are_not_read(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", *[{"text": "x" * 100}] * 100)
    sifted, quarantine = sift(tmp_path / "train.jsonl", max_rows_bytes=5000)
    assert 0 < len(sifted.train) < 60
    assert "more room" in quarantine.unread[0]


def test_what_is_listed_prints(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", {"a\x1b[31m\ud800\n\u202e": "x", **{f"key{n}" * 20: 1 for n in range(7)}})
    _, quarantine = sift(tmp_path / "train.jsonl")
    assert all(text.isprintable() and len(text) < 700 for entry in quarantine.entries for text in entry)
    assert printable("a\ud800\n") == "a\\ud800\\n"


@settings(max_examples=150, deadline=None)
@given(content=st.one_of(st.binary(max_size=300), st.text(max_size=300).map(lambda text: text.encode("utf-8", "surrogatepass"))))
def test_no_bytes_raise(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.getbasetemp() / "any"
    folder.mkdir(exist_ok=True)
    for suffix in ("jsonl", "csv", "parquet"):
        (folder / f"train.{suffix}").write_bytes(content)
        sift(folder / f"train.{suffix}", max_line_bytes=64)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_no_damage_to_a_good_file_raises(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"train.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([CHAT] * 50), path)
    elif suffix == "csv":
        path.write_bytes(b"prompt,completion\n" + b'"a, b","c\nd"\n' * 50)
    else:
        write(path, *[CHAT] * 50)
    whole, chance = path.read_bytes(), random.Random(0)
    for _ in range(100):
        damaged = bytearray(whole)
        for _ in range(chance.choice((1, 3, 30))):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        path.write_bytes(bytes(damaged[: chance.choice((len(damaged), chance.randrange(len(damaged))))]))
        sifted, _ = sift(path)
        assert all(isinstance(row, Row) for row in sifted.train)


@pytest.mark.parametrize("source", ["nothing", "no/such/*.jsonl", "a" * 300, "a\0b", "train.txt"])
def test_a_source_that_is_not_there_is_one_entry(tmp_path: Path, source: str) -> None:
    (tmp_path / "train.txt").write_text("x")
    quarantine = Quarantine()
    sifted = sift_source(DataSpec(train=source), tmp_path, quarantine)
    assert sifted.train == []
    assert len(quarantine.entries) == len(quarantine.unread) == 1
