"""What the rows of a job hold that a person should know of: repeats, test rows among training rows, labels, personal data.

Places and counts only: but for labels, no text of a row leaves this module. Personal data is looked for with regular
expressions whose repeats are bounded, since rows come from others, and what can be checked is: card numbers by their check
digit (ISO/IEC 7812-1), IBANs by length and remainder (ISO 13616). E-mail addresses and phone numbers go by their form alone.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from workers.data.rows import Row, row_bytes

MAX_PLACES = 20
"""Places that are listed of one finding; the counts are of all."""
# fmt: off
IBAN_LENGTHS = {
    "AD": 24, "AE": 23, "AL": 28, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22, "BH": 22, "BR": 29, "BY": 28, "CH": 21,
    "CR": 22, "CY": 28, "CZ": 24, "DE": 22, "DK": 18, "DO": 28, "EE": 20, "EG": 29, "ES": 24, "FI": 18, "FO": 18, "FR": 27,
    "GB": 22, "GE": 22, "GI": 23, "GL": 18, "GR": 27, "GT": 28, "HR": 21, "HU": 28, "IE": 22, "IL": 23, "IQ": 23, "IS": 26,
    "IT": 27, "JO": 30, "KW": 30, "KZ": 20, "LB": 28, "LC": 32, "LI": 21, "LT": 20, "LU": 20, "LV": 21, "LY": 25, "MC": 27,
    "MD": 24, "ME": 22, "MK": 19, "MR": 27, "MT": 31, "MU": 30, "NL": 18, "NO": 15, "PK": 24, "PL": 28, "PS": 29, "PT": 25,
    "QA": 29, "RO": 24, "RS": 22, "SA": 24, "SC": 31, "SE": 24, "SI": 19, "SK": 24, "SM": 27, "SV": 28, "TN": 24, "TR": 26,
    "UA": 29, "VA": 22, "VG": 24, "XK": 20,
}
"""Characters of an IBAN by country (SWIFT's IBAN registry)."""
# fmt: on
_EMAIL = re.compile(r"(?<![\w.+%-])[\w.+%-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){0,8}\.[A-Za-z]{2,24}(?![\w-])")
_IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}")
_CARD = re.compile(r"(?<![\w.,-])[2-6]\d{3}(?:[ -]?\d){9,15}(?![\w-])")
_PHONE = re.compile(r"(?<![\w.,/+-])(?:\+|\(|\d)[\d ().\-/]{6,22}\d(?![\w/-])")
_DATE = re.compile(r"\d{4}[-./]\d{1,2}[-./]\d{1,2}|\d{1,2}[-./]\d{1,2}[-./]\d{2,4}")
_NORTH_AMERICAN = re.compile(r"\(?\d{3}\)?[ .-]\d{3}[ .-]\d{4}")


@dataclass(frozen=True)
class Found:
    """Rows of which something is true."""

    num_rows: int
    places: tuple[str, ...]
    """The first of them, MAX_PLACES at most."""


@dataclass(frozen=True)
class Repeats:
    """Rows that stand among others as well."""

    exact: Found
    """The same row."""
    normalised: Found
    """The same text, but for case, white space and the forms of characters (NFKC); the exact ones included. Of texts with
    labels the label does not count."""


@dataclass(frozen=True)
class LabelBalance:
    """How the rows of a classifier share its labels."""

    counts: Mapping[str, int]
    """Rows by label, the most frequent first."""
    entropy: float
    """Of the labels' shares, relative to that of equal ones: 0 (one label) to 1."""
    contradictions: Found
    """Rows whose text bears another label elsewhere among these rows."""


@dataclass(frozen=True)
class Personal:
    """Matches of one pattern of personal data."""

    num_matches: int
    rows: Found


@dataclass(frozen=True)
class DataAudit:
    """What one set of training rows holds, alone and against the held-out rows."""

    num_rows: int
    duplicates: Repeats
    """Training rows that repeat an earlier one."""
    overlaps: Mapping[str, Repeats]
    """By held-out set ("validation", "test"): its rows that stand among the training rows."""
    labels: LabelBalance | None
    """None unless rows are classified."""
    personal: Mapping[str, Personal]
    """By kind of data: email, iban, card, phone."""


def audit_data(train: Sequence[Row], held_out: Mapping[str, Sequence[Row]]) -> DataAudit:
    """Look through training rows, and through held-out rows by the name of their set."""
    return DataAudit(
        num_rows=len(train),
        duplicates=Repeats(_later_ones(train, row_bytes), _later_ones(train, normalised_text)),
        overlaps={name: overlap(rows, train) for name, rows in held_out.items()},
        labels=_label_balance(train) if train and train[0].kind == "classification" else None,
        personal=find_personal(train),
    )


def overlap(rows: Sequence[Row], others: Sequence[Row]) -> Repeats:
    """Return those of `rows` that stand among `others`."""
    exact, normalised = set(map(row_bytes, others)), set(map(normalised_text, others))
    return Repeats(
        _found(row for row in rows if row_bytes(row) in exact),
        _found(row for row in rows if normalised_text(row) in normalised),
    )


def normalised_text(row: Row) -> str:
    """Return what a row says, in one case and one form of white space and characters; without the label of a text with one."""
    return normalised(texts_of(row))


def normalised(texts: Sequence[str]) -> str:
    """Return texts as one, in one case and one form of white space and characters."""
    text = "\x00".join(" ".join(part.split()) for part in texts)
    return unicodedata.normalize("NFKC", text).casefold()


def texts_of(row: Row) -> list[str]:
    """Return the texts of a row: what each turn says, prompt and completion, or the text."""
    if row.kind == "messages":
        return [str(message.get("content", "")) for message in row.body["messages"]]
    return [str(value) for key, value in sorted(row.body.items(), reverse=True) if key != "label"]


def find_personal(rows: Sequence[Row]) -> dict[str, Personal]:
    """Count what looks like personal data, by kind; a stretch of text counts for one kind only."""
    counts = [Counter(kind for text in texts_of(row) for kind in personal_in(text)) for row in rows]
    return {
        kind: Personal(
            sum(count[kind] for count in counts),
            _found(row for row, count in zip(rows, counts, strict=True) if count[kind]),
        )
        for kind in _PATTERNS
    }


def personal_in(text: str) -> Iterator[str]:
    """Yield the kind of each piece of a text that looks like personal data."""
    for kind, (pattern, holds) in _PATTERNS.items():
        left, end = [], 0
        for match in pattern.finditer(text):
            if length := holds(match.group()):
                left.append(text[end : match.start()])
                end = match.start() + length
                yield kind
        text = "x".join([*left, text[end:]])


def _email_length(text: str) -> int:
    return len(text)


def _iban_length(text: str) -> int:
    """Return how many characters of `text` are an IBAN, 0 if it is none; words in capitals may stand behind it."""
    wanted = IBAN_LENGTHS.get(text[:2], 0)
    places = [place for place, letter in enumerate(text) if letter != " "]
    if not wanted or len(places) < wanted:
        return 0
    code = "".join(text[place] for place in places[:wanted])
    number = "".join(str(int(letter, 36)) for letter in code[4:] + code[:4])
    return places[wanted - 1] + 1 if int(number) % 97 == 1 else 0


def _card_length(text: str) -> int:
    digits = [int(letter) for letter in text if letter.isdecimal()]
    doubled = [2 * digit - 9 * (digit > 4) for digit in digits[-2::-2]]
    return len(text) if (sum(digits[::-2]) + sum(doubled)) % 10 == 0 else 0


def _phone_length(text: str) -> int:
    """Take 8 to 15 digits written internationally, 9 to 12 in groups that begin with 0, or the North American form; no dates."""
    num_digits = sum(letter.isdecimal() for letter in text)
    international = text.startswith(("+", "00")) and 8 <= num_digits <= 15
    national = text.lstrip("(").startswith("0") and 9 <= num_digits <= 12 and any(mark in text for mark in " -/()")
    if _DATE.fullmatch(text) or not (international or national or _NORTH_AMERICAN.fullmatch(text)):
        return 0
    return len(text)


_PATTERNS: dict[str, tuple[re.Pattern[str], Callable[[str], int]]] = {
    "email": (_EMAIL, _email_length),
    "iban": (_IBAN, _iban_length),
    "card": (_CARD, _card_length),
    "phone": (_PHONE, _phone_length),
}
"""By kind: what to look for, and how many characters of a match are it. In this order: what is one kind is no later one."""


def _later_ones(rows: Sequence[Row], key: Callable[[Row], object]) -> Found:
    seen: set[object] = set()
    repeated = []
    for row in rows:
        if (value := key(row)) in seen:
            repeated.append(row)
        seen.add(value)
    return _found(repeated)


def _label_balance(rows: Sequence[Row]) -> LabelBalance:
    counts = Counter(str(row.body["label"]) for row in rows)
    shares = [count / len(rows) for count in counts.values()]
    entropy = -math.fsum(share * math.log(share) for share in shares)
    labels_of: dict[str, set[str]] = {}
    for row in rows:
        labels_of.setdefault(normalised_text(row), set()).add(str(row.body["label"]))
    return LabelBalance(
        counts=dict(counts.most_common()),
        entropy=entropy / math.log(len(counts)) if len(counts) > 1 else 0.0,
        contradictions=_found(row for row in rows if len(labels_of[normalised_text(row)]) > 1),
    )


def _found(rows: Iterable[Row]) -> Found:
    places = [row.where for row in rows]
    return Found(len(places), tuple(places[:MAX_PLACES]))
