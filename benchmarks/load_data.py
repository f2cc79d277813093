"""How fast documents are tokenised and read, and in how much memory: one table.

    python benchmarks/load_data.py [--megabytes 50] [--tokenizer FOLDER] [--kind text|chat|file]

Makes a data set of English-like words (drawn by Zipf's law from a fixed seed), tokenises it in a fresh process with one worker
and with all cores, then reads steps of 8 rows of 2,048 tokens from the index, and tells how far documents fill them. Memory is the peak of
the process that makes or reads the index plus, while tokenising, that of its largest worker.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tunelib.config.schema import Dataset
from tunelib.data.loader import Share, TrainData
from tunelib.data.prepare import HeldOut, build_documents, find_words

DEBUG_TOKENIZER = Path(__file__).parents[1] / "train_configs/assets/debug/tokenizer"
SEQ_LEN, ROWS, STEPS = 2048, 8, 200
SYLLABLES = ["ka", "lo", "mi", "ter", "an", "est", "vor", "in", "gal", "ne", "sha", "un", "pre", "ri", "do", "con", "al", "ver", "tem", "ba"]


def write_data(path: Path, num_bytes: int, kind: str) -> None:
    """Documents of 20 to 400 words; ``file`` is all of them as one plain text."""
    chance = random.Random(0)
    words = ["".join(chance.choices(SYLLABLES, k=chance.randint(1, 4))) for _ in range(20_000)]
    weights = [1 / rank for rank in range(1, len(words) + 1)]
    with open(path, "w", encoding="utf-8") as file:
        while file.tell() < num_bytes:
            text = " ".join(chance.choices(words, weights, k=chance.randint(20, 400)))
            if kind == "file":
                file.write(text + ".\n\n")
            elif kind == "text":
                file.write(json.dumps({"text": text}) + "\n")
            else:
                messages = [{"role": "user", "content": text[:200]}, {"role": "assistant", "content": text[200:]}]
                file.write(json.dumps({"messages": messages}) + "\n")


def measure(data: str, cache: str, tokenizer: str, num_workers: int | None) -> dict[str, float]:
    """Open or make the index, with so many workers, or read from it (None); what it took."""
    section = Dataset(path=data, cache_folder=cache)
    begun = time.monotonic()
    words = find_words(section, Path(tokenizer), resize_embeddings=False)
    index = build_documents(words, section, SEQ_LEN, words.tokenizer.vocab_size, HeldOut(), num_workers=num_workers).train
    assert index is not None
    seconds, tokens = time.monotonic() - begun, float(index.lengths.sum())
    if num_workers is None:
        train_data = TrainData(index, SEQ_LEN, True, 0, ROWS, Share(0, 1, ROWS))
        train_data.step(1)  # plans the epoch
        begun = time.monotonic()
        tokens = float(sum(train_data.step(number).num_tokens for number in range(2, STEPS + 2)))
        seconds = time.monotonic() - begun
    peak = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 2**10
    return {"tokens": tokens, "seconds": seconds, "peak_mib": peak, "filled": tokens / (STEPS * ROWS * SEQ_LEN)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=50)
    parser.add_argument("--tokenizer", default=str(DEBUG_TOKENIZER))
    parser.add_argument("--kind", choices=("text", "chat", "file"), default="text")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)  # data, cache, workers: one measurement in a process of its own
    words = parser.parse_args()
    if words.measure:
        data, cache, workers = words.measure
        print(json.dumps(measure(data, cache, words.tokenizer, int(workers) or None)))
        return
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / ("data.txt" if words.kind == "file" else "data.jsonl")
        write_data(data, words.megabytes * 10**6, words.kind)
        print(f"{words.kind}: {data.stat().st_size / 1e6:.0f} MB, tokenizer {words.tokenizer}, {cores} cores; python {' '.join(sys.argv)}")
        print(f"{'':32} {'tokens/s':>12} {'seconds':>8} {'peak MiB':>9}")
        for label, cache, workers in (("indexing, one process", "one", 1), (f"indexing, {cores} workers", "all", cores), ("reading steps", "all", 0)):
            command = [sys.executable, __file__, "--tokenizer", words.tokenizer, "--measure", str(data), f"{folder}/{cache}", str(workers)]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            print(f"{label:32} {found['tokens'] / found['seconds']:12,.0f} {found['seconds']:8.1f} {found['peak_mib']:9,.0f}")
        print(f"rows are filled to {found['filled']:.2%}")


if __name__ == "__main__":
    main()
