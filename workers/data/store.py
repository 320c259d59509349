"""Rows in the store, under the digest of their canonical form.

The rows go first, then `data.json`: a set exists once its record does. Both are written once; saving again changes nothing.
"""

import contextlib
import json
from collections.abc import Sequence

from infra.crashpoints import crashpoint
from infra.errors import ConditionFailed, ObjectNotFound, WorkFailed
from infra.fingerprint import sha256_hex
from infra.records import decode_record, encode_record
from infra.storage import Storage
from workers import layout
from workers.data.rows import DATA_FORMAT, Row, canonical_rows, digest_of, kind_of
from workers.job import DataRef


def save_rows(store: Storage, tenant: str, rows: Sequence[Row]) -> DataRef:
    """Keep `rows` under `tenant` and return their reference. Raises BadInput if there are none or their kinds differ."""
    kind = kind_of(rows)
    canonical = canonical_rows(rows)
    ref = DataRef(digest_of(canonical), len(rows))
    prefix = layout.data(tenant, ref.digest)
    record = {"num_rows": ref.num_rows, "kind": kind, "sha256": sha256_hex(canonical)}
    if store.head(f"{prefix}data.json") is None:
        _put_once(store, f"{prefix}rows.jsonl", canonical)
        crashpoint("data-rows-written", ref.digest)
        _put_once(store, f"{prefix}data.json", encode_record(DATA_FORMAT, record))
    return ref


def load_rows(store: Storage, tenant: str, digest: str) -> list[Row]:
    """Read the rows of `digest` back. Raises ObjectNotFound if they were never saved, WorkFailed if they are damaged."""
    prefix = layout.data(tenant, digest)
    try:
        decode_record(store.get(f"{prefix}data.json")[0], DATA_FORMAT, f"{store.uri}/{prefix}data.json")
        canonical, _ = store.get(f"{prefix}rows.jsonl")
    except ObjectNotFound:
        raise ObjectNotFound(f"{store.uri} keeps no rows {digest} for tenant {tenant}; resolve the job again.") from None
    if digest_of(canonical) != digest:
        raise WorkFailed(
            f"{store.uri}/{prefix}rows.jsonl does not match its digest; delete the damaged object and resolve again."
        )
    # Not splitlines: canonical JSON keeps U+2028 and its kin inside strings.
    lines = canonical.split(b"\n")[:-1]
    return [Row(json.loads(line), f"{digest[:8]}/rows.jsonl:{number}") for number, line in enumerate(lines, 1)]


def _put_once(store: Storage, key: str, data: bytes) -> None:
    # The key holds the digest of the content: whoever was first has written the same.
    with contextlib.suppress(ConditionFailed):
        store.put_if_absent(key, data)
