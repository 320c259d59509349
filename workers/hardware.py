"""What this machine trains with, as torch sees it."""

import os
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Hardware:
    """Processors and accelerators of this machine."""

    num_cpus: int
    num_threads: int
    """Compute threads torch would use if nobody said otherwise; hosts use what a job asks for, one by default."""
    accelerators: tuple[str, ...]
    """Names of the accelerators torch can use."""


def look() -> Hardware:
    """Return what torch finds here."""
    names = tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    return Hardware(os.cpu_count() or 1, torch.get_num_threads(), names)
