"""Who a base model is: the content id of its weights and architecture (DESIGN §5), without torch.

The weights enter as a Merkle root over (name, dtype, shape, SHA-256 of the raw bytes) of every tensor, so that neither the
number of files nor their names matter; the head of a model whose head is tied to its embeddings is counted
once, whether it is stored or not. Hashing reads every byte, therefore results are cached by what the file system
says of a file; nothing but speed depends on the cache.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from infra.errors import BadInput
from infra.fingerprint import canonical_json, id_of_json, sha256_of_file
from infra.records import decode_record, encode_record
from workers.architecture import ARCHITECTURE_VERSION, architecture_of, context_length_of
from workers.spec import BaseModelSpec
from workers.weight_files import INDEX_NAME, WEIGHTS_NAME, TensorDigest, find_weights, hash_tensors, read_json

IDENTITY_VERSION = 1
BASE_FORMAT = "base/1"
CACHE_FORMAT = "tensor-digests/1"
HEAD_NAMES = ("lm_head.weight", "embed_out.weight", "cls.predictions.decoder.weight")
"""Output heads that may be tied to the input embeddings, over the model families; a prefix may precede them."""
COMPANION_SUFFIXES = (".json", ".model", ".txt", ".jinja", ".tiktoken")
"""Small files beside the weights that belong to a base: configuration, tokenizer, chat template."""


@dataclass(frozen=True)
class BaseIdentity:
    """A base model by content, and what its folder holds."""

    base_id: str
    weights_root: str
    """Merkle root of the tensors, hexadecimal."""
    architecture: Mapping[str, Any]
    """What alters the forward pass, normalised."""
    num_parameters: int
    """Elements of all tensors, tied ones counted once."""
    size_bytes: int
    """Size of the weight files."""
    files: tuple[str, ...]
    """Names of the files that make up the base, sorted: weights, index, configuration, tokenizer."""
    context_length: int | None
    """Tokens a sequence may have as the folder's configuration says, None if it does not; not part of the identity."""
    tensors: tuple[TensorDigest, ...]
    """Sorted by name, without a tied head."""

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor by name."""
        return {tensor.name: tensor.shape for tensor in self.tensors}


def identify(path: Path, cache_dir: Path | None = None) -> BaseIdentity:
    """Return the identity of the base in the folder `path`; digests are cached below `cache_dir` if one is given.

    Raises BadInput with the way out when the folder is missing, has no configuration or no weights, has pickle weights
    only, or a file is truncated or damaged.
    """
    folder = Path(path)
    raw = read_config(folder)
    weights = find_weights(folder)
    stored = _digest_files(weights, cache_dir)
    said = _said_tied(raw)
    tensors = _without_tied_head(stored) if said is not False else stored
    tied = not any(_is_head(tensor) for tensor in tensors)
    architecture = architecture_of(raw, tied=tied) | _remote_code(folder, raw)
    root = merkle_root(tensors)
    return BaseIdentity(
        base_id=base_id_of(root, architecture),
        weights_root=root,
        architecture=architecture,
        num_parameters=sum(tensor.num_elements for tensor in tensors),
        size_bytes=sum(file.stat().st_size for file in weights),
        files=_files_of(folder, weights, with_code="auto_map" in raw),
        context_length=context_length_of(raw),
        tensors=tensors,
    )


def base_id_of(weights_root: str, architecture: Mapping[str, Any]) -> str:
    """Return the id that stands for weights and architecture."""
    versions = [IDENTITY_VERSION, ARCHITECTURE_VERSION]
    return id_of_json({"version": versions, "weights_root": weights_root, "architecture": architecture})


def read_config(folder: Path) -> dict[str, Any]:
    """Return the raw config.json of a base folder; raise BadInput with the way out where there is none that can be used."""
    if not folder.is_dir():
        raise BadInput(f"there is no base folder {folder}; give the path of a folder with config.json and safetensors weights.")
    if not (folder / "config.json").is_file():
        hint = "it holds an adapter; name its base instead" if (folder / "adapter_config.json").is_file() else "copy it there"
        raise BadInput(f"the base folder {folder} has no config.json; {hint}.")
    raw = read_json(folder / "config.json")
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise BadInput(f"{folder / 'config.json'} names no 'model_type'; expected the configuration of a transformers model.")
    return raw


def training_view(spec: BaseModelSpec) -> str:
    """Return the id of how the base is held while training: dtype and quantisation. Merging needs the same view."""
    quantization = spec.quantization.model_dump(mode="json") if spec.quantization else None
    return id_of_json({"version": 1, "dtype": spec.dtype, "quantization": quantization})


def describe_base(identity: BaseIdentity) -> dict[str, Any]:
    """Return the body of the record base/1. It holds content only, so that every copy of a base gives the same record."""
    return {
        "base_id": identity.base_id,
        "version": [IDENTITY_VERSION, ARCHITECTURE_VERSION],
        "weights_root": identity.weights_root,
        "architecture": dict(identity.architecture),
        "num_parameters": identity.num_parameters,
        "num_tensors": len(identity.tensors),
    }


def diff(a: BaseIdentity | Mapping[str, Any], b: BaseIdentity | Mapping[str, Any]) -> list[str]:
    """Name what differs between two bases (identities or base/1 bodies): "weights", "rope.rope_theta: 10000 -> 500000"."""
    one, other = (describe_base(base) if isinstance(base, BaseIdentity) else base for base in (a, b))
    found = ["weights"] if one["weights_root"] != other["weights_root"] else []
    before, after = _flat(one["architecture"]), _flat(other["architecture"])
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            found.append(f"{key}: {_shown(before, key)} -> {_shown(after, key)}")
    return found


def merkle_root(tensors: Iterable[TensorDigest]) -> str:
    """Return the root of a binary hash tree over the tensors, sorted by name (leaves and nodes told apart as in RFC 6962)."""
    ordered = sorted(tensors, key=lambda one: one.name)
    leaves = [canonical_json([one.name, one.dtype, one.shape, one.sha256]) for one in ordered]
    level = [hashlib.sha256(b"\0" + leaf).digest() for leaf in leaves]
    while len(level) > 1:
        pairs = [level[at : at + 2] for at in range(0, len(level), 2)]
        level = [hashlib.sha256(b"\1" + b"".join(pair)).digest() if len(pair) == 2 else pair[0] for pair in pairs]
    return level[0].hex() if level else hashlib.sha256(b"").hexdigest()


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    return {key: leaf for name in value for key, leaf in _flat(value[name], f"{prefix}.{name}" if prefix else name).items()}


def _shown(values: Mapping[str, Any], key: str) -> str:
    return str(values[key]) if key in values else "(not set)"


def _said_tied(raw: Mapping[str, Any]) -> bool | None:
    """What the configuration says about tying, None if nothing. A nested text model may say it instead of the whole."""
    nested = raw.get("text_config")
    answers = [raw.get("tie_word_embeddings"), nested.get("tie_word_embeddings") if isinstance(nested, Mapping) else None]
    given = [answer for answer in answers if answer is not None]
    return bool(given[0]) if given else None


def _without_tied_head(tensors: Sequence[TensorDigest]) -> tuple[TensorDigest, ...]:
    """Leave out heads whose bytes are those of another tensor: saving a tied model may write them or not."""
    others = {(one.dtype, one.shape, one.sha256) for one in tensors if not _is_head(one)}
    return tuple(one for one in tensors if not (_is_head(one) and (one.dtype, one.shape, one.sha256) in others))


def _is_head(tensor: TensorDigest) -> bool:
    return any(tensor.name == head or tensor.name.endswith(f".{head}") for head in HEAD_NAMES)


def _remote_code(folder: Path, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Code that comes with a model alters its forward pass: name it by content where the configuration refers to it."""
    if "auto_map" not in raw:
        return {}
    return {"remote_code": {path.name: sha256_of_file(path) for path in sorted(folder.glob("*.py"))}}


def _files_of(folder: Path, weights: Sequence[Path], *, with_code: bool) -> tuple[str, ...]:
    suffixes = (*COMPANION_SUFFIXES, ".py") if with_code else COMPANION_SUFFIXES
    companions = {path.name for path in folder.iterdir() if path.is_file() and path.suffix in suffixes}
    companions = {name for name in companions if not name.startswith(".")}
    if weights[0].name == WEIGHTS_NAME:
        companions.discard(INDEX_NAME)
    return tuple(sorted(companions | {path.name for path in weights}))


def _digest_files(weights: Sequence[Path], cache_dir: Path | None) -> tuple[TensorDigest, ...]:
    tensors: dict[str, TensorDigest] = {}
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for path in weights:
            for tensor in _digest_file(path, cache_dir, pool):
                if tensor.name in tensors:
                    raise BadInput(f"{path.parent} stores {tensor.name!r} in two weight files; save the model again.")
                tensors[tensor.name] = tensor
    return tuple(tensors[name] for name in sorted(tensors))


def _digest_file(path: Path, cache_dir: Path | None, pool: ThreadPoolExecutor) -> Sequence[TensorDigest]:
    if cache_dir is None:
        return hash_tensors(path, pool)
    real = path.resolve()
    entry = Path(cache_dir) / "digests" / f"{id_of_json(str(real))}.json"
    before = _file_state(real)
    cached = _read_cached(entry, before)
    if cached is not None:
        return cached
    tensors = hash_tensors(real, pool)
    if _file_state(real) == before:
        _write_cached(entry, real, before, tensors)
    return tensors


def _file_state(path: Path) -> list[int]:
    """What changes when a file's content does: size, times of modification and change (nanoseconds), inode."""
    known = path.stat()
    return [known.st_size, known.st_mtime_ns, known.st_ctime_ns, known.st_ino]


def _read_cached(entry: Path, state: list[int]) -> tuple[TensorDigest, ...] | None:
    """Return the cached digests if they are those of a file in this `state`; a damaged entry counts as none."""
    try:
        body = decode_record(entry.read_bytes(), CACHE_FORMAT, str(entry))
        if body["state"] != state:
            return None
        return tuple(TensorDigest(name, dtype, tuple(shape), sha256) for name, dtype, shape, sha256 in body["tensors"])
    except (OSError, BadInput, KeyError, TypeError, ValueError):
        return None


def _write_cached(entry: Path, path: Path, state: list[int], tensors: Sequence[TensorDigest]) -> None:
    rows = [[one.name, one.dtype, one.shape, one.sha256] for one in tensors]
    entry.parent.mkdir(parents=True, exist_ok=True)
    temporary = entry.with_name(f"{entry.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
    temporary.write_bytes(encode_record(CACHE_FORMAT, {"path": str(path), "state": state, "tensors": rows}))
    temporary.replace(entry)
