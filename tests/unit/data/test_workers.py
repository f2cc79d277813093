"""Worker processes answer in order, say what went wrong, need nothing of the folder they start in, and leave no orphan."""

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from unit.samples import open_tokenizer

import tunelib.data.workers as workers
from tunelib.config.schema import Columns
from tunelib.data.encode import Reading, TextPart
from tunelib.data.tokenizer import Tokenizer
from tunelib.data.workers import Documents, Part, Rows, Worker, digest_tokens, work_on_all
from tunelib.errors import DataError

TIMEOUT_SECONDS = 30


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return open_tokenizer(tmp_path / "tokenizer", ["<s>", "</s>"], eos_token="</s>")


def reading(tokenizer: Tokenizer, format: str = "tokens") -> Reading:
    return Reading(tokenizer, None, format, Columns(), "assistant", False, 1000)


def new_worker(tokenizer: Tokenizer, format: str = "tokens") -> Worker:
    return Worker(pickle.dumps(reading(tokenizer, format)))


def rows_of(first: int, count: int = 3) -> Rows:
    numbers = range(first, first + count)
    contents = [b'{"input_ids": [%d, %d]}' % (number, number + 1) for number in numbers]
    return Rows(list(contents), [0] * count, list(numbers), [f"data.jsonl:{number}" for number in numbers])


@pytest.mark.parametrize("num_workers", [1, 2, 5])
def test_answers_come_in_the_order_of_the_tasks(tokenizer: Tokenizer, num_workers: int) -> None:
    tasks = [rows_of(first, 1 + first % 4) for first in range(0, 200, 5)]
    answered = list(work_on_all(reading(tokenizer), iter(tasks), num_workers))
    assert all(task is asked for (task, _), asked in zip(answered, tasks, strict=True))
    for task, answer in answered:
        assert isinstance(task, Rows)
        assert isinstance(answer, Documents)
        documents = [np.array([number, number + 1]) for number in task.lines]
        assert np.array_equal(answer.marked, np.concatenate(documents))
        assert answer.digests.tolist() == [digest_tokens(document.astype(np.int32)) for document in documents]


def test_answer_carries_nothing_of_its_task(tokenizer: Tokenizer) -> None:
    ids = [7] * 100
    task = Rows([{"input_ids": ids, "other": "x" * 10**6}], [0], [1], ["data.parquet, row 1"])
    ((_, answer),) = work_on_all(reading(tokenizer), [task], 2)
    assert len(pickle.dumps(answer)) < 2000


def test_parts_and_rows_are_answered_alike_by_one_process_and_by_workers(tokenizer: Tokenizer) -> None:
    tasks = [Part("", "one\ntwo\n", "three", 0, 1, "a.txt:1", False), Part("one\ntwo\n", "three", "", 0, 3, "a.txt:3", True)]
    alone, together = (list(work_on_all(reading(tokenizer, "text"), tasks, number)) for number in (1, 2))
    for (_, one), (_, other) in zip(alone, together, strict=True):
        assert isinstance(one, TextPart)
        assert isinstance(other, TextPart)
        assert np.array_equal(one.ids, other.ids)
        assert np.array_equal(one.lines, other.lines)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_ids_of_a_texts_begin_and_end_are_checked_against_the_vocabulary(tmp_path: Path, num_workers: int) -> None:
    letters = open_tokenizer(tmp_path / "letters", [])
    largest = letters.vocab_size  # of the end token, which is added after the letters and is in no text
    ending = open_tokenizer(tmp_path / "ending", [], eos_token="</s>").with_tokens(["</s>"])
    assert ending.document_end_ids == [largest]
    for vocab_size in (largest + 1, largest):
        how = replace(reading(ending, "text"), vocab_size=vocab_size)
        tasks = [Part("", "one", "two", 0, 1, "a.txt:1", False), Part("one", "two", "", 0, 1, "a.txt:1", True)]
        if vocab_size > largest:
            list(work_on_all(how, tasks, num_workers))
            continue
        with pytest.raises(DataError, match=rf"^a\.txt:1: .*the id {largest}, but the model's vocabulary ends at {largest - 1}"):
            list(work_on_all(how, tasks, num_workers))


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


SLOW_START = "import sys, time; time.sleep(1); " + workers.PROGRAM


def test_workers_start_all_at_once_and_are_told_what_to_do_all_at_once(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "PROGRAM", SLOW_START)
    large = replace(reading(tokenizer), train_on="x" * 10**6)  # more than a pipe holds: it is taken when the worker has started
    begun = time.monotonic()
    list(work_on_all(large, [rows_of(first) for first in range(8)], 4))
    assert time.monotonic() - begun < 4  # a second each, one after another, and the imports


@pytest.mark.parametrize("writes", ["os.write(1, b'a library speaks')", "os.system('echo a program speaks')", "print('Python speaks', flush=True)"])
def test_what_a_library_writes_to_the_output_is_no_part_of_the_answers(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], writes: str
) -> None:
    speaking = f"encode = E.encode; E.encode = lambda *words: ({writes}, encode(*words))[1]"
    program = f"import os, sys; sys.path.remove(''); from tunelib.data.workers import main, Encoder as E; {speaking}; main()"
    monkeypatch.setattr(workers, "PROGRAM", program)
    ((_, answer),) = work_on_all(reading(tokenizer), [rows_of(5)], 2)
    assert isinstance(answer, Documents)
    assert answer.marked.tolist() == [5, 6, 6, 7, 7, 8]
    assert "speaks" in capfd.readouterr().err


def test_worker_that_answers_nonsense_and_lives_on_is_ended(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    nonsense = "import sys, time; sys.stdout.write('} nonsense'); sys.stdout.flush(); time.sleep(1000)"
    monkeypatch.setattr(workers, "PROGRAM", nonsense)
    monkeypatch.setattr(workers, "ENDING_SECONDS", 0.1)
    worker = new_worker(tokenizer)
    try:
        with pytest.raises(RuntimeError, match="wrote something that is no answer"):
            worker.ask(rows_of(0))
    finally:
        worker.close()


def test_worker_killed_while_it_waits_is_a_named_error(tokenizer: Tokenizer) -> None:
    worker = new_worker(tokenizer)
    try:
        worker.ask(rows_of(0))
        worker._process.kill()
        with pytest.raises(DataError, match=r"a process that tokenises data was killed \(SIGKILL\).*memory"):
            worker.ask(rows_of(0))
    finally:
        worker.close()


def test_worker_killed_at_work_is_a_named_error(tokenizer: Tokenizer) -> None:
    worker = new_worker(tokenizer, "text")
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
    worker = new_worker(tokenizer)
    try:
        with pytest.raises(DataError, match="SIGKILL"):
            worker.ask(rows_of(0))
    finally:
        worker.close()


def test_mistake_of_ours_in_a_worker_is_no_error_of_the_users(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "PROGRAM", "raise SystemExit(3)")
    worker = new_worker(tokenizer)
    try:
        with pytest.raises(RuntimeError, match="ended with code 3"):
            worker.ask(rows_of(0))
    finally:
        worker.close()


def test_worker_does_not_import_from_the_folder_it_starts_in(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("queue", "tokenizers", "numpy"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')")
    monkeypatch.chdir(tmp_path)
    worker = new_worker(tokenizer)
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
