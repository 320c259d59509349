"""Dropout masks as a function of (seed, step, micro-batch, layer): drawn again bit for bit by a recomputation or a resume."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DropoutKey:
    """Names one training forward of one adapter."""

    seed: int
    step: int
    micro_batch: int


def generator_of(*parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator seeded by the SHA-256 of `parts`, so that near seeds give unrelated streams."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    generator = torch.Generator(device=device)
    generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return generator


def dropout_mask(x: Tensor, p: float, key: DropoutKey, layer: int) -> Tensor:
    """Return the mask for x [..., I], already scaled: 0 with probability p, else 1 / (1 - p)."""
    generator = generator_of("dropout", key.seed, key.step, key.micro_batch, layer, device=x.device)
    keep = torch.rand(x.shape, generator=generator, device=x.device) >= p
    return keep.to(x.dtype) / (1.0 - p)
