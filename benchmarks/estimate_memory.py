"""Estimates of memory beside what was measured: runs on this machine, and the tables that torchtune published.

    python benchmarks/estimate_memory.py [--only measured published sizes]

"measured" trains models with train.py on the debug conversations, all tokens trained, two steps each, every run in processes of its own.
"state" is what is there from step to step, and the gradients; "tracked" is the peak of torch's own memory tracker in such a step; "RSS" is the
resident memory above that of the process with its libraries imported, from the start to the end of the last step, of the process that had
most. "sizes" are larger plans and the seconds of one core that each took. GB are 10⁹ bytes, GiB 2³⁰.
"""

import argparse
import contextlib
import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from tunelib.config import load_config
from tunelib.config.schema import ActivationCheckpoint, Lora, Model, Optimizer, Parallelism, Training

ROOT = Path(__file__).parents[1]
CONFIG = """
[dataset]
path = "train_configs/assets/debug/chat.jsonl"
train_on = "all"
[model]
num_hidden_layers = 12
hidden_size = 1024
intermediate_size = 4096
num_attention_heads = 16
num_key_value_heads = 16
tokenizer_path = "train_configs/assets/debug/tokenizer"
vocab_size = 32768
[training]
steps = 2
global_batch_size = 2
seq_len = 256
[checkpoint]
verify_export = false
"""
RUNS: dict[str, tuple[int, list[str]]] = {
    "full": (1, []),
    "full, micro-batches of 1": (1, ["--training.local_batch_size", "1"]),
    "full, SGD": (1, ["--optimizer.name", "SGD"]),
    "full, recompute": (1, ["--activation_checkpoint.mode", "full"]),
    "LoRA": (1, ["--lora.enable"]),
    "DoRA, recompute": (1, ["--lora.enable", "--lora.use_dora", "--activation_checkpoint.mode", "selective"]),
    "full, sharded over 2": (2, []),
    "full, products split over 2": (2, ["--parallelism.tensor_parallel_degree", "2"]),
    "full, rows cut in 2": (2, ["--parallelism.context_parallel_degree", "2"]),
}
SECTIONS = ("training", "parallelism", "lora", "optimizer", "activation_checkpoint")


@dataclass(frozen=True)
class Published:
    """A row of a table of torchtune's, and a plan like it."""

    said: str
    flavor: str
    num_gpus: int
    training: Training
    lora: Lora = field(default_factory=Lora)
    optimizer: str = "AdamW"
    mode: str = "full"


def first_readme(said: str, num_gpus: int, lora: bool) -> Published:
    """Llama 2 7B in float32, batches of 2 of Alpaca's conversations, here 512 tokens."""
    training = Training(1, None, 2 * num_gpus, 2, 512, dtype="float32", mixed_precision_param="float32", mixed_precision_reduce="float32")
    return Published(said, "llama2-7b", num_gpus, training, Lora(lora, rank=8, target_modules=("q_proj", "v_proj")), "AdamW" if lora else "SGD")


def september(said: str, mode: str, lora: Lora = Lora()) -> Published:  # frozen
    """Llama 3.1 8B in bfloat16 on one GPU, batches of 2 packed rows of 2,048 tokens."""
    return Published(said, "llama3.1-8b", 1, Training(1, None, 2, 2, 2048, dtype="bfloat16"), lora, "AdamW", mode)


ATTENTION, ALL = Lora(True, rank=8, target_modules=("q_proj", "v_proj", "o_proj")), Lora(True, rank=8, quantize_base="nf4")
PUBLISHED = (
    first_readme("LoRA, 2 × RTX 4090: 18 GB", 2, True),
    first_readme("LoRA, 1 × A6000: 29.5 GB", 1, True),
    first_readme("LoRA, 4 × T4: 12 GB", 4, True),
    first_readme("full, 2 × A100: 62 GB", 2, False),
    first_readme("full, 8 × A6000: 42 GB", 8, False),
    september("full, 1 × RTX 4090: 18.9 GiB", "full"),
    september("full, 1 × A6000: 37.4 GiB", "none"),
    september("LoRA, 1 × RTX 4090: 16.2 GiB", "full", ATTENTION),
    september("LoRA, 1 × A6000: 30.3 GiB", "none", ATTENTION),
    september("QLoRA, 1 × RTX 4090: 7.4 GiB", "full", ALL),
)
ROW = Training(1, None, 8, 1, 8192)
FULL = ActivationCheckpoint("full")
SIZES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "8B, 8 GPUs": ("llama3.1-8b", 8, {"activation_checkpoint": FULL}),
    "8B, 64 GPUs": ("llama3.1-8b", 64, {"training": Training(1, None, 64, 1, 8192), "activation_checkpoint": FULL}),
    "8B, 8 GPUs, products split over 8": (
        "llama3.1-8b",
        8,
        {"training": Training(1, None, 1, 1, 8192), "parallelism": Parallelism(tensor_parallel_degree=8)},
    ),
    "8B, 8 GPUs, rows of 32,768 cut in 4": (
        "llama3.1-8b",
        8,
        {
            "training": Training(1, None, 2, 1, 32768),
            "parallelism": Parallelism(context_parallel_degree=4),
            "activation_checkpoint": FULL,
        },
    ),
    "8B, QLoRA, 1 GPU": ("llama3.1-8b", 1, {"training": Training(1, None, 1, 1, 2048, dtype="bfloat16"), "lora": Lora(True, quantize_base="nf4")}),
    "70B, 64 GPUs": ("llama3.1-70b", 64, {"training": Training(1, None, 64, 1, 8192), "activation_checkpoint": FULL}),
    "70B, 64 GPUs, products split over 8": (
        "llama3.1-70b",
        64,
        {"parallelism": Parallelism(tensor_parallel_degree=8), "activation_checkpoint": FULL},
    ),
}


def resident_bytes(what: str) -> int:
    """A figure of /proc/self/status, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024


def measure_here(argv: list[str]) -> None:
    """In a process of its own: train, and print the peak at the end of the last step."""
    import torch._dynamo  # which torch imports where a model is first made

    train = importlib.import_module("train")  # the program, watched from outside
    assert torch._dynamo
    step, peaks = train.train_step, []

    def watched_step(*words: Any) -> tuple[float, float]:
        result = step(*words)
        peaks.append(resident_bytes("VmHWM") - before)
        return result

    train.train_step = watched_step
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    with contextlib.redirect_stdout(sys.stderr):
        train.main(argv)
    print(json.dumps(peaks[-1]), flush=True)
    os._exit(0)


def run_ranks(command: list[str], world_size: int) -> list[Any]:
    """What each of so many processes prints in its last line."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    workers = [
        subprocess.Popen(command, cwd=ROOT, env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(world_size)
    ]
    outputs = [worker.communicate(timeout=900)[0] for worker in workers]
    assert not any(worker.returncode for worker in workers), "see above"
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def show_measured(names: list[str]) -> None:
    from tunelib.formats.load import find_weights
    from tunelib.parallel.estimate import Plan, estimate_memory

    print("| run | state GB | estimate GB | tracked GB | estimate / tracked | resident GB | RSS GB | resident / RSS |\n|---|" + "---:|" * 7)
    with tempfile.TemporaryDirectory() as folder:
        toml = Path(folder) / "run.toml"
        toml.write_text(CONFIG)
        for number, name in enumerate(names):
            world_size, words = RUNS[name]
            config = load_config([str(toml), *words], world_size=world_size).config
            sections = {section: getattr(config, section) for section in SECTIONS}
            model = find_weights(config.model, "", 0, config.training.seq_len).config
            estimate = estimate_memory(Plan(model, world_size, "cpu", **sections))
            peak = estimate.peak
            given = {"model": {key: value for key, value in asdict(config.model).items() if isinstance(value, int) and not isinstance(value, bool)}}
            given |= {section: asdict(value) for section, value in sections.items()}
            tracker = [sys.executable, "tests/integration/track_memory.py", json.dumps([given])]
            tracked = max(of_rank[0]["Total"] for of_rank in run_ranks(tracker, world_size))
            run = [sys.executable, __file__, "--measure", str(toml), *words, "--job.dump_folder", f"{folder}/run{number}"]
            resident = max(run_ranks(run, world_size))
            state = peak.parameters + peak.optimizer + 4 * estimate.trained // world_size
            sizes = f"{state / 1e9:.2f} | {peak.total / 1e9:.2f} | {tracked / 1e9:.2f} | {peak.total / tracked:.3f}"
            expected = estimate.resident_bytes
            print(f"| {name} | {sizes} | {expected / 1e9:.2f} | {resident / 1e9:.2f} | {expected / resident:.2f} |", flush=True)


def show_published() -> None:
    print("| published | estimate GiB | parameters | gathered | gradients | optimizer | activations | logits |\n|---|" + "---:|" * 7)
    for row in PUBLISHED:
        sections = {"lora": row.lora, "optimizer": Optimizer(row.optimizer), "activation_checkpoint": ActivationCheckpoint(row.mode)}
        print(f"| {row.said} | {describe(row.flavor, row.num_gpus, {'training': row.training, **sections})} |", flush=True)


def show_sizes() -> None:
    print("| plan | estimate GiB | parameters | gathered | gradients | optimizer | activations | logits | seconds |\n|---|" + "---:|" * 8)
    for name, (flavor, num_gpus, sections) in SIZES.items():
        begun = time.process_time()
        figures = describe(flavor, num_gpus, {"training": ROW, **sections})
        print(f"| {name} | {figures} | {time.process_time() - begun:.0f} |", flush=True)


def describe(flavor: str, num_gpus: int, sections: dict[str, Any]) -> str:
    """The total of an estimate, and its parts."""
    from tunelib.formats.load import find_weights
    from tunelib.parallel.estimate import Plan, estimate_memory

    model = find_weights(Model(flavor=flavor), "", 0, sections["training"].seq_len).config
    peak = estimate_memory(Plan(model, num_gpus, "cuda", **sections)).peak
    return " | ".join(f"{size / 2**30:.1f}" for size in (peak.total, *peak.parts().values()))


SHOWN: dict[str, Callable[[argparse.Namespace], None]] = {
    "measured": lambda words: show_measured(words.runs),
    "published": lambda words: show_published(),
    "sizes": lambda words: show_sizes(),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(SHOWN), choices=SHOWN)
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=RUNS, help="which of those that are measured")
    words = parser.parse_args()
    for name in words.only:
        SHOWN[name](words)
        print(flush=True)
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure_here(sys.argv[2:])
    sys.exit(main())
