"""A process's place among the others: ranks, device, process group, and leaving cleanly on every path."""

import contextlib
import ctypes
import datetime
import logging
import math
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist

from tunelib.config.schema import Comm, Training
from tunelib.errors import EXIT_CODE_FILE, ConfigError, Stopped, TunelibError
from tunelib.files import check_replaceable, lock_folder, remove_debris
from tunelib.parallel.reduce import agreed

ONE_SIGNAL_SECONDS = 2.0
"""Within this time signals are one: where a scheduler signals all processes of a job, torchrun passes it on to its workers besides."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True)
class Runtime:
    """Who this process is.

    Attributes:
        device: where it computes.
        param_dtype: of parameters and optimizer state.
        compute_dtype: of the forward and backward pass.
        reduce_dtype: of gradients between processes.
        offloaded: whether shards of parameters, gradients and optimizer state lie in the main memory while a GPU computes.
        sharded: whether the model runs under FSDP2: on several processes, or where compute_dtype differs from param_dtype.
    """

    rank: int
    world_size: int
    device: torch.device
    param_dtype: torch.dtype
    compute_dtype: torch.dtype
    reduce_dtype: torch.dtype
    offloaded: bool = False

    @property
    def sharded(self) -> bool:
        return self.world_size > 1 or self.compute_dtype != self.param_dtype or self.offloaded

    @property
    def storage(self) -> torch.device:
        """Where parameters lie."""
        return torch.device("cpu") if self.offloaded else self.device

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes what is written once."""
        return self.rank == 0


@contextlib.contextmanager
def start(training: Training, comm: Comm) -> Iterator[Runtime]:
    """Wake this process: device, threads, seeds and, where there are several processes, their group, which is left at the end."""
    rank, world_size, local_rank = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(f"NGPU asks for a GPU number {local_rank}, but this machine has {torch.cuda.device_count()}")
        torch.cuda.set_device(device)
    if device.type == "cpu":
        keep_memory()
    if training.deterministic:  # read by cuBLAS at its first use
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if world_size > 1:
        die_with_parent()
        logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)  # how some collectives could be fewer
    random.seed(training.seed)
    np.random.seed(training.seed & 0xFFFFFFFF)
    torch.manual_seed(training.seed)
    torch.use_deterministic_algorithms(training.deterministic)
    if training.enable_cpu_offload and device.type == "cpu":
        raise ConfigError("training.enable_cpu_offload: there is no GPU here whose memory it would save; remove it")
    runtime = Runtime(rank, world_size, device, *resolve_dtypes(training, device), training.enable_cpu_offload)
    if not runtime.sharded:
        yield runtime
        return
    timeout = datetime.timedelta(seconds=comm.init_timeout_seconds)
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl" if runtime.offloaded else "nccl"
    if world_size > 1:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    try:
        yield runtime
    except BaseException:
        if world_size == 1:
            dist.destroy_process_group()
        raise  # with others, who may be waiting in a collective, leaving waits for nobody
    dist.destroy_process_group()


@contextlib.contextmanager
def hold_folder(folder: Path, runtime: Runtime) -> Iterator[None]:
    """Have the main process hold the run folder, and look that what the run will replace in it is a run's. Collective.

    Raises:
        ConfigError: on every rank, where another run holds it, or it has an ``export`` or ``adapter`` of somebody else's.
    """
    with contextlib.ExitStack() as stack:
        with agreed():
            if runtime.is_main:
                stack.enter_context(lock_folder(folder))
                remove_debris(folder)
                for name in ("export", "adapter"):
                    check_replaceable(folder / name, "export")
        yield


class StopSignal:
    """Whether somebody wants the run to end: Ctrl-C, a lost terminal (SIGHUP), SIGTERM or SIGUSR1 from a scheduler. A second one ends it at once."""

    def __init__(self) -> None:
        self.received, self._when, self._waits = False, -math.inf, False

    def wait_for_steps(self) -> None:
        """From now on there is something to save, and a signal waits for the step in hand; before, it ends the run where it is."""
        self._waits = True

    @property
    def seconds_since(self) -> float:
        """Since it was received; 0 where it was not, as on other machines."""
        return time.monotonic() - self._when if self.received else 0.0

    def __enter__(self) -> "StopSignal":
        numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
        numbers += [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else []  # which nohup has it be
        self._before = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: object) -> None:
        if time.monotonic() - self._when < ONE_SIGNAL_SECONDS:
            return
        if self.received:
            end_at_once(1)
        self.received, self._when = True, time.monotonic()
        if self._waits and os.environ.get("RANK", "0") == "0":
            with contextlib.suppress(OSError):  # a terminal that is lost
                os.write(2, b"a signal: the run ends as soon as what is in hand is done; a second one ends it at once\n")
        if not self._waits:
            raise Stopped("stopped by a signal before training began; the same command begins again")


def resolve_dtypes(training: Training, device: torch.device) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    """Parameter, compute and reduction dtypes after "auto" (see the fields of [training])."""
    param = DTYPES["float32" if training.dtype == "auto" else training.dtype]
    mixed = device.type == "cuda" and param != torch.float64
    compute = (torch.bfloat16 if mixed else param) if training.mixed_precision_param == "auto" else DTYPES[training.mixed_precision_param]
    reduce = (torch.float32 if mixed else param) if training.mixed_precision_reduce == "auto" else DTYPES[training.mixed_precision_reduce]
    return param, compute, reduce


def run_main(main: Callable[[list[str]], None], argv: list[str]) -> int:
    """Run a program's main function; the exit code, also for run_train.sh, which cannot learn it through torchrun.

    What the user can mend is printed as a sentence, by one process where all know of it; everything else as a traceback by the process that met it.
    """
    try:
        main(argv)
        return 0
    except (TunelibError, Stopped) as error:
        if os.environ.get("RANK", "0") == "0" or not error.agreed:
            print(error if isinstance(error, Stopped) else f"error: {error}", file=sys.stderr)
        return _leave_exit_code(error.exit_code)
    except (torch.OutOfMemoryError, MemoryError) as error:
        return _leave_exit_code(_report_memory(error))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return _leave_exit_code(1)
    except Exception as error:
        if isinstance(error, RuntimeError) and "can't allocate memory" in str(error):
            return _leave_exit_code(_report_memory(error))
        traceback.print_exc()
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            advice = "set compile.enable = false, and take another optimizer.name than AdamW8bit"
            print(f"error: what is to be compiled cannot be ({type(error).__name__}, above): {advice}", file=sys.stderr)
        return _leave_exit_code(1)


def end_at_once(code: int) -> NoReturn:
    """End the process from any thread, its exit code written where the launcher looks for it."""
    leave(_leave_exit_code(code))


def leave(code: int) -> NoReturn:
    """End the process at once, its output written.

    The interpreter's own way out would abort now and then: a thread of gloo may still wait for the interpreter to release the
    last collective's tensors, and is torn down while it waits ("terminate called without an active exception").
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _report_memory(error: BaseException) -> int:
    first_line = str(error).strip().split("\n")[0]
    print(
        f"error: out of memory on rank {os.environ.get('RANK', '0')} ({first_line}). Try, in this order: --training.local_batch_size 1 "
        "(the global batch stays as it is), a smaller --training.seq_len, more processes (NGPU=…: they share the state).",
        file=sys.stderr,
    )
    return 1


def _leave_exit_code(code: int) -> int:
    """Write the code where the launcher looks for it; of several processes the first knows best, the others follow from it."""
    if path := os.environ.get(EXIT_CODE_FILE):
        # A machine that starts again because another did keeps its count of restarts; the port is a new one every time.
        start = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}-{os.environ.get('MASTER_PORT', '0')}"
        with contextlib.suppress(FileExistsError), open(f"{path}.{start}", "x") as file:
            file.write(str(code))
    return code


def keep_memory() -> None:
    """Have the allocator keep what a step frees for the next one: handing it back and forth costs some per cent of a step (glibc only)."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_max = -1, -4
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_max, 0)  # pieces of their own, as of the logits and of the head's gradient, would go back at once


def die_with_parent() -> None:
    """Have the system end this process when the one that started it dies; it would live on, in a session of its own (Linux only)."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
