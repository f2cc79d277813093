"""tunelib's own train.py, watched from outside.

ours.py WORKLOAD DOCUMENTS STEPS [compile | eager] [rows at once]
"""

import contextlib
import importlib
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))


def write_toml(path: Path, name: str, documents: str, how: str, rows_at_once: str) -> None:
    """The workload as a user would write it down."""
    from workloads import LR, WORKLOADS

    workload = WORKLOADS[name]
    model = "\n".join(f"{key} = {str(value).lower()}" for key, value in asdict(workload.shape).items())
    lora = f"[lora]\nenable = true\nrank = {workload.lora_rank}\nalpha = {2.0 * workload.lora_rank}\n" if workload.lora_rank else ""
    path.write_text(
        f"""
[model]
{model}
tokenizer_path = "{ROOT}/train_configs/assets/debug/tokenizer"
[dataset]
path = "{documents}"
[training]
seq_len = {workload.seq_len}
global_batch_size = {workload.rows}
local_batch_size = {rows_at_once}
[optimizer]
lr = {LR}
[lr_scheduler]
warmup_steps = 0
[compile]
enable = {"true" if how == "compile" else "false"}
{lora}"""
    )


class LastStep(Exception):
    """All that is measured has been done."""


def main(name: str, documents: str, steps: str, how: str = "compile", rows_at_once: str = "-1") -> None:
    train: Any = importlib.import_module("train")  # the program
    from workloads import say_step

    take_step, last, rank = train.train_step, int(steps), int(os.environ.get("RANK", "0"))

    def watched_step(model: Any, optimizer: Any, work: Any, *words: Any) -> tuple[float, float]:
        loss, norm = take_step(model, optimizer, work, *words)
        if rank == 0:
            with contextlib.redirect_stdout(sys.__stdout__):
                say_step(work.num_tokens, loss)
        if work.number == last:
            raise LastStep
        return loss, norm

    train.train_step = watched_step
    together = os.getppid() if "RANK" in os.environ else os.getpid()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr), contextlib.suppress(LastStep):
        toml = Path(folder) / "speed.toml"
        write_toml(toml, name, documents, how, rows_at_once)
        train.main([str(toml), "--job.dump_folder", str(Path(documents).with_name(f"run-{together}")), "--training.steps", "1000"])
    os._exit(0)  # no export, no checkpoint


if __name__ == "__main__":
    main(*sys.argv[1:])
