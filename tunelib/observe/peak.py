"""What the machine could do at best: a published figure for GPUs that have one, else a short matrix product of the run's own type."""

import math
import re
import time
from dataclasses import dataclass

import torch

from tunelib.parallel.reduce import sum_over_ranks

MEASURE_SECONDS = 0.2
PUBLISHED = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
}
"""Words of the name that CUDA gives a GPU → bfloat16 operations per second without sparsity, from its data sheet; the first that fits counts."""


@dataclass(frozen=True)
class Peak:
    """Floating-point operations per second of all processes together, and where that is from."""

    flops_per_second: float
    source: str


def find_peak(device: torch.device, dtype: torch.dtype) -> Peak | None:
    """Of all processes that compute in ``dtype``; takes about 0.2 s where it is measured. Every rank must call it.

    Returns:
        None where a GPU has no room for a product.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    published = published_flops(name) if dtype in (torch.bfloat16, torch.float16) else None
    size = 4096 if device.type == "cuda" else 1024
    try:
        own = published or measure_flops(device, dtype, size)
    except torch.OutOfMemoryError:  # the run is over, and wants its summary
        own = math.nan
    total = sum_over_ranks(torch.tensor(own, dtype=torch.float64, device=device)).item()
    if math.isnan(total):
        return None
    short = str(dtype).removeprefix("torch.")
    return Peak(total, f"published for {name}" if published else f"measured by {short} products of {size:,} × {size:,}")


def published_flops(name: str) -> float | None:
    """What the table has for a GPU's name, such as "NVIDIA A100-SXM4-80GB"; None for nothing."""
    words = re.split(r"[\s-]+", name)
    return next((flops for key, flops in PUBLISHED.items() if set(key.split()) <= set(words)), None)


def measure_flops(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """The best of the products that fit in the time, in operations per second."""
    left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(left)
    best, begun = float("inf"), time.monotonic()
    while time.monotonic() - begun < MEASURE_SECONDS or best == float("inf"):
        before = time.perf_counter()
        torch.mm(left, right, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - before)
    return 2 * size**3 / best
