"""Documents are made by several processes at once; their results come back in order.

A worker runs `main`: it reads pickles from its input (a `Reading`, then tasks) and answers each on its output. It is started as a
program and not forked, because the process that asks may have threads and a GPU, and it does not import torch. It ends when its
input does.
"""

import contextlib
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

from tunelib.data.encode import Encoder, Reading, TextPart
from tunelib.data.sources import parse_row
from tunelib.errors import DataError

TASKS_PER_WORKER = 3
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
    """The answer to `Rows`: marked tokens end to end, and the length and remarks of each document."""

    task: Rows
    marked: np.ndarray
    lengths: np.ndarray
    remarks: np.ndarray


@dataclass(frozen=True)
class PartTokens:
    """The answer to `Part`."""

    task: Part
    tokens: TextPart


def work(encoder: Encoder, task: Rows | Part) -> Documents | PartTokens:
    """Do a task; raises DataError."""
    if isinstance(task, Part):
        return PartTokens(task, encoder.encode_part(task.before, task.text, task.after, task.line, task.where))
    documents = [encoder.encode(parse_row(content, where), where) for content, where in zip(task.contents, task.wheres, strict=True)]
    return Documents(
        task,
        np.concatenate([document.marked for document in documents]),
        np.array([len(document.marked) for document in documents]),
        np.array([document.remarks for document in documents]),
    )


def work_on_all(reading: Reading, tasks: Iterable[Rows | Part], num_workers: int) -> Generator[Documents | PartTokens]:
    """The answers to all tasks, in their order; with one worker, by this process. To be closed, which ends the processes.

    Raises:
        DataError: of the first task that has one, or a process was killed.
    """
    if num_workers <= 1:
        encoder = Encoder(reading)
        yield from (work(encoder, task) for task in tasks)
        return
    idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()

    def ask(task: Rows | Part) -> Documents | PartTokens:
        worker = idle.get()
        try:
            return worker.ask(task)
        finally:
            idle.put(worker)

    with contextlib.ExitStack() as closing:
        for _ in range(num_workers):
            idle.put(closing.enter_context(contextlib.closing(Worker(reading))))
        threads = closing.enter_context(ThreadPoolExecutor(num_workers))
        waiting: deque[Future[Documents | PartTokens]] = deque()
        try:
            for task in tasks:
                waiting.append(threads.submit(ask, task))
                if len(waiting) >= num_workers * TASKS_PER_WORKER:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


class Worker:
    """One process that makes documents."""

    def __init__(self, reading: Reading):
        package_parent = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, [package_parent, os.environ.get("PYTHONPATH")]))
        # The processes are the parallelism: the tokenizer's own threads would get in each other's way.
        environment = os.environ | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
        try:
            self._process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        except OSError as error:
            raise DataError(f"no process that tokenises data can be started: {error.strerror}") from None
        self._send(reading)

    def ask(self, task: Rows | Part) -> Documents | PartTokens:
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

    def _send(self, thing: Any) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended; why is seen where its answer is read
            pickle.dump(thing, self._process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
            self._process.stdin.flush()

    def _death(self) -> Exception:
        code = self._process.wait()
        if code >= 0:
            return RuntimeError(f"a process that tokenises data ended with code {code}: its error stands above")
        name = signal.Signals(-code).name
        return DataError(f"a process that tokenises data was killed ({name}): where the machine ran out of memory, free some and start again")


def main() -> None:
    """Answer tasks until the input ends, which it does when the process that asks is gone, however that ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of the terminal; the one that asks decides
    source, answers = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # what a library prints must not stand among the answers
    reading = _receive(source)
    if reading is None:
        return
    try:
        encoder = Encoder(reading)
    except DataError as error:
        _answer(answers, error)
        return
    while (task := _receive(source)) is not None:
        answer: Documents | PartTokens | DataError
        try:
            answer = work(encoder, task)
        except DataError as error:
            answer = error
        _answer(answers, answer)


def _receive(source: BinaryIO) -> Any:
    """What was sent; None where nothing whole comes any more."""
    try:
        return pickle.load(source)
    except (EOFError, pickle.UnpicklingError):
        return None


def _answer(answers: BinaryIO, answer: Documents | PartTokens | DataError) -> None:
    try:
        pickle.dump(answer, answers, protocol=pickle.HIGHEST_PROTOCOL)
        answers.flush()
    except BrokenPipeError:
        os._exit(0)  # the interpreter's own end would try to write the rest, and complain
