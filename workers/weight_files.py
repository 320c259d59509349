"""The safetensors files of a model folder: which they are, what their headers say, and the SHA-256 of every tensor.

Headers are read by hand and tensors as plain bytes, so that a base of any size is known without torch and without
building the model. Files are read in pieces rather than mapped: one that is cut short while it is being
read then raises an error, where a mapping would kill the process.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.errors import BadInput

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_HEADER_BYTES = 100_000_000
"""Limit of the safetensors library."""
PIECE_BYTES = 4 << 20
ITEM_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16}
ITEM_BITS |= {"U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
"""Bits of one element of each safetensors type."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's bytes lie."""

    name: str
    dtype: str
    """The name safetensors gives it: F32, BF16, ..."""
    shape: tuple[int, ...]
    begin: int
    """Offset in the file, bytes."""
    end: int


@dataclass(frozen=True)
class TensorDigest:
    """A tensor by content."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str
    """Of the raw little-endian bytes."""

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


def find_weights(folder: Path) -> tuple[Path, ...]:
    """Return the safetensors files transformers would load from `folder`, sorted; raise BadInput where there are none."""
    if (folder / WEIGHTS_NAME).is_file():
        return (folder / WEIGHTS_NAME,)
    if (folder / INDEX_NAME).is_file():
        return _shards_of_index(folder)
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise BadInput(
            f"the base folder {folder} has pickle weights only ({pickles[0]}); lorafleet never unpickles; convert them once with "
            "transformers' save_pretrained(folder, safe_serialization=True) where you trust them."
        )
    if (folder / "adapter_config.json").is_file():
        raise BadInput(f"{folder} holds an adapter, not a base model; name the folder of the base it was trained on.")
    raise BadInput(f"the base folder {folder} has no weights; expected {WEIGHTS_NAME} or {INDEX_NAME} with its shards.")


def _shards_of_index(folder: Path) -> tuple[Path, ...]:
    index = read_json(folder / INDEX_NAME)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
        raise BadInput(f"{folder / INDEX_NAME} has no 'weight_map' from tensors to files; copy the folder again.")
    names = sorted(set(weight_map.values()))
    for name in names:
        if name != Path(name).name or not name.endswith(".safetensors"):
            raise BadInput(f"{folder / INDEX_NAME} names {name[:80]!r}, which is not a safetensors file of the folder itself.")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise BadInput(
            f"{folder / INDEX_NAME} names {len(names)} weight files, but {', '.join(missing[:3])}"
            f"{' and others are' if len(missing) > 3 else ' is' if len(missing) == 1 else ' are'} missing; download them again."
        )
    paths = tuple(folder / name for name in names)
    _check_index(folder / INDEX_NAME, weight_map, {path.name: {tensor.name for tensor in read_header(path)} for path in paths})
    return paths


def _check_index(index: Path, weight_map: Mapping[str, str], stored: Mapping[str, set[str]]) -> None:
    absent = sorted(name for name, file in weight_map.items() if name not in stored[file])
    if absent:
        raise BadInput(
            f"{index} places {absent[0]!r} in {weight_map[absent[0]]}, which does not hold it "
            f"({len(absent)} such tensors); copy the folder again."
        )


def read_json(path: Path) -> Any:
    """Return a JSON file's content; raise BadInput if it is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise BadInput(f"{path} is not valid JSON; the file is damaged, copy it again.") from None


def read_header(path: Path) -> tuple[StoredTensor, ...]:
    """Return the tensors of a safetensors file in the order of their bytes; raise BadInput if file and header disagree."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise BadInput(
                f"{path} is truncated or no safetensors file (header of {length} bytes, file of {size}); copy it again."
            )
        header = file.read(length)
    tensors = _parse_header(path, header, 8 + length)
    end = max((tensor.end for tensor in tensors), default=8 + length)
    if end != size:
        state = "truncated" if end > size else "followed by bytes that belong to no tensor"
        raise BadInput(f"{path} is {state}: its tensors end at byte {end}, the file has {size}; copy it again.")
    return tensors


def _parse_header(path: Path, header: bytes, start: int) -> tuple[StoredTensor, ...]:
    try:
        entries = json.loads(header, object_pairs_hook=_without_duplicates)
        tensors = [_tensor(name, entry, start) for name, entry in entries.items() if name != "__metadata__"]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise BadInput(f"{path} has a damaged safetensors header; copy the file again.") from None
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.end))
    position = start
    for tensor in tensors:
        if tensor.begin != position:
            raise BadInput(f"{path} has a damaged safetensors header (gap or overlap before {tensor.name!r}); copy it again.")
        position = tensor.end
    return tuple(tensors)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("duplicate keys")
    return found


def _tensor(name: str, entry: Mapping[str, Any], start: int) -> StoredTensor:
    shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
    numbers = (*shape, begin, end)
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("sizes and offsets are whole numbers")
    if (end - begin) * 8 != math.prod(shape) * ITEM_BITS[entry["dtype"]]:
        raise ValueError("offsets and shape disagree")
    return StoredTensor(name, entry["dtype"], shape, start + begin, start + end)


def hash_tensors(path: Path, pool: ThreadPoolExecutor) -> tuple[TensorDigest, ...]:
    """Return every tensor of a file with its digest, sorted by name. hashlib releases the GIL, so `pool` hashes in parallel."""
    tensors = sorted(read_header(path), key=lambda tensor: tensor.name)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        digests = list(pool.map(lambda tensor: _sha256_of_span(path, descriptor, tensor.begin, tensor.end), tensors))
    finally:
        os.close(descriptor)
    return tuple(TensorDigest(one.name, one.dtype, one.shape, digest) for one, digest in zip(tensors, digests, strict=True))


def _sha256_of_span(path: Path, descriptor: int, begin: int, end: int) -> str:
    digest = hashlib.sha256()
    for piece in _pieces(path, descriptor, begin, end):
        digest.update(piece)
    return digest.hexdigest()


def _pieces(path: Path, descriptor: int, begin: int, end: int) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(min(PIECE_BYTES, end - begin)))
    while begin < end:
        got = os.preadv(descriptor, [buffer[: end - begin]], begin)
        if got == 0:
            raise BadInput(f"{path} became shorter while it was read; run the command again when nothing writes to it.")
        yield buffer[:got]
        begin += got
