"""Runs that start at once on a cold cache, some killed half-way, come to one index, equal to that of a run that was alone."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT, TOKENIZER, write_chats

TIMEOUT_SECONDS = 60
# Builds, or waits for, the index of argv[1] in the cache argv[2] and prints what it got. Each build is noted in argv[3] and, so that
# it can be met half-way, takes argv[4] seconds longer for each group of rows.
PROGRAM = """
import json, os, sys, time
from pathlib import Path
import tunelib.data.build as build
import tunelib.data.index as index
from tunelib.config.schema import Dataset
from tunelib.data.prepare import find_words

data, cache, log, delay, tokenizer = sys.argv[1:]
add, build_source = build.add_documents, index.build_source

def add_slowly(*words):
    time.sleep(float(delay))
    add(*words)

def note(*words):
    with open(log, "a") as file:
        file.write(f"{os.getpid()}\\n")
    build_source(*words)

build.add_documents, index.build_source = add_slowly, note
section = Dataset(path=data, cache_folder=cache)
words = find_words(section, Path(tokenizer), resize_embeddings=False)
said = []
found = index.build_index(words.sources, section, 128, words.tokenizer, words.template, 4096, said.append, num_workers=2)
tokens = [found.marked(document).tolist() for document in range(0, len(found), 97)]
print(json.dumps({"fingerprint": found.fingerprint, "documents": len(found), "tokens": tokens, "lines": found.lines[::97].tolist(), "said": said}))
"""
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_chats(tmp_path / "chats.jsonl", 6000)


@pytest.fixture
def start(tmp_path: Path, data: Path) -> Iterator[Start]:
    """Start a process that wants the index; all are killed when the test ends."""
    processes: list[subprocess.Popen[str]] = []

    def start(cache: Path, delay: float = 0.0) -> "subprocess.Popen[str]":
        words = [str(data), str(cache), str(tmp_path / "builds"), str(delay), str(TOKENIZER)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-W", "error", "-c", PROGRAM, *words]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate(timeout=TIMEOUT_SECONDS)


def result_of(process: "subprocess.Popen[str]") -> dict:
    out, errors = process.communicate(timeout=TIMEOUT_SECONDS)
    assert (process.returncode, errors) == (0, ""), errors
    return json.loads(out)


def builders(folder: Path) -> list[int]:
    """Processes that began to build, in order."""
    return [int(line) for line in (folder / "builds").read_text().split()] if (folder / "builds").exists() else []


def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def children_of(process: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process)], capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    return [int(number) for number in found.stdout.split()]


def is_running(process: int) -> bool:
    """Whether a process is there and has not ended; one that has ended may still be listed until init has asked for it."""
    found = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    return found.stdout.strip() != "" and not found.stdout.startswith("Z")


def index_in(cache: Path) -> dict[str, bytes]:
    """The files of the only index of a cache, beside which there is nothing but locks."""
    (folder,) = [entry for entry in (cache / "index").iterdir() if entry.suffix != ".lock"]
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_two_runs_at_once_of_which_the_builder_is_killed_half_way(tmp_path: Path, start: Start) -> None:
    cache = tmp_path / "cache"
    both = [start(cache, delay=0.05), start(cache, delay=0.05)]
    wait_until(lambda: list((cache / "index").glob(".*/tokens.bin")) if (cache / "index").exists() else [])
    wait_until(lambda: len(children_of(builders(tmp_path)[0])) == 2)
    time.sleep(0.3)  # the other has reached the lock, or does so in the dead run's traces
    (number,) = builders(tmp_path)
    killed, survivor = sorted(both, key=lambda process: process.pid != number)
    workers = children_of(number)
    assert killed.poll() is None
    killed.send_signal(signal.SIGKILL)
    killed.wait(TIMEOUT_SECONDS)
    assert [entry for entry in (cache / "index").iterdir() if entry.is_dir() and not entry.name.startswith(".")] == []
    wait_until(lambda: not any(map(is_running, workers)))  # their input has ended
    found = result_of(survivor)
    assert builders(tmp_path) == [number, survivor.pid]

    alone = result_of(start(tmp_path / "alone"))
    assert {**found, "said": []} == {**alone, "said": []}
    assert index_in(cache) == index_in(tmp_path / "alone")
    (tmp_path / "builds").unlink()
    assert {**result_of(start(cache)), "said": []} == {**alone, "said": []}
    assert builders(tmp_path) == []  # the next run finds it


def test_waiting_run_goes_on_when_a_waiting_one_is_killed(tmp_path: Path, start: Start) -> None:
    cache = tmp_path / "cache"
    first = start(cache, delay=0.05)
    wait_until(lambda: builders(tmp_path))
    waiting, killed = start(cache), start(cache)
    time.sleep(0.4)
    killed.send_signal(signal.SIGKILL)
    assert {**result_of(waiting), "said": []} == {**result_of(first), "said": []}
    assert builders(tmp_path) == [first.pid]


def test_four_runs_at_once_build_the_index_once(tmp_path: Path, start: Start) -> None:
    cache = tmp_path / "cache"
    found = [result_of(process) for process in [start(cache, delay=0.02) for _ in range(4)]]
    assert len(builders(tmp_path)) == 1
    assert len({json.dumps({**of_process, "said": []}) for of_process in found}) == 1
    assert index_in(cache)
    said = sorted(words for of_process in found for words in of_process["said"])
    assert sum("with 2 processes" in words for words in said) == 1
    assert all("with 2 processes" in words or "waiting for another process that tokenises it" in words for words in said)


@pytest.mark.slow
def test_killed_build_leaves_no_index_and_the_next_run_clears_it_away(tmp_path: Path, start: Start) -> None:
    cache = tmp_path / "cache"
    killed = start(cache, delay=0.05)
    wait_until(lambda: list((cache / "index").glob(".*/tokens.bin")) if (cache / "index").exists() else [])
    workers = children_of(killed.pid)
    killed.send_signal(signal.SIGKILL)
    _, errors = killed.communicate(timeout=TIMEOUT_SECONDS)  # ends when the workers, who share the pipe, have ended
    assert errors == ""  # they say nothing of it
    assert not any(map(is_running, workers))
    found = result_of(start(cache))
    assert found["documents"] == 6000
    assert set(index_in(cache)) == {"tokens.bin", "documents.npy", "facts.json", "manifest.json"}


@pytest.mark.slow
def test_memory_does_not_grow_with_a_text(tmp_path: Path) -> None:
    program = """
import resource, sys
from pathlib import Path
from tunelib.config.schema import Dataset
from tunelib.data.index import build_index, find_sources
from tunelib.data.tokenizer import Tokenizer
import tunelib.data.readers as readers
tokenizer = Tokenizer(Path(sys.argv[3]))
def build(path):
    section = Dataset(path=path, cache_folder=sys.argv[2])
    build_index(find_sources([section], Path(sys.argv[2])), section, 2048, tokenizer, None, 10**6, num_workers=2)
    return max(resource.getrusage(who).ru_maxrss / 2**10 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
small = build(sys.argv[1] + "/small.txt")
print(build(sys.argv[1] + "/large.txt") - small)
"""
    for name, copies in (("small", 18), ("large", 180)):
        content = write_chats(tmp_path / "chats.jsonl", 2500).read_text()
        with open(tmp_path / f"{name}.txt", "w") as file:
            for number in range(copies):
                file.write(f"{number}\n{content}")
    size_mib = (tmp_path / "large.txt").stat().st_size / 2**20
    assert size_mib > 60
    words = [str(tmp_path), str(tmp_path / "cache"), str(TOKENIZER)]
    command = [sys.executable, "-c", program, *words]
    process = subprocess.run(command, capture_output=True, text=True, timeout=240, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert process.returncode == 0, process.stderr
    print(f"{size_mib:.0f} MiB of text, {float(process.stdout):.0f} MiB more memory than a tenth of it took")
    assert float(process.stdout) < 40
