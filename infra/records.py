"""Records: small JSON objects with a `format` of the form name/version, read strictly."""

import json
from collections.abc import Mapping
from typing import Any

from infra.errors import BadInput
from infra.fingerprint import canonical_json


def encode_record(format: str, body: Mapping[str, Any]) -> bytes:
    """Return the bytes of a record: `body` with its `format` ("manifest/1"), as canonical JSON and a newline."""
    return canonical_json({"format": format, **body}) + b"\n"


def decode_record(data: bytes, format: str, where: str) -> dict[str, Any]:
    """Read a record back; raise BadInput, naming `where`, if it is not JSON or of another format."""
    try:
        body = json.loads(data)
    except ValueError:
        raise BadInput(f"{where} is not valid JSON; the object is damaged, check it with 'adapters verify'.") from None
    if not isinstance(body, dict) or body.get("format") != format:
        found = body.get("format") if isinstance(body, dict) else type(body).__name__
        raise BadInput(f"{where} has the format {found!r}, expected {format!r}; use the lorafleet version that wrote it.")
    del body["format"]
    return body
