"""Documents are made by several processes at once; their results come back in order.

A worker runs `main`: it reads pickles from its input (a `Reading`, then tasks) and answers each on its output. It is started as a
program and not forked, because the process that asks may have threads and a GPU, and it does not import torch. It ends when its
input does. All workers start at once: none is waited for before its first answer is.
"""

import contextlib
import hashlib
import os
import pickle
import queue
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tunelib.data.encode import Encoder, Reading, TextPart, read_ids
from tunelib.data.sources import parse_row
from tunelib.errors import DataError

TASKS_PER_WORKER = 3
ENDING_SECONDS = 5
"""A worker whose answer cannot be read has ended, or does so within this time; one that has not wrote something else."""
# Not from the current folder, which Python searches first with -c: a file or folder of the user's may have a library's name.
PROGRAM = "import sys; sys.path = [folder for folder in sys.path if folder]; from tunelib.data.workers import main; main()"


@dataclass(frozen=True)
class Rows:
    """A task: rows of which each becomes a document; ``wheres`` names them for messages."""

    contents: list[bytes | dict[str, Any]]
    files: list[int]
    lines: list[int]
    wheres: list[str]


@dataclass(frozen=True)
class Part:
    """A task: one part of a plain text, between some of what stands before and after it."""

    before: str
    text: str
    after: str
    file: int
    line: int
    where: str
    is_last: bool


@dataclass(frozen=True)
class Documents:
    """The answer to `Rows`: marked tokens end to end, and the length, remarks and `digest_tokens` of each document."""

    marked: np.ndarray
    lengths: np.ndarray
    remarks: np.ndarray
    digests: np.ndarray


Task = Rows | Part
Answer = Documents | TextPart


def work(encoder: Encoder, task: Task) -> Answer:
    """Do a task: `Documents` of `Rows`, a `TextPart` of a `Part`; raises DataError."""
    if isinstance(task, Part):
        tokens = encoder.encode_part(task.before, task.text, task.after, task.line, task.where)
        if not task.before:  # a text's begin and end, which no part has, are the document of an empty text: that checks their ids
            encoder.encode({encoder.reading.columns.text: ""}, task.where)
        return tokens
    documents = [encoder.encode(parse_row(content, where), where) for content, where in zip(task.contents, task.wheres, strict=True)]
    return Documents(
        np.concatenate([document.marked for document in documents]),
        np.array([len(document.marked) for document in documents]),
        np.array([document.remarks for document in documents]),
        np.array([digest_tokens(document.marked) for document in documents]),
    )


def digest_tokens(marked: np.ndarray) -> int:
    """A number of 64 bits that follows from the ids of marked tokens, whatever is trained of them."""
    return int.from_bytes(hashlib.blake2b(read_ids(marked).tobytes(), digest_size=8).digest(), "little", signed=True)


def work_on_all(reading: Reading, tasks: Iterable[Task], num_workers: int) -> Generator[tuple[Task, Answer]]:
    """All tasks in their order, each with its answer; with one worker, by this process. To be closed, which ends the processes.

    Raises:
        DataError: of the first task that has one, or a process was killed.
    """
    if num_workers <= 1:
        encoder = Encoder(reading)
        yield from ((task, work(encoder, task)) for task in tasks)
        return
    idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()

    def ask(task: Task) -> Answer:
        worker = idle.get()
        try:
            return worker.ask(task)
        finally:
            idle.put(worker)

    with contextlib.ExitStack() as closing:
        pickled = pickle.dumps(reading, protocol=pickle.HIGHEST_PROTOCOL)
        for _ in range(num_workers):
            idle.put(closing.enter_context(contextlib.closing(Worker(pickled))))
        threads = closing.enter_context(ThreadPoolExecutor(num_workers))
        waiting: deque[tuple[Task, Future[Answer]]] = deque()
        try:
            for task in tasks:
                waiting.append((task, threads.submit(ask, task)))
                if len(waiting) >= num_workers * TASKS_PER_WORKER:
                    yield _wait_for(*waiting.popleft())
            while waiting:
                yield _wait_for(*waiting.popleft())
        finally:
            for _, future in waiting:
                future.cancel()


def _wait_for(task: Task, future: Future[Answer]) -> tuple[Task, Answer]:
    return task, future.result()


class Worker:
    """One process that makes documents.

    Args:
        reading: a pickled `Reading`; sent with the first task, because the process takes it only when it has imported everything.
    """

    def __init__(self, reading: bytes):
        package_parent = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, [package_parent, os.environ.get("PYTHONPATH")]))
        # The processes are the parallelism: the tokenizer's own threads would get in each other's way.
        environment = os.environ | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
        try:
            self._process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        except OSError as error:
            raise DataError(f"no process that tokenises data can be started: {error.strerror}") from None
        self._unsent = reading

    def ask(self, task: Task) -> Answer:
        """The answer to a task; raises DataError as the worker did, or because it was killed."""
        self._send(task)
        assert self._process.stdout is not None
        try:
            answer = pickle.load(self._process.stdout)
        except (EOFError, pickle.UnpicklingError):  # it ended before its answer, or within
            raise self._death() from None
        if isinstance(answer, DataError):
            raise answer
        return answer

    def close(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # it had ended before it read what was sent
                pipe.close()
        self._process.wait()

    def _send(self, task: Task) -> None:
        assert self._process.stdin is not None
        unsent, self._unsent = self._unsent, b""
        with contextlib.suppress(BrokenPipeError):  # it has ended; why is seen where its answer is read
            self._process.stdin.write(unsent)
            pickle.dump(task, self._process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
            self._process.stdin.flush()

    def _death(self) -> Exception:
        try:
            code = self._process.wait(ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return RuntimeError("a process that tokenises data wrote something that is no answer, and was ended")
        if code >= 0:
            return RuntimeError(f"a process that tokenises data ended with code {code}: its error stands above")
        name = signal.Signals(-code).name
        return DataError(f"a process that tokenises data was killed ({name}): where the machine ran out of memory, free some and start again")


def main() -> None:
    """Answer tasks until the input ends, which it does when the process that asks is gone, however that ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of the terminal; the one that asks decides
    source, answers = sys.stdin.buffer, _take_output()
    reading = _receive(source)
    if reading is None:
        return
    try:
        encoder = Encoder(reading)
    except DataError as error:
        _answer(answers, error)
        return
    while (task := _receive(source)) is not None:
        answer: Answer | DataError
        try:
            answer = work(encoder, task)
        except DataError as error:
            answer = error
        _answer(answers, answer)


def _take_output() -> BinaryIO:
    """The process's output, for the answers alone: what a library prints, in Python or below it, goes where errors do."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return answers


def _receive(source: BinaryIO) -> Any:
    """What was sent; None where nothing whole comes any more."""
    try:
        return pickle.load(source)
    except (EOFError, pickle.UnpicklingError):
        return None


def _answer(answers: BinaryIO, answer: Answer | DataError) -> None:
    try:
        pickle.dump(answer, answers, protocol=pickle.HIGHEST_PROTOCOL)
        answers.flush()
    except BrokenPipeError:
        os._exit(0)  # the interpreter's own end would try to write the rest, and complain
