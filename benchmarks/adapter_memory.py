"""Memory and time of a training step: full fine-tuning beside LoRA, DoRA and QLoRA of the same model.

    python benchmarks/adapter_memory.py [--steps 4] [--only full LoRA …]

Trains a Llama of 204 million parameters, drawn from a seed, on the debug conversations with train.py, every kind in a process of its own.
"peak" is the resident memory above that of the process with its libraries imported, from the start to the end of the last step; "base", "grads" and
"moments" are what the frozen weights of adapted layers, all gradients, and the optimizer's state were made of during the last step.
"""

import argparse
import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

KINDS = {"full": "", "LoRA": "", "DoRA": "use_dora = true", "QLoRA": 'quantize_base = "nf4"', "QDoRA": 'use_dora = true\nquantize_base = "nf4"'}
CONFIG = """
[dataset]
path = "train_configs/assets/debug/chat.jsonl"
[model]
num_hidden_layers = 12
hidden_size = 1024
intermediate_size = 4096
num_attention_heads = 16
num_key_value_heads = 16
tokenizer_path = "train_configs/assets/debug/tokenizer"
vocab_size = 640
[training]
global_batch_size = 1
seq_len = 128
[metrics]
log_freq = 1
[checkpoint]
verify_export = false
"""
SECTION = "[lora]\nenable = true\nrank = 16\n"


def resident_bytes(what: str) -> int:
    """A figure of /proc/self/status, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024


def measure_here(toml: str, folder: str, steps: str) -> None:
    """In a process of its own: train, and print what was seen after the last step's backward pass."""
    import torch
    import torch._dynamo  # which torch imports where a model is first made

    train = importlib.import_module("train")  # the program, watched from outside
    assert torch._dynamo
    found: dict[str, Any] = {}
    step, clip = train.train_step, train.clip_gradients

    def watched_step(model: Any, optimizer: Any, *words: Any) -> tuple[float, float]:
        def look(*facts: Any) -> Any:  # after the backward pass: all gradients are there
            parameters = dict(model.named_parameters())
            adapted = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
            found["trained"] = sum(parameter.numel() for parameter in parameters.values() if parameter.requires_grad)
            found["base"] = sum(module.weight.nbytes for module in adapted.values())
            found["base_numbers"] = sum(module.in_features * module.out_features for module in adapted.values())
            found["grads"] = sum(parameter.grad.nbytes for parameter in parameters.values() if parameter.grad is not None)
            found["frozen_grads"] = sum(parameter.grad is not None for parameter in parameters.values() if not parameter.requires_grad)
            return clip(*facts)

        train.clip_gradients = look
        result = step(model, optimizer, *words)
        found["moments"] = sum(value.nbytes for state in optimizer.state.values() for value in state.values())
        found["peak"] = resident_bytes("VmHWM") - before
        return result

    train.train_step = watched_step
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    with contextlib.redirect_stdout(sys.stderr):
        train.main([toml, "--job.dump_folder", folder, "--training.steps", steps])
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    found["losses"] = [row["loss"] for row in rows]
    found["tokens_per_second"] = sorted(row["tokens_per_second"] for row in rows)[len(rows) // 2]
    print(json.dumps(found))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--only", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.measure:
        measure_here(*words.measure)
        return 0
    print(
        f"{'kind':6} {'trained M':>9} {'peak MB':>8} {'base MB':>8} {'bytes a weight':>14} {'grads MB':>8} {'moments MB':>10} {'tokens/s':>8}  loss"
    )
    with tempfile.TemporaryDirectory() as folder:
        for kind in words.only:
            toml = Path(folder) / f"{kind}.toml"
            toml.write_text(CONFIG + ("" if kind == "full" else SECTION + KINDS[kind]))
            command = [sys.executable, __file__, "--measure", str(toml), str(Path(folder) / kind), str(words.steps)]
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=900, env=os.environ, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            assert not found["frozen_grads"], "a frozen weight has a gradient"
            a_weight = f"{found['base'] / found['base_numbers']:.4f}" if found["base_numbers"] else "-"
            figures = f"{found['trained'] / 1e6:9.1f} {found['peak'] / 1e6:8.0f} {found['base'] / 1e6:8.0f} {a_weight:>14}"
            print(
                f"{kind:6} {figures} {found['grads'] / 1e6:8.0f} {found['moments'] / 1e6:10.0f} {found['tokens_per_second']:8.0f}"
                f"  {found['losses'][0]:.3f} → {found['losses'][-1]:.3f}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
