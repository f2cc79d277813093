"""Peak memory of this process."""

import resource
import sys

import torch


def peak_memory_gib(device: torch.device) -> float:
    """The most memory used so far, in GiB: of the GPU where there is one, else of the process (its peak resident set)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
