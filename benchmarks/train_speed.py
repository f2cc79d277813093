"""Training speed and memory: tunelib beside TRL, torchtune, litgpt and a plain PyTorch loop, on the same model, documents and dtype.

    benchmarks/setup_peers.sh                    (once: the peers, each in an environment of its own)
    python benchmarks/train_speed.py W1 [--pairs 5] [--steps 12] [--only tunelib "torchtune, compiled" …]

Every contestant is a program of its own, in benchmarks/contestants/, and says when each optimizer step is done. First each runs once, which
also fills the compiler's cache; then tunelib, the fastest peer and the loop run in turn, so often as there are pairs. Counted are tokens of
documents (padding is none) from the third step on; the peak is the process's resident memory, the larger one's of two; the first step is
timed from the process's start. The limit is what this machine's largest product of float32 matrices, timed right before, would do if it did
only the products that nobody can leave out (tunelib/flops.py).
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONTESTANTS = ROOT / "benchmarks/contestants"
sys.path[:0] = [str(ROOT), str(CONTESTANTS)]

import torch  # noqa: E402
from workloads import UNTRAINED, WORKLOADS, Workload, read_documents, write_documents  # noqa: E402

from tunelib.flops import step_flops  # noqa: E402
from tunelib.model.families.llama import parse_config  # noqa: E402

TWO_PROCESSES = "two processes"
OURS = {
    "tunelib": (sys.executable, "ours.py", "compile"),
    "tunelib, eager": (sys.executable, "ours.py", "eager"),
    "tunelib, by rows": (sys.executable, "ours.py", "compile", "1"),
    "tunelib, 2 processes": (TWO_PROCESSES, "ours.py", "compile"),
}
LOOPS = {"loop": (sys.executable, "loop.py", "eager"), "loop, compiled": (sys.executable, "loop.py", "compile")}
PEERS = {
    "TRL": ("trl", "trl_sft.py", "one"),
    "TRL, compiled": ("trl", "trl_sft.py", "one", "compile"),
    "TRL, padded": ("trl", "trl_sft.py", "padded"),
    "TRL, packed": ("trl", "trl_sft.py", "packed"),
    "torchtune": ("torchtune", "torchtune_recipe.py", "eager"),
    "torchtune, compiled": ("torchtune", "torchtune_recipe.py", "compile"),
    "litgpt": ("litgpt", "litgpt_fit.py", "eager"),
    "litgpt, compiled": ("litgpt", "litgpt_fit.py", "compile"),
}
WARM_UP = 3
"""Steps that are not counted."""


@dataclass(frozen=True)
class Run:
    """What was seen of one process."""

    tokens_per_second: float
    peak_gb: float
    first_step_seconds: float


def run(contestant: tuple[str, ...], name: str, documents: Path, steps: int) -> Run:
    """Train in a process of its own."""
    python, program, *how = contestant
    interpreter = [python] if os.sep in python else [str(ROOT / ".peers" / python / "bin/python")]
    environment = dict(os.environ)
    if python == TWO_PROCESSES:
        interpreter = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        environment["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // 2))
    command = [*interpreter, str(CONTESTANTS / program), name, str(documents), str(steps), *how]
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as errors:
        began = time.monotonic()
        process = subprocess.Popen(command, stdout=said, stderr=errors, cwd=ROOT, env=environment)
        _, status, used = os.wait4(process.pid, 0)
        said.seek(0), errors.seek(0)
        told = [line.split() for line in said if line.startswith("STEP ")]
        if status != 0 or len(told) != steps:
            raise SystemExit(f"{' '.join(command)} ended with {status} after {len(told)} steps:\n{errors.read()[-3000:]}")
    times, tokens = [float(words[1]) for words in told], [int(words[2]) for words in told]
    counted = sum(tokens[WARM_UP:]) / (times[-1] - times[WARM_UP - 1])
    return Run(counted, used.ru_maxrss / 1e6, times[0] - began)


def measure_gemm() -> float:
    """Operations per second of the fastest of some products of float32 matrices."""
    a, b = torch.rand(2048, 2048), torch.rand(2048, 2048)
    fastest = float("inf")
    for _ in range(10):
        began = time.perf_counter()
        a @ b
        fastest = min(fastest, time.perf_counter() - began)
    return 2 * 2048**3 / fastest


def flops_per_token(workload: Workload, documents: Path) -> float:
    """Of a step, on average over all documents."""
    listed = read_documents(documents)
    lengths = [len(one["input_ids"]) for one in listed]
    trained = sum(label != UNTRAINED for one in listed for label in one["labels"][1:])
    return step_flops(
        parse_config({"architectures": ["LlamaForCausalLM"], **asdict(workload.shape)}, workload.title), lengths, trained, workload.lora_rank
    ) / sum(lengths)


def spread(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}}–{max(values):{form}})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    everybody = {**OURS, **LOOPS, **PEERS}
    parser.add_argument("workload", choices=WORKLOADS, help="; ".join(f"{name}: {workload.title}" for name, workload in WORKLOADS.items()))
    parser.add_argument("--pairs", type=int, default=5, help="how often those that are compared run in turn")
    parser.add_argument("--steps", type=int, default=12, help=f"optimizer steps of a run, the first {WARM_UP} of which are not counted")
    parser.add_argument("--only", nargs="+", default=[], choices=everybody, metavar="NAME", help=f"contestants, of {', '.join(everybody)}")
    words = parser.parse_args()
    workload = WORKLOADS[words.workload]
    here = {name: one for name, one in everybody.items() if name in OURS or name in LOOPS or (ROOT / ".peers" / one[0]).exists()}
    chosen = {name: everybody[name] for name in words.only} or here
    with tempfile.TemporaryDirectory() as folder:
        documents = Path(folder) / "documents.jsonl"
        write_documents(workload, documents)
        needed = flops_per_token(workload, documents)
        print(f"{words.workload}: {workload.title}; torch {torch.__version__}, {torch.get_num_threads()} threads, {needed / 1e6:.0f} MFLOP a token\n")
        print(f"{'each once':22} {'tokens/s':>8} {'peak GB':>8} {'first step s':>12}")
        once = {}
        for name, contestant in chosen.items():
            if "compile" in contestant:
                run(contestant, words.workload, documents, WARM_UP + 1)  # fills the compiler's cache
            once[name] = run(contestant, words.workload, documents, words.steps)
            print(f"{name:22} {once[name].tokens_per_second:8.0f} {once[name].peak_gb:8.2f} {once[name].first_step_seconds:12.1f}", flush=True)
        rivals = {name: one for name, one in once.items() if name in PEERS}
        loops = {name: one for name, one in once.items() if name in LOOPS}
        in_turn = ["tunelib", *(name for name in once if name == "tunelib, 2 processes")]
        in_turn += [max(group, key=lambda name: group[name].tokens_per_second) for group in (rivals, loops) if group]
        if "tunelib" not in once or len(in_turn) == 1 or not words.pairs:
            return
        runs: dict[str, list[Run]] = {name: [] for name in in_turn}
        peaks = []
        for _ in range(words.pairs):
            peaks.append(measure_gemm())
            for name in in_turn:
                runs[name].append(run(chosen[name], words.workload, documents, words.steps))
        print(f"\n{'in turn, ' + str(words.pairs) + ' times':22} {'tokens/s':>18} {'tunelib is':>20} {'peak GB':>8} {'first step s':>18}")
        for name, seen in runs.items():
            rates = [one.tokens_per_second for one in seen]
            ratios = [ours.tokens_per_second / rate for ours, rate in zip(runs["tunelib"], rates, strict=True)]
            firsts = spread([one.first_step_seconds for one in seen], ".1f")
            print(f"{name:22} {spread(rates, '.0f'):>18} {spread(ratios, '.2f'):>18} × {max(one.peak_gb for one in seen):8.2f} {firsts:>18}")
        shares = [one.tokens_per_second * needed / peak for one, peak in zip(runs["tunelib"], peaks, strict=True)]
        print(
            f"\nproducts of matrices: {spread([peak / 1e9 for peak in peaks], '.0f')} GFLOP/s; tunelib reaches {spread(shares, '.0%')} of the limit"
        )
        if rivals:
            frugal = min(rivals, key=lambda name: rivals[name].peak_gb)
            ratio = max(one.peak_gb for one in runs["tunelib"]) / rivals[frugal].peak_gb
            print(f"peak memory: {ratio:.2f} × that of {frugal}, the lowest of the peers")


if __name__ == "__main__":
    main()
