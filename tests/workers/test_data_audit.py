"""What an audit finds in rows: repeats, test rows among training rows, labels, and personal data, by place and never by value."""

from dataclasses import asdict
from typing import Any

import pytest

from workers.data.rows import Row
from workers.data_audit import MAX_PLACES, audit_data, find_personal, overlap, personal_in


def row(place: int, prompt: str, completion: str) -> Row:
    return Row({"prompt": prompt, "completion": completion}, f"rows:{place}")


def labelled(place: int, text: str, label: str) -> Row:
    return Row({"text": text, "label": label}, f"rows:{place}")


def test_repeats_are_found_as_they_are_and_but_for_case_space_and_forms_of_characters() -> None:
    rows = [
        row(1, "Hi", "there"),
        row(2, "Hi", "there"),
        row(3, "hi ", " THERE"),
        row(4, "Ｈｉ", "there"),
        row(5, "Hi t", "here"),
    ]
    found = audit_data(rows, {}).duplicates
    assert (found.exact.num_rows, found.exact.places) == (1, ("rows:2",))
    assert found.normalised.places == ("rows:2", "rows:3", "rows:4")


def test_held_out_rows_among_training_rows_are_named_by_set() -> None:
    train = [row(1, "a", "b"), row(2, "c", "d")]
    found = audit_data(train, {"validation": [row(7, "A", "b")], "test": [row(8, "c", "d"), row(9, "e", "f")]})
    assert found.overlaps["validation"].exact.num_rows == 0
    assert found.overlaps["validation"].normalised.places == ("rows:7",)
    assert found.overlaps["test"].exact.places == ("rows:8",)
    assert overlap([], train).exact.num_rows == 0


def test_conversations_are_compared_by_what_is_said() -> None:
    def said(text: str) -> Row:
        return Row({"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "Yes"}]}, text)

    assert overlap([said("SURE?")], [said("sure?")]).normalised.num_rows == 1
    assert overlap([said("sure!")], [said("sure?")]).normalised.num_rows == 0


def test_labels_are_counted_and_one_text_with_two_labels_is_a_contradiction() -> None:
    rows = [labelled(1, "x", "a"), labelled(2, "y", "a"), labelled(3, "X", "b"), labelled(4, "z", "a")]
    labels = audit_data(rows, {}).labels
    assert labels is not None
    assert labels.counts == {"a": 3, "b": 1}
    assert labels.entropy == pytest.approx(0.8113, abs=1e-4)
    assert labels.contradictions.places == ("rows:1", "rows:3")
    assert audit_data([row(1, "x", "y")], {}).labels is None


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("write to Jo.Doe+x@mail.example.org, please", ["email"]),
        ("<a@b.de>", ["email"]),
        ("pay with 4111 1111 1111 1111 today", ["card"]),
        ("3782-822463-10005", ["card"]),
        ("pay with 4111 1111 1111 1112 today", []),
        ("to DE89 3704 0044 0532 0130 00 AND SOON", ["iban"]),
        ("GB82WEST12345698765432", ["iban"]),
        ("GB82WEST12345698765433", []),
        ("call +49 30 901820 or (555) 123-4567", ["phone", "phone"]),
        ("Tel. 030/901820-55", ["phone"]),
        ("on 2024-05-17, 17.05.2024 at 10:30", []),
        ("orders 20240517 and 123456789012, 3.14159265358979", []),
        ("user@localhost, 5 @ 3 euro", []),
        ("a@b.de and 4111111111111111 and +1 555 123 4567", ["email", "card", "phone"]),
    ],
)
def test_personal_data_goes_by_form_and_by_check_digits(text: str, kinds: list[str]) -> None:
    assert list(personal_in(text)) == kinds


def test_values_never_stand_in_what_is_found() -> None:
    rows = [row(1, "who?", "jo@example.org, a@b.de"), row(2, "pay", "4111111111111111"), row(3, "no", "thing")]
    personal = find_personal(rows)
    assert (personal["email"].num_matches, personal["email"].rows.places) == (2, ("rows:1",))
    assert personal["card"].rows.places == ("rows:2",)
    told = str({kind: asdict(found) for kind, found in personal.items()})
    assert not any(value in told for value in ("jo@", "a@b", "4111"))


def test_counts_are_of_all_rows_and_places_of_the_first() -> None:
    found = audit_data([row(place, "a", "b") for place in range(100)], {}).duplicates.exact
    assert (found.num_rows, len(found.places)) == (99, MAX_PLACES)


@pytest.mark.parametrize("letter", ["a.", "1 ", "A1", "-1", "a@", "(1", "é "])
def test_long_rows_made_to_be_slow_are_looked_through(letter: str) -> None:
    body: Any = {"text": letter * 100_000}
    assert sum(found.num_matches for found in find_personal([Row(body, "a long row")]).values()) == 0
