"""Dropout from a counter-based key: whether a value is dropped is a function of (seed, step, row, position, layer, feature).

Nothing is drawn and nothing is remembered: the backward pass, a recomputation, a resume and any pack compute the same mask, for
all adapters of a segment in the same few operations. The key of a token is hashed with the layer's name and the feature's
number by a 32-bit integer finaliser with full avalanche (two multiplications and three shifts, constants by C. Wellons' search
for low bias, github.com/skeeto/hash-prospector, public domain); a value is kept if its hash is not below p 2^32.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

_FIRST, _SECOND = 0x21F0AAAD, 0x735A2D97
_STRIDE = 0x9E3779B9
"""2^32 divided by the golden ratio: consecutive counters fall far apart."""


def generator_of(*parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator seeded by the SHA-256 of `parts`, so that near seeds give unrelated streams."""
    generator = torch.Generator(device=device)
    generator.manual_seed(_digest(parts, 8) >> 1)
    return generator


@dataclass(frozen=True)
class DropoutRows:
    """The tokens of a pass by name: `keys` [T] (int32), and the share of inputs dropped, `p` [T, 1], once it is known."""

    keys: Tensor
    p: Tensor | None = None

    def of(self, tokens: slice | Tensor, p: Tensor) -> "DropoutRows":
        """Return those of a segment, with its shares `p` [T']."""
        keys = self.keys[tokens] if isinstance(tokens, slice) else self.keys.index_select(0, tokens)
        return DropoutRows(keys, p[:, None])


def row_key(seed: int, step: int, row: int) -> int:
    """Return the key of one data row at one step of one adapter, as a signed 32-bit number."""
    return _signed(_digest(("dropout", seed, step, row), 4))


def token_keys(row_keys: Tensor, positions: Tensor) -> Tensor:
    """Return one key per token: of its row's key and its position in the row, both int32 [T]."""
    return _mixed(row_keys + positions * _signed(_STRIDE))


def dropped(x: Tensor, key: tuple[DropoutRows, str]) -> Tensor:
    """Return x [T', I] with a share p of its values set to 0 and the others divided by 1 - p."""
    rows, layer = key
    assert rows.p is not None
    return x * dropout_mask(rows, layer, x.shape[1]).to(x.dtype) * (1.0 / (1.0 - rows.p)).to(x.dtype)


def dropout_mask(rows: DropoutRows, layer: str, num_features: int) -> Tensor:
    """Return which values are kept, [T', num_features]."""
    assert rows.p is not None
    features = torch.arange(num_features, dtype=torch.int32, device=rows.keys.device) * _signed(_STRIDE)
    hashed = _mixed((rows.keys ^ _layer_key(layer))[:, None] + features)
    threshold = (rows.p.double() * 2.0**32 - 2.0**31).round().clamp(max=2.0**31 - 1).to(torch.int32)
    return hashed >= threshold


def _mixed(x: Tensor) -> Tensor:
    """Hash int32 values one by one; a right shift of a signed number is masked to be a logical one."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x.mul_(_FIRST)
    x ^= (x >> 15) & 0x1FFFF
    x = x.mul_(_SECOND)
    x ^= (x >> 15) & 0x1FFFF
    return x


@lru_cache(maxsize=4096)
def _layer_key(layer: str) -> int:
    return _signed(_digest(("layer", layer), 4))


def _digest(parts: tuple[int | str, ...], num_bytes: int) -> int:
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:num_bytes], "big")


def _signed(number: int) -> int:
    return number - (1 << 32) if number >= 1 << 31 else number
