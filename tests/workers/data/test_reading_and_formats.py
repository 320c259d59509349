"""Files that others wrote become canonical rows, or one sentence that names the place."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import BadInput
from workers.data.formats import FORMATS, ReadRows, to_rows
from workers.data.reading import MAX_LINE_BYTES, read_raw

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}
ONE_OF_EACH: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "messages": ({"messages": [USER, ASSISTANT]}, {"messages": [USER, ASSISTANT]}),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}], "system": "Be brief."},
        {"messages": [{"role": "system", "content": "Be brief."}, USER, ASSISTANT]},
    ),
    "preference": (
        {"prompt": "Hi", "chosen": "Yes", "rejected": "No"},
        {"prompt": "Hi", "chosen": "Yes", "rejected": "No"},
    ),
    "prompt_completion": ({"prompt": "Hi", "completion": " Yes"}, {"prompt": "Hi", "completion": " Yes"}),
    "alpaca": (
        {"instruction": "Add {x}.", "input": "1 {2}", "output": "3"},
        {
            "prompt": "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nAdd {x}.\n\n### Input:\n1 {2}\n\n### Response:",
            "completion": "3",
        },
    ),
    "classification": ({"text": "Hi", "label": 3}, {"text": "Hi", "label": "3"}),
    "text": ({"text": "Hi"}, {"text": "Hi"}),
}


def write(path: Path, *lines: str | bytes | dict[str, Any]) -> Path:
    encoded = [json.dumps(line) if isinstance(line, dict) else line for line in lines]
    path.write_bytes(b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in encoded))
    return path


def read(path: Path, format: str = "auto") -> ReadRows:
    return to_rows(read_raw(path, path.name), format, path.name)


def refusal(path: Path, format: str = "auto") -> str:
    with pytest.raises(BadInput) as caught:
        read(path, format)
    return str(caught.value)


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_is_detected_and_made_canonical(tmp_path: Path, name: str) -> None:
    written, canonical = ONE_OF_EACH[name]
    found = read(write(tmp_path / "rows.jsonl", written, "", written))
    assert found.format == name
    assert [row.body for row in found.rows] == [canonical, canonical]
    assert [row.where for row in found.rows] == ["rows.jsonl:1", "rows.jsonl:3"]


@pytest.mark.parametrize("name", FORMATS)
def test_parquet_rows_are_those_of_jsonl(tmp_path: Path, name: str) -> None:
    written, canonical = ONE_OF_EACH[name]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([written] * 3), tmp_path / "rows.parquet")
    found = read(tmp_path / "rows.parquet")
    assert [row.body for row in found.rows] == [canonical] * 3
    assert found.rows[2].where == "rows.parquet:3"


def test_csv_cells_may_span_lines_and_rows_keep_the_number_of_their_first_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([["prompt", "completion"], ["a\nb", 'say "é", twice'], ["c", "d"]])
    rows = read(path).rows
    assert [row.body for row in rows] == [
        {"prompt": "a\nb", "completion": 'say "é", twice'},
        {"prompt": "c", "completion": "d"},
    ]
    assert [row.where for row in rows] == ["rows.csv:2", "rows.csv:4"]


def test_keys_that_are_not_used_are_reported(tmp_path: Path) -> None:
    assert read(write(tmp_path / "rows.jsonl", {"text": "Hi", "id": 1, "source": None})).ignored_keys == ("id",)


def test_missing_columns_of_parquet_structs_count_as_absent(tmp_path: Path) -> None:
    rows = [{"messages": [{**USER, "weight": None}, {**ASSISTANT, "weight": 0}, ASSISTANT]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    messages = read(tmp_path / "rows.parquet").rows[0].body["messages"]
    assert messages == [USER, {**ASSISTANT, "weight": 0}, ASSISTANT]


GOOD = {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (b'{"prompt": "a", "completion": "\xff"}', "rows.jsonl:2 is not UTF-8"),
        ('{"prompt": "a", "completion": NaN}', "NaN is not a JSON value"),
        ('{"prompt": "a", "completion": -Infinity}', "-Infinity is not a JSON value"),
        ('{"prompt": "a", "prompt": "b", "completion": "c"}', "the key 'prompt' stands there twice"),
        ('{"prompt": "a", "completion": "\\ud800"}', "lone surrogate at character 1"),
        ('{"prompt": "a", "completion": "b\\u0000"}', "NUL character"),
        (b'{"prompt": "a\0", "completion": "b"}', "is not valid JSON"),
        ("[" * 100_000, "is nested too deeply"),
        ('{"a": ' * 50_000, "is nested too deeply"),
        ('{"prompt": "a", "completion": ' + "9" * 5000 + "}", "is not valid JSON"),
        ('{"prompt": "a", "completion": 1e999}', "should be text, got float"),
        ('["a"]', "should be a JSON object, got list"),
        ('{"prompt": "a"', "is not valid JSON"),
        ({"prompt": "a", "completion": "  "}, "'completion' is empty"),
        ({"prompt": "a", "completion": None}, "known formats"),
        ({"prompt": "a", "completion": ["b"]}, "'completion' should be text, got list"),
        ({"text": "a"}, "is text while the rows before it are prompt_completion"),
        ({"question": "a", "answer": "b"}, "has the keys 'question', 'answer', which is none of the known formats"),
        ({}, "has the keys no keys"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, line: Any, sentence: str) -> None:
    said = refusal(write(tmp_path / "rows.jsonl", GOOD, line, GOOD, {"prompt": "x"}))
    assert said.startswith("rows.jsonl:2 ")
    assert sentence in said
    assert said.endswith("(1 more bad rows follow.)")


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([], "has 0 messages"),
        ([USER] * 1025, "has 1025 messages"),
        (["Hi"], "should be a list of objects"),
        ("Hi", "should be a list of objects, got text"),
        ([USER], "has no assistant message"),
        ([USER, {**ASSISTANT, "weight": 0}], "has no assistant message"),
        ([USER, {**ASSISTANT, "weight": 0.5}], "the weight of message 2 should be 0"),
        ([{"role": "bot", "content": "x"}], "message 1 has the role 'bot', expected one of system"),
        ([{"content": "x"}], "the role of message 1 should be text, got nothing"),
        ([USER, {"role": "assistant", "content": ""}], "the content of message 2 is empty"),
        ([USER, {"role": "assistant", "content": [{"type": "text", "text": "x"}]}], "should be text, got list"),
        ([USER, {**ASSISTANT, "tool_calls": [{"name": "f"}]}], "message 2 has 'tool_calls', which is not trained on"),
    ],
)
def test_conversations_are_checked(tmp_path: Path, messages: Any, sentence: str) -> None:
    assert sentence in refusal(write(tmp_path / "rows.jsonl", {"messages": messages}))


def test_a_format_that_is_asked_for_is_not_guessed(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"text": "Hi", "label": "a"})
    assert read(path, "text").rows[0].body == {"text": "Hi"}
    assert "lacks 'messages', which messages rows need; it has 'text', 'label'" in refusal(path, "messages")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_an_empty_file_has_no_rows(tmp_path: Path, name: str) -> None:
    for content in (b"", b"\n\n", b"\xef\xbb\xbf"):
        (tmp_path / name).write_bytes(content)
        assert "has no rows" in refusal(tmp_path / name)


def test_files_that_cannot_be_read_are_refused_with_the_way_out(tmp_path: Path) -> None:
    assert "one of .jsonl, .csv, .parquet. Write one JSON object per line" in refusal(write(tmp_path / "rows.json", GOOD))
    assert "is not a readable Parquet file" in refusal(write(tmp_path / "rows.parquet", GOOD))
    (tmp_path / "rows.jsonl").write_text(json.dumps(GOOD), encoding="utf-16")
    assert "is encoded in UTF-16, expected UTF-8" in refusal(tmp_path / "rows.jsonl")
    assert "has 1 cells where the first line names 2 columns" in refusal(write(tmp_path / "a.csv", "prompt,completion", "x"))
    assert "names the column 'text' twice" in refusal(write(tmp_path / "b.csv", "text,text", "x,y"))
    assert "is not valid CSV" in refusal(write(tmp_path / "c.csv", "text", '"' + "x" * 200_000 + '"'))
    assert "c2.csv:2 is not UTF-8" in refusal(write(tmp_path / "c2.csv", "text", b"\xe9"))


def test_a_truncated_parquet_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([GOOD] * 1000), path)
    path.write_bytes(path.read_bytes()[:-100])
    assert "is not a readable Parquet file" in refusal(path)


def test_a_line_without_end_is_never_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with path.open("wb") as file:  # a sparse file: a gigabyte without one
        file.write(b'{"text": "')
        file.truncate(1 << 30)
    assert f"rows.jsonl:1 is longer than {MAX_LINE_BYTES >> 20} MiB" in refusal(path)


words = st.text("ab \n\0\ud800é", max_size=4)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | words,
    lambda children: (
        st.lists(children) | st.dictionaries(st.sampled_from(["role", "content", "weight", "from"]) | words, children)
    ),
    max_leaves=8,
)
rows_of_anything = st.dictionaries(
    st.sampled_from(["messages", "conversations", "prompt", "completion", "text", "label", "chosen", "rejected", "x"]),
    json_values,
)


@settings(deadline=None)
@given(value=rows_of_anything)
def test_any_row_is_either_canonical_or_refused(tmp_path_factory: pytest.TempPathFactory, value: dict[str, Any]) -> None:
    path = write(tmp_path_factory.mktemp("any") / "rows.jsonl", value)
    try:
        kinds = [str(row.kind) for row in read(path).rows]
    except BadInput as error:
        kinds = [str(error)[:12]]
    assert kinds[0] in ("messages", "prompt_completion", "text", "preference", "classification", "rows.jsonl:1")
