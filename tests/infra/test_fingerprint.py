"""Ids and canonical JSON: the same content has one id, on every machine."""

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.fingerprint import canonical_json, id_of_bytes, id_of_json, id_of_sha256, is_id, sha256_hex, sha256_of_file


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.integers()))
def test_the_order_of_keys_does_not_change_the_id(body: dict[str, int]) -> None:
    assert id_of_json(dict(reversed(body.items()))) == id_of_json(body)


@given(st.binary())
def test_every_id_is_an_id_and_depends_on_the_bytes(data: bytes) -> None:
    assert is_id(id_of_bytes(data))
    assert id_of_bytes(data) == id_of_sha256(hashlib.sha256(data).digest())
    assert id_of_bytes(data) != id_of_bytes(data + b"\0")


def test_ids_are_what_they_have_always_been() -> None:
    """Stores hold these ids in their keys: they may never change."""
    assert canonical_json({"b": [1, 2.5, None, True], "a": "é"}) == '{"a":"é","b":[1,2.5,null,true]}'.encode()
    assert id_of_bytes(b"") == "4oymiquy7qobjgx36tejs35zeqt24qpe"
    assert id_of_json({"b": 1, "a": "é"}) == id_of_bytes('{"a":"é","b":1}'.encode())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [float("-inf")]}])
def test_numbers_that_json_does_not_have_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match="JSON"):
        canonical_json(value)


@pytest.mark.parametrize("text", ["", "a" * 31, "a" * 33, "A" * 32, "a" * 31 + "1", "a" * 32 + "\n"])
def test_what_only_looks_like_an_id_is_none(text: str) -> None:
    assert not is_id(text)


def test_a_file_has_the_digest_of_its_content(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content" * 100_000)
    assert sha256_of_file(tmp_path / "file") == sha256_hex(b"content" * 100_000)
