"""Memory and time of conversions, against a plain copy of the same bytes.

    python benchmarks/convert_memory.py [--work FOLDER] [--rounds 2] [--only hf:dcp dcp:hf …]

Makes a random Llama of 1.1 billion parameters in bfloat16 (2.2 GB in 3 files) and one twice as large, and converts each from form to form,
every conversion in a process of its own. "peak" is the resident memory above that of the process with its libraries imported, "limit"
0.5 GB + twice the largest tensor. "time" is that of planning and converting, start-up left out; "copy" that of copying the files with
fsync, right before it.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

ROUTES = ("hf:dcp", "dcp:hf", "hf:meta", "meta:hf", "hf:torch", "torch:hf", "hf:meta4", "meta4:hf")
SHAPES = {
    "1.1B": {"num_hidden_layers": 22, "hidden_size": 2048, "intermediate_size": 5632},
    "2.2B": {"num_hidden_layers": 47, "hidden_size": 2048, "intermediate_size": 5632},
}
COMMON = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "dtype": "bfloat16",
}
LARGEST_TENSOR_BYTES = 32000 * 2048 * 2
LIMIT_BYTES = 500_000_000 + 2 * LARGEST_TENSOR_BYTES


def make_model(folder: Path, shape: dict[str, int]) -> None:
    """A Hugging Face folder with random weights, in three files."""
    import torch

    from tunelib.formats.export import plan_checkpoint
    from tunelib.formats.plan import Wish
    from tunelib.formats.source import expected_shapes
    from tunelib.formats.tensors import TensorInfo, shape_of
    from tunelib.formats.write import write_checkpoint
    from tunelib.model.families import parse_config

    fields = {**COMMON, **shape}
    weights = {name: TensorInfo(name, torch.bfloat16, tuple(size)) for name, size in expected_shapes(parse_config(fields, "here")).items()}
    num_bytes = sum(info.nbytes for info in weights.values())
    plan = plan_checkpoint(Wish("hf", num_bytes // 3 + LARGEST_TENSOR_BYTES), None, weights, fields, None, None, None, frozenset())
    noise = torch.randn(LARGEST_TENSOR_BYTES // 2 + 4096, generator=torch.Generator().manual_seed(0)).bfloat16()

    def draw(name: str, where: tuple[slice, ...]) -> torch.Tensor:
        size = torch.Size(shape_of(where, weights[name].shape))
        begin = hash(name) % 4096
        return noise[begin : begin + size.numel()].view(size)

    write_checkpoint(plan, draw, folder)


def measure_here(source: str, target: str, kind: str, model_parallel: str) -> None:
    """In a process of its own: convert, and print peak memory and seconds."""
    import torch._dynamo  # which torch imports where a model is first made: a second of start-up

    from tunelib.formats.convert import convert, keep_freed_memory, plan_conversion

    assert torch._dynamo
    keep_freed_memory()
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    begun = time.perf_counter()
    convert(plan_conversion(Path(source), Path(target), kind, model_parallel=int(model_parallel)))
    seconds = time.perf_counter() - begun
    print(json.dumps({"peak": resident_bytes("VmHWM") - before, "seconds": seconds}))


def resident_bytes(what: str) -> int:
    """A figure of /proc/self/status, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024


def copy_seconds(source: Path, target: Path) -> float:
    """Copy the files of a folder, each followed by fsync."""
    begun = time.perf_counter()
    target.mkdir()
    for path in sorted(path for path in source.iterdir() if path.is_file()):
        shutil.copyfile(path, target / path.name)
        descriptor = os.open(target / path.name, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    seconds = time.perf_counter() - begun
    shutil.rmtree(target)
    return seconds


def measure(source: Path, target: Path, kind: str, rounds: int) -> tuple[int, float, list[float]]:
    """Peak bytes, median seconds, and the ratio of each pair of conversion and copy."""
    peak, seconds, ratios = 0, [], []
    for _ in range(rounds):
        copied = copy_seconds(source, target.with_name("copy"))
        shutil.rmtree(target, ignore_errors=True)
        words = [str(source), str(target), kind.rstrip("4"), "4" if kind.endswith("4") else "0"]
        output = subprocess.run([sys.executable, __file__, "--measure", *words], check=True, capture_output=True, text=True, timeout=900).stdout
        found = json.loads(output.splitlines()[-1])
        peak = max(peak, found["peak"])
        seconds.append(found["seconds"])
        ratios.append(found["seconds"] / copied)
    return peak, statistics.median(seconds), ratios


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="where the models are made, about 18 GB; a temporary folder by default")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=ROUTES, choices=ROUTES)
    parser.add_argument("--sizes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.measure:
        measure_here(*words.measure)
        return 0
    print(f"{'model':6} {'conversion':12} {'peak MB':>8} {'limit MB':>8} {'time s':>7} {'time / copy':>18}")
    worst = 0
    with tempfile.TemporaryDirectory(dir=words.work) as folder:
        for name in words.sizes:
            work = Path(folder) / name
            work.mkdir()
            make_model(work / "hf", SHAPES[name])
            for route in words.only:
                source, kind = route.split(":")
                if not (work / source).exists():
                    measure(work / "hf", work / source, source, 1)
                target = work / f"{kind}-again" if (work / kind).exists() else work / kind
                peak, seconds, ratios = measure(work / source, target, kind, words.rounds)
                shown = " ".join(f"{ratio:.2f}" for ratio in ratios)
                print(f"{name:6} {route:12} {peak / 1e6:8.0f} {LIMIT_BYTES / 1e6:8.0f} {seconds:7.1f} {shown:>18}", flush=True)
                worst = max(worst, peak)
                if target.name.endswith("-again"):
                    shutil.rmtree(target)
            shutil.rmtree(work)
    return int(worst > LIMIT_BYTES)


if __name__ == "__main__":
    sys.exit(main())
