"""`lorafleet adapters diff`: how two adapters of one base differ, in what they compute, how they were made, and on which rows."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from infra.errors import WrongBase
from pipelines.evaluate import Subject
from pipelines.workspace import Workspace
from workers.audit import config_differences, diff_adapters
from workers.data.store import load_rows
from workers.data_audit import overlap

SPLITS = ("train", "validation", "test")
NUM_SHOWN = 8
"""Layers that are shown to a person, those that differ most; JSON has all."""


def diff(workspace: Workspace, a: str, b: str) -> dict[str, Any]:
    """Compare two adapters. Raises WrongBase, before their files are compared, if their bases differ."""
    one, other = Subject(workspace, a), Subject(workspace, b)
    if one.base_id != other.base_id:
        raise WrongBase(
            f"the adapter {one.stored.adapter_id[:12]} belongs to the base {one.base_id[:12]} and {other.stored.adapter_id[:12]} "
            f"to {other.base_id[:12]}: updates of different weights cannot be compared; 'lorafleet base diff' compares the bases."
        )
    found = diff_adapters(one.stored.adapter, other.stored.adapter)
    return {
        "a": one.stored.adapter_id,
        "b": other.stored.adapter_id,
        "base_id": one.base_id,
        "distance": found.distance,
        "cosine": found.cosine,
        "layers": [asdict(layer) for layer in found.layers],
        "only_a": list(found.only_a),
        "only_b": list(found.only_b),
        "settings": {key: list(pair) for key, pair in config_differences(_settings(one), _settings(other)).items()},
        "data": {split: _data_difference(one, other, split) for split in SPLITS},
    }


def _settings(subject: Subject) -> dict[str, object]:
    """Return the adapter's configuration, and the training of its job where there was one."""
    settings: dict[str, object] = {f"peft.{key}": value for key, value in subject.stored.adapter.config.items()}
    if subject.stored.adapter.labels:
        settings["labels"] = list(subject.stored.adapter.labels)
    if subject.job is not None:
        training = subject.job.spec.training.model_dump(mode="json")
        settings |= {f"training.{key}": value for key, value in training.items()}
    return settings


def _data_difference(a: Subject, b: Subject, split: str) -> dict[str, Any] | None:
    """Return digests, and row counts where both have the split; None if neither has. Rows of two tenants never meet."""
    digests = [(subject.stored.manifest.get("data") or {}).get(split) for subject in (a, b)]
    if not any(digests):
        return None
    told: dict[str, Any] = {"a": digests[0], "b": digests[1], "same": digests[0] == digests[1]}
    if all(digests) and a.tenant == b.tenant:
        rows, others = (load_rows(a.workspace.store, a.tenant, str(digest)) for digest in digests)
        told |= {"num_rows": [len(rows), len(others)], "num_common": overlap(rows, others).exact.num_rows}
    return told


def diff_text(found: Mapping[str, Any]) -> str:
    """Return a comparison as lines for a person."""
    lines = [
        f"a {found['a']}",
        f"b {found['b']}",
        f"{len(found['layers'])} common layers: distance {found['distance']:.4f} of the larger, cosine {found['cosine']:.4f}",
        f"{'layers that differ most':<48}{'distance':>10}{'cosine':>10}{'in':>8}{'out':>8}",
    ]
    for layer in sorted(found["layers"], key=lambda layer: -layer["distance"])[:NUM_SHOWN]:
        numbers = f"{layer['distance']:>10.4f}{layer['cosine']:>10.4f}{layer['overlap_in']:>8.3f}{layer['overlap_out']:>8.3f}"
        lines.append(f"{layer['module']:<48}{numbers}")
    for side in ("a", "b"):
        if found[f"only_{side}"]:
            lines.append(f"only {side} adapts: {', '.join(found[f'only_{side}'][:NUM_SHOWN])} ({len(found[f'only_{side}'])})")
    lines += [f"{key}: {pair[0]} | {pair[1]}" for key, pair in found["settings"].items()]
    lines += [_data_line(split, told) for split, told in found["data"].items() if told is not None]
    return "\n".join(lines)


def _data_line(split: str, told: Mapping[str, Any]) -> str:
    if told["same"]:
        return f"data, {split}: the same rows ({told['a'][:12]})"
    names = " | ".join((told[side] or "none")[:12] for side in ("a", "b"))
    counts = (
        f"; {told['num_rows'][0]} and {told['num_rows'][1]} rows, {told['num_common']} of a in both" if "num_rows" in told else ""
    )
    return f"data, {split}: {names}{counts}"
