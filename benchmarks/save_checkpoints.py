"""What saving in the background saves: how long the call blocks training, and how much slower the steps beside it are.

    python benchmarks/save_checkpoints.py [--rounds 2] [--folder FOLDER]

Trains a Llama of 50 million parameters (a state of 600 MB with AdamW's moments) with train.py on one process and saves every sixth step: in the
foreground, in the background, and so on by turns, every run in a process of its own. "call" is the time from the call to its return, while
no training goes on; "first" is that of the first save, which makes the memory of the copies. "steps" are the seconds of steps alone, and
of those that began while a save was being written. Only the ratios of one table mean something.
"""

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

CONFIG = """
[dataset]
path = "train_configs/assets/debug/chat.jsonl"
[model]
num_hidden_layers = 12
hidden_size = 512
intermediate_size = 2048
num_attention_heads = 8
num_key_value_heads = 8
tokenizer_path = "train_configs/assets/debug/tokenizer"
[training]
global_batch_size = 1
seq_len = 256
steps = 37
[checkpoint]
enable_checkpoint = true
interval = 6
keep_latest_k = 2
verify_export = false
"""


def measure_here(toml: str, folder: str, mode: str) -> None:
    """In a process of its own: train, and print the seconds of calls, of whole saves and of steps, and the bytes of a checkpoint."""
    from tunelib.checkpoint.manager import CheckpointManager

    train = importlib.import_module("train")  # the program, watched from outside
    found: dict[str, Any] = {"calls": [], "alone": [], "beside": [], "saves": []}
    step, call, write = train.train_step, CheckpointManager.save_and_go_on, CheckpointManager._write
    writing = [False]

    def watched_step(*words: Any) -> tuple[float, float]:
        kind, begun = "beside" if writing[0] else "alone", time.monotonic()
        result = step(*words)
        found[kind].append(time.monotonic() - begun)
        return result

    def watched_call(self: CheckpointManager, *words: Any) -> None:
        begun = time.monotonic()
        call(self, *words)
        found["calls"].append(time.monotonic() - begun)

    def watched_write(self: CheckpointManager, *words: Any) -> None:
        writing[0], begun = True, time.monotonic()
        try:
            write(self, *words)
        finally:
            writing[0] = False
            found["saves"].append(time.monotonic() - begun)
            found["bytes"] = self._bytes

    train.train_step, CheckpointManager.save_and_go_on, CheckpointManager._write = watched_step, watched_call, watched_write  # type: ignore[method-assign]
    train.main([toml, "--job.dump_folder", folder, "--checkpoint.async_mode", mode])
    print(json.dumps(found))


def measure(toml: Path, folder: Path, mode: str) -> dict[str, Any]:
    """`measure_here`, in another process."""
    words = [sys.executable, __file__, "--here", str(toml), str(folder), mode]
    output = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, timeout=1200).stdout
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def main(rounds: int, parent: str | None) -> None:
    """Print the table, and the ratios."""
    found: dict[str, list[dict[str, Any]]] = {"disabled": [], "async": []}
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        toml = Path(folder) / "run.toml"
        toml.write_text(CONFIG)
        print(f"{'async_mode':<11}{'MB':>7}{'first call':>12}{'call':>9}{'save':>9}{'step':>9}{'beside':>9}")
        for number in range(rounds):
            for mode, runs in found.items():
                run = measure(toml, Path(folder) / f"{mode}-{number}", mode)
                runs.append(run)
                first, *calls = run["calls"]
                alone, beside = (statistics.median(run[kind][1:] or [float("nan")]) for kind in ("alone", "beside"))
                call, save = statistics.median(calls), statistics.median(run["saves"])
                print(f"{mode:<11}{run['bytes'] / 1e6:7.0f}{first:12.3f}{call:9.3f}{save:9.3f}{alone:9.3f}{beside:9.3f}", flush=True)
    foreground, background = ([seconds for run in runs for seconds in run["calls"][1:]] for runs in found.values())
    first = statistics.median(run["calls"][0] for run in found["async"])
    alone, beside = ([seconds for run in found["async"] for seconds in run[kind][1:]] for kind in ("alone", "beside"))
    blocked = statistics.median(foreground)
    print(f"call in the background / in the foreground: {statistics.median(background) / blocked:.3f}; the first: {first / blocked:.3f}")
    print(f"step beside a save / alone: {statistics.median(beside) / statistics.median(alone):.2f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--here"]:
        measure_here(*sys.argv[2:])
    else:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--rounds", type=int, default=2, help="runs of each kind, by turns")
        parser.add_argument(
            "--folder", help="where the checkpoints are written, such as on the disk that matters; by default the system's temporary folder"
        )
        arguments = parser.parse_args()
        main(arguments.rounds, arguments.folder)
