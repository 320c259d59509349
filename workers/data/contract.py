"""The prompt contract: how text becomes token ids for a base, as one id; cheap, since no tokenizer is built.

It covers the tokenizer's own file in canonical form, the special tokens, the chat template (or the name of the default one)
and the name of the plain form. Saving a tokenizer again does not change it: padding, truncation and class names are left out.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infra.errors import BadInput
from infra.fingerprint import id_of_json, sha256_of_file
from workers.data.template import DEFAULT_TEMPLATE_NAME
from workers.data.template_child import FROZEN_DATE

PLAIN_FORM_NAME = "plain-v1"
"""How prompt and completion are joined; see `render`."""

_VOCABULARY_FILES = ("tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json")
_CONFIG_KEYS = ("add_bos_token", "add_eos_token", "add_prefix_space", "do_lower_case", "legacy")
_TOKEN_KEYS = ("bos_token", "eos_token", "unk_token")


def prompt_contract(path: Path) -> str:
    """Return the id of the prompt contract of the base in folder `path`. Raises BadInput if it has no tokenizer."""
    return id_of_json(contract_parts(path))


def contract_parts(path: Path) -> dict[str, Any]:
    """Return what the prompt contract of the base in folder `path` covers, part by part. Raises BadInput as `prompt_contract`."""
    config = _read_json(path / "tokenizer_config.json")
    template = read_chat_template(path)
    return {
        "format": "prompt-contract/1",
        "tokenizer": _tokenizer_of(path),
        "special_tokens": {key: _token_text(config.get(key)) for key in _TOKEN_KEYS},
        "config": {key: config[key] for key in _CONFIG_KEYS if config.get(key) is not None},
        "chat_template": DEFAULT_TEMPLATE_NAME if template is None else {"text": template, "date": FROZEN_DATE.isoformat()},
        "plain": PLAIN_FORM_NAME,
    }


def read_chat_template(path: Path) -> str | None:
    """Return the text of the chat template in folder `path`, None if the base has none. `chat_template.jinja` goes first,
    as in transformers; of several named templates the one called default counts."""
    file = path / "chat_template.jinja"
    if file.is_file():
        return _read_text(file)
    return default_template_of(_read_json(path / "tokenizer_config.json").get("chat_template"), path)


def default_template_of(value: Any, where: object) -> str | None:
    """Return the one template that `value`, as tokenizers keep it (text, a list or dict of named ones, None), means."""
    if value is None or isinstance(value, str):
        return value
    named = value if isinstance(value, dict) else {item.get("name"): item.get("template") for item in value}
    if not isinstance(named.get("default"), str):
        raise BadInput(f"{where} has chat templates named {sorted(map(str, named))}, expected one named 'default'.")
    return str(named["default"])


def has_tokenizer(path: Path) -> bool:
    """Tell whether folder `path` holds a tokenizer."""
    return any((path / name).is_file() for name in ("tokenizer.json", *_VOCABULARY_FILES))


def _tokenizer_of(path: Path) -> Any:
    file = path / "tokenizer.json"
    if file.is_file():
        return _canonical_tokenizer(_read_json(file))
    files = {name: sha256_of_file(path / name) for name in _VOCABULARY_FILES if (path / name).is_file()}
    if not files:
        raise BadInput(f"{path} has no tokenizer (tokenizer.json); copy it there from the model's page.")
    return files


def _canonical_tokenizer(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """Leave out what is set anew at every call, and write merges in one of the two forms that are in use."""
    kept = {key: value for key, value in tokenizer.items() if key not in ("truncation", "padding", "version")}
    model = dict(kept.get("model") or {})
    merges = model.get("merges")
    if isinstance(merges, list):
        model["merges"] = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in merges]
    return {**kept, "model": model}


def _token_text(token: Any) -> str | None:
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise BadInput(f"{path} is not UTF-8 text; copy it again from the model's page.") from None


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; an absent file counts as empty."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path))
    except (json.JSONDecodeError, RecursionError):
        raise BadInput(f"{path} is not valid JSON; copy it again from the model's page.") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path} should hold a JSON object, got {type(value).__name__}; copy it again from the model's page.")
    return value
