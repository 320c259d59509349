"""Content identity: canonical JSON and fixed-length ids.

An id is the first 160 bits of a SHA-256, written as 32 characters of lower-case base32 (RFC 4648 alphabet,
no padding): short enough for keys, safe in file names and URLs on every system, and of one length so that
a prefix is never a whole id.
"""

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

ID_LENGTH = 32
ID_PATTERN = re.compile(r"[a-z2-7]{32}")


def canonical_json(value: Any) -> bytes:
    """Return the one JSON text of `value`: sorted keys, no spaces, UTF-8. Raises ValueError on NaN or infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def id_of_bytes(data: bytes) -> str:
    """Return the id of a byte string."""
    return id_of_sha256(hashlib.sha256(data).digest())


def id_of_json(value: Any) -> str:
    """Return the id of a JSON value's canonical form."""
    return id_of_bytes(canonical_json(value))


def id_of_sha256(digest: bytes) -> str:
    """Return the id that stands for a SHA-256 `digest` of 32 bytes."""
    return base64.b32encode(digest[:20]).decode().lower()


def sha256_hex(data: bytes) -> str:
    """Return the SHA-256 of `data` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_id(text: str) -> bool:
    """Tell whether `text` has the form of an id."""
    return ID_PATTERN.fullmatch(text) is not None
