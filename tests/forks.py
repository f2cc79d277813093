"""Runs of train.py, and of scripts, that cost half a second: children forked from a process that has imported everything already.

As a program it is that process: it takes cases on stdin, a JSON line each, and answers with the exit codes (``Forks`` below speaks to it).
"""

import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TIMEOUT = 60.0


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code, or minus the signal; and what it printed, what scripts print as errors apart."""

    code: int
    said: str
    errors: str


class Forks:
    """Forks runs of train.py in a process of its own.

    Args:
        library: preloaded; see crash/disk.py.
        warnings: what becomes of them.
    """

    def __init__(self, library: Path | None = None, warnings: str = "error"):
        self._outputs = tempfile.TemporaryDirectory(prefix="forks-")
        more = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"} | ({"LD_PRELOAD": str(library)} if library else {})
        program = [sys.executable, "-W", warnings, str(Path(__file__))]
        self._more = more
        self._process = subprocess.Popen(program, env=os.environ | more, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def start(
        self,
        words: Sequence[str],
        world_size: int = 1,
        fault: str = "",
        timeout: float = TIMEOUT,
        patience: float = 20.0,
        kill_after: float | None = None,
        environment: dict[str, str] | None = None,
        script: Path | None = None,
        folder: Path | None = None,
        **values: Any,
    ) -> None:
        """Run train.py in so many processes of one group, in this process's folder and with its environment; `result` waits for it.

        Args:
            script: run instead of train.py, without input.
            folder: to run in, in place of this process's own.
            fault: name of a function of faults.py, called in each process before train.py with its rank and ``values``.
            patience: seconds that the others have, once one has failed; then they are killed.
            kill_after: seconds after which all are killed.
            environment: in place of this process's own.
        """
        from conftest import free_port

        case = {"words": [str(word) for word in words], "world_size": world_size, "fault": fault, "values": values, "timeout": timeout}
        case |= {"patience": patience, "kill_after": kill_after, "port": free_port(), "output": self._outputs.name}
        case |= {"environment": (dict(os.environ) if environment is None else environment) | self._more, "cwd": str(folder or Path.cwd())}
        case |= {"script": str(script) if script else ""}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(case) + "\n")
        self._process.stdin.flush()

    def result(self) -> list[Ended]:
        """How each process of the case begun first ended; one that does not end in its time fails the test."""
        assert self._process.stdout is not None
        answer = json.loads(self._process.stdout.readline())
        ended = [Ended(code, *(Path(output + kind).read_text(errors="replace") for kind in ("", ".errors"))) for code, output in answer["ended"]]
        assert not answer["late"], "\n".join(f"rank {rank}: {each.said[-4000:]}" for rank, each in enumerate(ended))
        return ended

    def run(self, words: Sequence[str], world_size: int = 1, **rest: Any) -> list[Ended]:
        """`start`, and its `result`."""
        self.start(words, world_size, **rest)
        return self.result()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._outputs.cleanup()


def serve() -> None:
    """Fork a run for each line of stdin."""
    sys.path[:0] = [str(HERE.parent), str(HERE)]
    import torch

    import train  # noqa: F401  (the children have it)

    torch.set_num_threads(1)
    importlib.import_module("torch.distributed.checkpoint.staging")
    for number, line in enumerate(sys.stdin):
        case = json.loads(line)
        outputs = [f"{case['output']}/{os.getpid()}-{number}-{rank}.txt" for rank in range(case["world_size"])]
        processes = [fork(case, rank, outputs[rank]) for rank in range(case["world_size"])]
        codes, late = wait(processes, case["timeout"], case["patience"], case["kill_after"])
        print(json.dumps({"ended": list(zip(codes, outputs, strict=True)), "late": late}), flush=True)


def fork(case: dict[str, Any], rank: int, output: str) -> int:
    """A child that runs train.py or a script; its process id."""
    process = os.fork()
    if process:
        return process
    try:
        said, errors = (os.open(output + kind, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600) for kind in ("", ".errors"))
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0), os.dup2(said, 1), os.dup2(errors if case["script"] else said, 2)
        os.setpgid(0, 0)
        group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": case["world_size"], "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": case["port"]}
        os.environ.clear()
        os.environ |= case["environment"] | {name: str(value) for name, value in group.items()}
        os.chdir(case["cwd"])
        import train
        from tunelib.parallel.runtime import leave, run_main

        if case["fault"]:
            from crash import faults

            getattr(faults, case["fault"])(rank, **case["values"])
        leave(run_script(case["script"], case["words"]) if case["script"] else run_main(train.main, case["words"]))
    except BaseException:
        traceback.print_exc()
    os._exit(99)


def run_script(path: str, words: list[str]) -> int:
    """Run a script as a program; its exit code."""
    sys.argv = [path, *words]
    sys.path.insert(0, str(Path(path).parent))
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return int(bool(end.code)) if isinstance(end.code, str | None) else end.code
    return 0


def wait(processes: list[int], timeout: float, patience: float, kill_after: float | None) -> tuple[list[int], bool]:
    """The exit codes, and whether somebody did not end in time; the others of one that failed are killed after ``patience``."""
    codes: dict[int, int] = {}
    deadline, late = time.monotonic() + (timeout if kill_after is None else kill_after), False
    while len(codes) < len(processes):
        for process in [process for process in processes if process not in codes]:
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                codes[process] = os.waitstatus_to_exitcode(status)
                if codes[process]:
                    deadline = min(deadline, time.monotonic() + patience)
            elif time.monotonic() > deadline:
                late = late or (kill_after is None and not any(codes.values()))
                os.kill(process, signal.SIGKILL)
        time.sleep(0.005)
    return [codes[process] for process in processes], late


if __name__ == "__main__":
    serve()
