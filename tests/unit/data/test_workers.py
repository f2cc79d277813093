"""Worker processes answer in order, say what went wrong, need nothing of the folder they start in, and leave no orphan."""

import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from unit.samples import open_tokenizer

import tunelib.data.workers as workers
from tunelib.config.schema import Columns
from tunelib.data.encode import Reading
from tunelib.data.tokenizer import Tokenizer
from tunelib.data.workers import Documents, Part, PartTokens, Rows, Worker, work_on_all
from tunelib.errors import DataError

TIMEOUT_SECONDS = 30


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return open_tokenizer(tmp_path / "tokenizer", ["<s>", "</s>"], eos_token="</s>")


def reading(tokenizer: Tokenizer, format: str = "tokens") -> Reading:
    return Reading(tokenizer, None, format, Columns(), "assistant", False, 1000)


def rows_of(first: int, count: int = 3) -> Rows:
    numbers = range(first, first + count)
    contents = [b'{"input_ids": [%d, %d]}' % (number, number + 1) for number in numbers]
    return Rows(list(contents), [0] * count, list(numbers), [f"data.jsonl:{number}" for number in numbers])


@pytest.mark.parametrize("num_workers", [1, 2, 5])
def test_answers_come_in_the_order_of_the_tasks(tokenizer: Tokenizer, num_workers: int) -> None:
    tasks = [rows_of(first, 1 + first % 4) for first in range(0, 200, 5)]
    answers = list(work_on_all(reading(tokenizer), iter(tasks), num_workers))
    assert all(isinstance(answer, Documents) for answer in answers)
    assert [answer.task.lines for answer in answers] == [task.lines for task in tasks]
    expected = [np.array([[number, number + 1] for number in task.lines]).flatten() for task in tasks]
    assert all(np.array_equal(answer.marked, tokens) for answer, tokens in zip(answers, expected, strict=True))


def test_parts_and_rows_are_answered_alike_by_one_process_and_by_workers(tokenizer: Tokenizer) -> None:
    tasks = [Part("", "one\ntwo\n", "three", 0, 1, "a.txt:1", False), Part("one\ntwo\n", "three", "", 0, 3, "a.txt:3", True)]
    alone, together = (list(work_on_all(reading(tokenizer, "text"), tasks, number)) for number in (1, 2))
    for one, other in zip(alone, together, strict=True):
        assert isinstance(one, PartTokens)
        assert isinstance(other, PartTokens)
        assert np.array_equal(one.tokens.ids, other.tokens.ids)
        assert np.array_equal(one.tokens.lines, other.tokens.lines)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_error_is_that_of_the_first_bad_row_in_the_order_of_the_data(tokenizer: Tokenizer, num_workers: int) -> None:
    tasks = [rows_of(first) for first in range(1, 40, 3)]
    for bad in (7, 8):
        tasks[bad].contents[1] = b'{"input_ids": "no"}'
    with pytest.raises(DataError, match=r"^data\.jsonl:23: "):
        list(work_on_all(reading(tokenizer), tasks, num_workers))


def test_few_tasks_are_read_ahead(tokenizer: Tokenizer) -> None:
    taken = 0

    def tasks():  # type: ignore[no-untyped-def]
        nonlocal taken
        for first in range(500):
            taken += 1
            yield rows_of(first)

    answers = work_on_all(reading(tokenizer), tasks(), 2)
    next(answers)
    assert taken <= 2 * workers.TASKS_PER_WORKER
    answers.close()


def children() -> set[int]:
    """Processes that this one started and that have not been waited for."""
    found = subprocess.run(["ps", "-o", "pid=,comm=", "--ppid", str(os.getpid())], capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    return {int(line.split()[0]) for line in found.stdout.splitlines() if line.split()[1] != "ps"}


@pytest.mark.parametrize("how", ["closed early", "a bad row", "the end"])
def test_no_process_is_left_however_the_work_ends(tokenizer: Tokenizer, how: str) -> None:
    before = children()
    tasks = [rows_of(first) for first in range(100)]
    if how == "a bad row":
        tasks[2].contents[0] = b"no JSON"
    answers = work_on_all(reading(tokenizer), tasks, 2)
    next(answers)
    assert len(children() - before) == 2
    if how == "closed early":
        answers.close()
    elif how == "a bad row":
        with pytest.raises(DataError):
            list(answers)
    else:
        list(answers)
    assert children() == before


def test_worker_killed_while_it_waits_is_a_named_error(tokenizer: Tokenizer) -> None:
    worker = Worker(reading(tokenizer))
    try:
        worker.ask(rows_of(0))
        worker._process.kill()
        with pytest.raises(DataError, match=r"a process that tokenises data was killed \(SIGKILL\).*memory"):
            worker.ask(rows_of(0))
    finally:
        worker.close()


def test_worker_killed_at_work_is_a_named_error(tokenizer: Tokenizer) -> None:
    worker = Worker(reading(tokenizer, "text"))
    long = Part("", "many words " * 2_000_000, "", 0, 1, "a.txt:1", True)
    killer = threading.Timer(1.5, lambda: os.kill(worker._process.pid, signal.SIGKILL))
    killer.start()
    try:
        with pytest.raises(DataError, match="SIGKILL"):
            list(map(worker.ask, [long] * 100))
    finally:
        killer.join()
        worker.close()


def test_worker_killed_within_its_answer_is_a_named_error(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    half = "import os, pickle, sys; sys.stdout.buffer.write(pickle.dumps([b'x' * 4000])[:2000]); sys.stdout.flush(); os.kill(os.getpid(), 9)"
    monkeypatch.setattr(workers, "PROGRAM", half)
    worker = Worker(reading(tokenizer))
    try:
        with pytest.raises(DataError, match="SIGKILL"):
            worker.ask(rows_of(0))
    finally:
        worker.close()


def test_mistake_of_ours_in_a_worker_is_no_error_of_the_users(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "PROGRAM", "raise SystemExit(3)")
    worker = Worker(reading(tokenizer))
    try:
        with pytest.raises(RuntimeError, match="ended with code 3"):
            worker.ask(rows_of(0))
    finally:
        worker.close()


def test_worker_does_not_import_from_the_folder_it_starts_in(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("queue", "tokenizers", "numpy"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')")
    monkeypatch.chdir(tmp_path)
    worker = Worker(reading(tokenizer))
    try:
        assert isinstance(worker.ask(rows_of(0)), Documents)
    finally:
        worker.close()


def test_worker_ends_in_silence_when_its_input_ends_anywhere(tokenizer: Tokenizer) -> None:
    sent = pickle.dumps(reading(tokenizer)) + pickle.dumps(rows_of(0))
    for cut in (0, 10, len(sent) - 5, len(sent)):
        process = subprocess.run(
            [sys.executable, "-c", workers.PROGRAM],
            input=sent[:cut],
            capture_output=True,
            timeout=TIMEOUT_SECONDS,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        assert (process.returncode, process.stderr) == (0, b""), process.stderr.decode()


def test_worker_ends_in_silence_when_nobody_reads_its_answer(tokenizer: Tokenizer) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", workers.PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert process.stdin
    assert process.stdout
    assert process.stderr
    process.stdout.close()
    process.stdin.write(pickle.dumps(reading(tokenizer)) + pickle.dumps(rows_of(0, 5000)))
    process.stdin.flush()
    assert process.wait(TIMEOUT_SECONDS) == 0
    assert process.stderr.read() == b""
    process.stdin.close()
    process.stderr.close()


def test_worker_does_not_import_torch() -> None:
    code = "import sys, tunelib.data.workers; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=TIMEOUT_SECONDS).returncode == 0
