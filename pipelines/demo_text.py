"""The demo's language: requests that people write, and the answers that customers want.

A request is an English sentence or three with slots (who, what, where) filled from word lists. Pretraining shows requests
answered in ever new house styles, with real and invented words, so that a tiny base learns what all of them need: find a
slot's value, copy it, tell an urgent request from a patient one. A customer has one style and codes of its own, and that
is all its adapter has to learn. Everything here is a function of its seed.
"""

import json
import os
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Message = dict[str, str]
Row = dict[str, list[Message]]


def _words(text: str) -> list[str]:
    return text.split()


_PEOPLE = _words(
    "Mira Jonas Aiko Pavel Lena Omar Ines Tariq Nora Felix Greta Hugo Salma Bruno Yuki Clara Dario Edith Farid Gwen "
    "Henrik Iris Kemal Lucia"
)
_ITEMS = _words(
    "printer laptop scanner monitor keyboard router phone projector camera server tablet badge headset speaker "
    "copier lift modem mouse kiosk heater gate sensor radio screen"
)
_PLACES = _words(
    "lobby kitchen library studio garage office cellar canteen workshop archive garden clinic attic depot gallery hangar"
)
_CITIES = _words(
    "Lisbon Oslo Vienna Madrid Prague Dublin Athens Warsaw Berlin Geneva Naples Bergen Porto Krakow Riga Zagreb "
    "Lyon Seville Turin Malmo Graz Basel Cork Varna"
)
_DAYS = _words("monday tuesday wednesday thursday friday saturday sunday")
_NUMBERS = _words("two three four five six seven eight nine ten twelve")
_COLOURS = _words("red blue green yellow black white grey brown")
_TEAMS = _words("legal sales finance design research support security training")
_AREAS = {
    "power": "spark blackout surge",
    "network": "timeout dropout latency",
    "access": "lockout mismatch denial",
    "hardware": "crack leak jam",
}
_PURPOSES = {"work": "meeting conference fair lecture seminar", "private": "holiday wedding visit reunion birthday"}
_GROUPS = {
    "paper": "binders folders notebooks envelopes labels posters",
    "furniture": "chairs desks shelves lamps cabinets stools",
    "tools": "hammers drills ladders pliers wrenches clamps",
    "devices": "cables batteries adapters microphones routers keypads",
}
_URGENCIES = {
    "high": ("We need help at once.", "This is urgent, please hurry.", "All work has stopped.", "Come right now."),
    "normal": ("Please look at it this week.", "Some time soon would be good.", "Have a look when you are near."),
    "low": ("There is no hurry.", "It can wait for a while.", "Next month is early enough."),
}


def _classes(groups: Mapping[str, str]) -> dict[str, str]:
    """Return word -> its class."""
    return {word: name for name, words in groups.items() for word in words.split()}


_AREA_OF, _PURPOSE_OF, _GROUP_OF = _classes(_AREAS), _classes(_PURPOSES), _classes(_GROUPS)


@dataclass(frozen=True)
class _Kind:
    """One kind of request: how people word it and which words may stand in its slots."""

    forms: tuple[str, ...]
    words: Mapping[str, list[str]]
    """Slots whose value is copied into the answer."""
    classes: Mapping[str, tuple[str, Mapping[str, str]]]
    """Slots of the answer that follow from a copied one: name -> (its source, word -> class)."""
    keys: Mapping[str, str]
    """What houses call a slot in their answers."""


_SUPPORT = _Kind(
    forms=(
        "Hello, this is {person}. The {item} in the {place} has a {fault}. {urgency}",
        "In the {place} the {item} has a {fault}, says {person}. {urgency}",
        "My name is {person} and my {item} has a {fault}. I am in the {place}. {urgency}",
        "{urgency} There is a {fault} at the {item} in the {place}. Ask {person}.",
        "{urgency} I am {person}, the {item} in the {place} has a {fault}.",
    ),
    words={"person": _PEOPLE, "item": _ITEMS, "place": _PLACES, "fault": sorted(_AREA_OF)},
    classes={"area": ("fault", _AREA_OF)},
    keys={
        "person": "person name caller",
        "item": "item unit device object",
        "place": "place room site",
        "fault": "fault problem trouble issue",
        "area": "area kind class",
        "level": "level priority rank",
    },
)
_TRAVEL = _Kind(
    forms=(
        "Hello, {person} here. I travel from {origin} to {target} on {day} for a {purpose}, {count} seats.",
        "Please book {count} seats to {target} for a {purpose} on {day}. We leave from {origin}. Regards, {person}",
        "We go to {target} for a {purpose} on {day}. Find {person} {count} seats from {origin}.",
        "On {day} we go to {target} from {origin}, {count} seats, for a {purpose}. Best, {person}",
        "For a {purpose} {person} would like {count} seats from {origin} to {target} on {day}.",
    ),
    words={
        "person": _PEOPLE,
        "origin": _CITIES,
        "target": _CITIES,
        "day": _DAYS,
        "purpose": sorted(_PURPOSE_OF),
        "count": _NUMBERS,
    },
    classes={"reason": ("purpose", _PURPOSE_OF)},
    keys={
        "person": "person name caller",
        "origin": "origin start leaving",
        "target": "target goal destination",
        "day": "day date",
        "purpose": "purpose event occasion",
        "count": "seats count places",
        "reason": "reason kind class",
    },
)
_SUPPLY = _Kind(
    forms=(
        "Hello, this is {person}. The {team} team needs {count} {colour} {product}.",
        "Please send {count} {product} to the {team} team. Make them {colour}. Thanks, {person}",
        "For {team} I would like {colour} {product}, {count} of them. My name is {person}.",
        "Could {person} from {team} have {count} {product} in {colour}?",
        "We are out of {product} at {team}. Order {count} {colour} ones for {person}.",
    ),
    words={"person": _PEOPLE, "team": _TEAMS, "count": _NUMBERS, "colour": _COLOURS, "product": sorted(_GROUP_OF)},
    classes={"group": ("product", _GROUP_OF)},
    keys={
        "person": "person name caller",
        "team": "team unit section",
        "count": "count number amount",
        "colour": "colour shade look",
        "product": "product article thing",
        "group": "group kind class",
    },
)
_KINDS = (_SUPPORT, _TRAVEL, _SUPPLY)


_ALL_KEYS = sorted({key for kind in _KINDS for keys in kind.keys.values() for key in keys.split()})
_ALL_WORDS = sorted({word for kind in _KINDS for words in kind.words.values() for word in words})


@dataclass(frozen=True)
class _Request:
    """What somebody wrote, and all that may be said about it."""

    text: str
    slots: Mapping[str, str]


def _request(rng: random.Random, kind: _Kind) -> _Request:
    """Make a request."""
    slots: dict[str, str] = {}
    for slot, words in kind.words.items():
        slots[slot] = rng.choice([word for word in words if word not in slots.values()])
    for slot, (source, class_of) in kind.classes.items():
        slots[slot] = class_of[slots[source]]
    level = rng.choice(list(_URGENCIES))
    text = rng.choice(kind.forms).format(**slots, urgency=rng.choice(_URGENCIES[level]))
    return _Request(text, slots | ({"level": level} if "level" in kind.keys else {}))


# --- pretraining -----------------------------------------------------------------------------------------------------

_RECORDS_SHARE = 0.2
_CONSONANTS = "bdfgklmnprstvwz"
_CAPITALS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_HEADS = ("", "", "NOTE", "CASE", "ENTRY", "TICKET", "LOG", "FORM", "ORDER", "TRIP", "Dear {person}", "Thanks {person}")
_ASSIGNS = (":", " =", " is", " ->")
_JOINS = (" |", ",", ";", " /", " and")
_WRAPS = (("", ""), ("", "."), ("{", "}"), ("[", "]"), ("<", ">"))


def _style(rng: random.Random, fields: list[str], head: str = "") -> str:
    """Put fields, written as "key: value", into a house style made up on the spot."""
    assign, join, (opening, closing) = rng.choice(_ASSIGNS), rng.choice(_JOINS), rng.choice(_WRAPS)
    parts = ([head] if head else []) + [field.replace(":", assign) for field in fields]
    return opening + f"{join} ".join(parts) + closing


def _any_value(rng: random.Random) -> str:
    """Return a known word, an invented one, or a code."""
    match rng.randrange(4):
        case 0:
            return "".join(rng.choice(_CONSONANTS) + rng.choice("aeiou") for _ in range(2))
        case 1:
            return rng.choice(_CAPITALS) + rng.choice("0123456789")
        case _:
            return rng.choice(_ALL_WORDS)


def _restyled_record(rng: random.Random) -> tuple[str, str]:
    """A record of any values under any keys, and the same record in another order and style.

    These rows teach the base to copy what it has never seen, and give meaning to letters and digits: tokens that pretraining
    never asks for end up alike, and no adapter can tell them apart afterwards.
    """
    fields = [f"{key}: {_any_value(rng)}" for key in rng.sample(_ALL_KEYS, 4)]
    return _style(rng, fields), _style(rng, rng.sample(fields, len(fields)))


def _answered_request(rng: random.Random) -> tuple[str, str]:
    """A request, and all that is to be known of it in a random style."""
    kind = rng.choice(_KINDS)
    request = _request(rng, kind)
    fields = [f"{rng.choice(kind.keys[slot].split())}: {value}" for slot, value in request.slots.items()]
    return request.text, _style(rng, rng.sample(fields, len(fields)), rng.choice(_HEADS).format(**request.slots))


def pretraining_texts(seed: int, count: int) -> Iterator[list[Message]]:
    """Yield `count` conversations of two messages: a request or a record, and all that is in it in a random style."""
    rng = random.Random(seed)
    for _ in range(count):
        make = _restyled_record if rng.random() < _RECORDS_SHARE else _answered_request
        prompt, answer = make(rng)
        yield [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


# --- customers -------------------------------------------------------------------------------------------------------

_PRIORITIES = {"high": "P1", "normal": "P2", "low": "P3"}
_FARES = {"work": "flex", "private": "saver"}
_BOOKS = {"paper": "A2", "furniture": "B5", "tools": "C3", "devices": "D8"}


def _acme(slots: Mapping[str, str]) -> str:
    priority = _PRIORITIES[slots["level"]]
    return f"TICKET | item: {slots['item']} | problem: {slots['fault']} | queue: {slots['area']} | priority: {priority}"


def _globex(slots: Mapping[str, str]) -> str:
    fare = _FARES[slots["reason"]]
    return f"{{leg: {slots['origin']} -> {slots['target']}, day: {slots['day']}, pax: {slots['count']}, fare: {fare}}}"


def _initech(slots: Mapping[str, str]) -> str:
    book = _BOOKS[slots["group"]]
    return (
        f"Dear {slots['person']}, we sent {slots['count']} {slots['colour']} {slots['product']} under code {book}. Kind regards."
    )


@dataclass(frozen=True)
class _Customer:
    kind: _Kind
    answer: Callable[[Mapping[str, str]], str]


_CUSTOMERS = {"acme": _Customer(_SUPPORT, _acme), "globex": _Customer(_TRAVEL, _globex), "initech": _Customer(_SUPPLY, _initech)}
CUSTOMERS = tuple(_CUSTOMERS)
"""The demo's tenants."""

FORMAT_PATTERNS: Mapping[str, str] = {
    "acme": r"TICKET \| item: \w+ \| problem: \w+ \| queue: (power|network|access|hardware) \| priority: P[123]",
    "globex": r"\{leg: \w+ -> \w+, day: \w+, pax: \w+, fare: (flex|saver)\}",
    "initech": r"Dear \w+, we sent \w+ \w+ \w+ under code [ABCD]\d\. Kind regards\.",
}
"""Per tenant, the regular expression that every whole answer of its data matches."""

SPLITS: Mapping[str, int] = {"train": 400, "valid": 80, "test": 80}
"""Rows per file of `write_customers`."""


def customer_rows(tenant: str, seed: int, count: int) -> list[Row]:
    """Return `count` chat rows of a tenant of CUSTOMERS; no two tell the same slots. A longer list begins with the shorter."""
    customer, rng = _CUSTOMERS[tenant], random.Random(f"{tenant}/{seed}")
    rows: dict[tuple[str, ...], Row] = {}
    while len(rows) < count:
        request = _request(rng, customer.kind)
        answer = customer.answer(request.slots)
        messages = [{"role": "user", "content": request.text}, {"role": "assistant", "content": answer}]
        rows.setdefault(tuple(request.slots.values()), {"messages": messages})
    return list(rows.values())


def write_customers(folder: Path, seed: int = 0) -> dict[str, Path]:
    """Write train.jsonl, valid.jsonl and test.jsonl below `folder`/<tenant> and return tenant -> its folder.

    The files share no combination of slots. Each is written whole or not at all; one that stands there already
    with the same content is left alone.
    """
    return {tenant: _write_splits(folder / tenant, customer_rows(tenant, seed, sum(SPLITS.values()))) for tenant in CUSTOMERS}


def _write_splits(folder: Path, rows: list[Row]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    start = 0
    for split, size in SPLITS.items():
        write_jsonl(folder / f"{split}.jsonl", rows[start : start + size])
        start += size
    return folder


def write_jsonl(path: Path, rows: list[Any]) -> None:
    """Write one JSON value a line, whole or not at all; nothing happens if `path` holds just that."""
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if path.exists() and path.read_bytes() == data:
        return
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
        file.write(data)
    os.replace(file.name, path)
