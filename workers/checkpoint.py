"""Checkpoints of one job: safetensors and JSON in the store, written whole, found through the job's state.

A checkpoint is `checkpoints/<step>/state.safetensors` and, after it, `standing.json` with its SHA-256. Until the job's
state points at it, nobody reads it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from infra.errors import BadInput
from infra.fingerprint import sha256_hex
from infra.records import decode_record, encode_record
from infra.storage import Storage
from workers.metrics_log import decode_number, encode_number

FORMAT = "checkpoint/1"


@dataclass(frozen=True)
class Checkpoint:
    """A training's vectors and its standing, as `Training.state` gives them."""

    vectors: Mapping[str, Tensor]
    standing: Mapping[str, Any]


def save_checkpoint(store: Storage, prefix: str, checkpoint: Checkpoint) -> None:
    """Write a checkpoint under `prefix`, which ends in "/"."""
    content = save({name: vector.contiguous() for name, vector in checkpoint.vectors.items()})
    store.put(f"{prefix}state.safetensors", content)
    body = {"sha256": sha256_hex(content), "standing": _encode(checkpoint.standing)}
    store.put(f"{prefix}standing.json", encode_record(FORMAT, body))


def load_checkpoint(store: Storage, prefix: str) -> Checkpoint:
    """Read a checkpoint. Raises ObjectNotFound, or BadInput if it is damaged."""
    record, _ = store.get(f"{prefix}standing.json")
    body = decode_record(record, FORMAT, f"{prefix}standing.json")
    content, _ = store.get(f"{prefix}state.safetensors")
    if sha256_hex(content) != body["sha256"]:
        raise BadInput(f"the checkpoint {prefix} is damaged: its content does not have the recorded SHA-256.")
    return Checkpoint(load(content), _decode(body["standing"]))


def delete_checkpoint(store: Storage, prefix: str) -> None:
    """Remove a checkpoint that nothing points at any more."""
    for name in ("standing.json", "state.safetensors"):
        store.delete(f"{prefix}{name}")


def _encode(standing: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: {key: encode_number(number) for key, number in value.items()} if isinstance(value, Mapping) else value
        for name, value in standing.items()
    }


def _decode(standing: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: {key: decode_number(number) for key, number in value.items()} if isinstance(value, Mapping) else value
        for name, value in standing.items()
    }
