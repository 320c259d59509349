"""Manifests: the records by which adapters exist. Finding, listing and checking them needs no torch.

A manifest is written after the adapter's files and once only; it names them with their digests, and says what the
adapter was trained on. What is found out later stands in evidence objects.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from infra.errors import BadInput, ObjectNotFound, WrongBase
from infra.fingerprint import is_id
from infra.records import decode_record
from infra.storage import Storage
from workers import layout
from workers.identity import BaseIdentity, diff

MANIFEST_FORMAT = "manifest/1"
MIN_PREFIX_LENGTH = 4
MAX_LISTED = 8


class AdapterRef(NamedTuple):
    """Where an adapter stands."""

    tenant: str
    base_id: str
    adapter_id: str


def adapter_refs(store: Storage, tenant: str | None = None) -> Iterator[AdapterRef]:
    """Yield the adapters of a tenant, or of all tenants, in the order of their keys."""
    prefix = layout.tenants() if tenant is None else layout.tenant(tenant)
    for info in store.list(prefix):
        parts = layout.parts_of_manifest(info.key)
        if parts is not None:
            yield AdapterRef(*parts)


def find_adapter(store: Storage, tenant: str | None, ref: str, base_id: str | None = None) -> AdapterRef:
    """Return the one adapter, of a tenant or of all, whose id is `ref` or starts with it. Raises BadInput on none or several."""
    if (
        tenant is not None
        and base_id is not None
        and is_id(ref)
        and store.head(layout.manifest(tenant, base_id, ref)) is not None
    ):
        return AdapterRef(tenant, base_id, ref)
    if not is_id(ref) and not (MIN_PREFIX_LENGTH <= len(ref) < 32 and is_id(ref.ljust(32, "a"))):
        raise BadInput(
            f"{ref[:80]!r} names no adapter; give an id, at least its first {MIN_PREFIX_LENGTH} characters, or "
            "<tenant>.<task>@<alias>."
        )
    found = [one for one in adapter_refs(store, tenant) if one.adapter_id.startswith(ref) and base_id in (None, one.base_id)]
    whose = f"tenant '{tenant}'" if tenant is not None else "any tenant"
    if not found:
        raise BadInput(
            f"no adapter of {whose} starts with '{ref}' in the store {store.uri}; 'lorafleet adapters list' shows what there is."
        )
    if len(found) > 1:
        listed = ", ".join(f"{one.adapter_id} ({one.tenant})" for one in found[:MAX_LISTED])
        more = f" and {len(found) - MAX_LISTED} more" if len(found) > MAX_LISTED else ""
        raise BadInput(f"'{ref}' fits {len(found)} adapters: {listed}{more}; give more characters, or the tenant.")
    return found[0]


def read_manifest(store: Storage, ref: AdapterRef) -> dict[str, Any]:
    """Return the body of an adapter's manifest; raise BadInput if there is none or it is not this adapter's."""
    key = layout.manifest(*ref)
    try:
        data, _ = store.get(key)
    except ObjectNotFound:
        raise BadInput(
            f"tenant '{ref.tenant}' has no adapter {ref.adapter_id} on the base {ref.base_id} in the store {store.uri}."
        ) from None
    body = decode_record(data, MANIFEST_FORMAT, key)
    if (body.get("tenant"), body.get("base_id"), body.get("adapter_id")) != tuple(ref):
        raise BadInput(f"{key} in the store {store.uri} is the manifest of another adapter; restore it from a copy.")
    return body


def list_adapters(store: Storage, tenant: str | None = None) -> list[dict[str, Any]]:
    """Return the manifests of a tenant, or of all tenants, in the order of their keys."""
    return [read_manifest(store, ref) for ref in adapter_refs(store, tenant)]


def check_base(
    manifest: Mapping[str, Any],
    base: BaseIdentity | str,
    *,
    prompt_contract: str | None = None,
    trained_on: Mapping[str, Any] | None = None,
) -> None:
    """Raise WrongBase unless the adapter was trained on `base` (and with `prompt_contract`, if one is given).

    `trained_on` is the base/1 body of the adapter's own base, where it is known: the sentence then names what differs.
    """
    present = base if isinstance(base, str) else base.base_id
    adapter = f"the adapter {manifest['adapter_id']} was trained on the base {manifest['base_id']}"
    if manifest["base_id"] != present:
        differs = _what_differs(trained_on, base)
        raise WrongBase(f"{adapter}, not on {present}{differs}; use the base it was trained on, or train one for this base.")
    if prompt_contract is not None and manifest["prompt_contract"] != prompt_contract:
        raise WrongBase(
            f"{adapter} with another tokenizer or chat template (prompt contract {manifest['prompt_contract']}, here "
            f"{prompt_contract}); use the base folder as it was then."
        )


def _what_differs(trained_on: Mapping[str, Any] | None, base: BaseIdentity | str) -> str:
    if trained_on is None or isinstance(base, str):
        return ""
    return f" (what differs: {', '.join(diff(trained_on, base)[:MAX_LISTED])})"
