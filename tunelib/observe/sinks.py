"""TensorBoard and Weights & Biases: the rows of metrics.jsonl under the same names.

metrics.jsonl holds the truth. After a start, and after rows were taken back (a resume, a rollback), a sink is begun anew with the rows that
stand; so it never holds a step twice, nor one that the run has left. What a sink cannot take is told once; the run goes on.
"""

import configparser
import contextlib
import importlib.util
import io
import netrc
import os
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from tunelib.config.load import read_written
from tunelib.config.schema import Metrics
from tunelib.errors import ConfigError
from tunelib.files import replace_file
from tunelib.observe.metrics import METRICS_FILE, PatientFile, RowWriter, Sink

CLOSE_SECONDS = 60.0
"""How long the end of a run waits for Weights & Biases."""
EVENTS_FILE = "events.out.tfevents.{seconds:010d}.tunelib.{number:06d}"
"""TensorBoard looks for the first three words, and reads files in the order of their names."""
EVENTS_FILES = "events.out.tfevents.*.tunelib.*"
RUN_ID_FILE = "run_id.txt"
WANDB_SERVER = "https://api.wandb.ai"
"""Where W&B's client goes if nobody says otherwise."""
Mode = Literal["online", "offline"]
MODES: dict[str, Mode] = {"online": "online", "offline": "offline", "dryrun": "offline"}
"""What $WANDB_MODE may say → the mode. "dryrun" is its older word."""


def open_metrics(
    folder: Path, section: Metrics, resumed_step: int | None, is_revalidated: bool, active: bool, say: Callable[[str], None]
) -> RowWriter:
    """metrics.jsonl of a run folder, which holds config.toml, with the sinks that the settings ask for; see RowWriter."""

    def open_sinks() -> list[Sink]:
        sinks: list[Sink] = [TensorBoard(folder / section.save_tb_folder, say)] if section.enable_tensorboard else []
        return [*sinks, WeightsAndBiases(folder, section, say)] if section.enable_wandb else sinks

    return RowWriter(folder / METRICS_FILE, resumed_step, active, say, is_revalidated, open_sinks)


def check_sinks(section: Metrics, active: bool) -> None:
    """Whether the sinks that the settings ask for can be had; asks nobody, and sends nothing.

    Args:
        active: False on ranks that do not write.

    Raises:
        ConfigError: a package is missing, $WANDB_MODE is strange, or nobody has logged in.
    """
    if section.enable_tensorboard and active and not _is_installed("tensorboard"):
        raise ConfigError("metrics.enable_tensorboard needs the package tensorboard: pip install tensorboard, or set it to false")
    if not section.enable_wandb or not active:
        return
    if not _is_installed("wandb"):
        raise ConfigError("metrics.enable_wandb needs the package wandb: pip install wandb, or set it to false")
    if resolve_wandb_mode(section) == "online" and not _is_logged_in():
        ways = "run `wandb login`, give $WANDB_API_KEY, or set metrics.wandb_mode to offline and send the run later with `wandb sync`"
        raise ConfigError(f"metrics.enable_wandb: nobody has logged in to Weights & Biases on this machine; {ways}")


def resolve_wandb_mode(section: Metrics) -> Mode:
    """ "online" or "offline"; raises ConfigError where $WANDB_MODE says something else."""
    said = os.environ.get("WANDB_MODE") or "online"
    if section.wandb_mode != "auto":
        return section.wandb_mode
    if said not in MODES:
        raise ConfigError(f"metrics.wandb_mode: $WANDB_MODE is {said!r}, not online or offline; change that, or set metrics.enable_wandb = false")
    return MODES[said]


def _is_logged_in() -> bool:
    """Whether W&B's client would find a key by itself: in the environment, in ~/.netrc, or in its own settings file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    own = configparser.ConfigParser(interpolation=None)
    with contextlib.suppress(configparser.Error, UnicodeDecodeError):  # the client takes such a file for none, too
        own.read(Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser() / "settings")
    if own.get("default", "api_key", fallback=""):
        return True
    server = os.environ.get("WANDB_BASE_URL") or own.get("default", "base_url", fallback=WANDB_SERVER)
    files = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for path in (Path(file).expanduser() for file in files):
        with contextlib.suppress(OSError, netrc.NetrcParseError):  # here, too
            if (found := netrc.netrc(path).authenticators(str(urlsplit(server).netloc))) and found[2]:
                return True
    return False


def _is_installed(package: str) -> bool:
    """A folder of that name in the current directory, such as a run's own, is none."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


class TensorBoard:
    """Events in a folder. Values are of 32 bits there; steps are whole.

    Args:
        folder: its event files of earlier starts are replaced; others stay.
        say: tells the user.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._folder, self._say = folder, say
        self._event, self._summary, self._log = Event, Summary, SessionLog
        self._file: PatientFile | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def begin(self, rows: list[dict[str, Any]]) -> None:
        """A new file, then the old ones are emptied; a TensorBoard that is looking on forgets what it has read of them.

        They go the next time: TensorBoard 2.21 reads on in no folder from which the file has gone that it is reading.
        """
        old = sorted(self._folder.glob(EVENTS_FILES))
        number = int(old[-1].suffix[1:]) + 1 if old else 1
        forget = self._event(step=0, session_log=self._log(status=self._log.START))
        content = _record(self._event(file_version="brain.Event:2")) + _record(forget) + b"".join(map(self._encode, rows))
        path = self._folder / EVENTS_FILE.format(seconds=int(time.time()), number=number)
        before, self._file = self._file, PatientFile(path, content, self._say)  # which, where there is no room, leaves the old one in use
        if before is not None:
            before.close()
        for one in old:
            one.unlink() if one.stat().st_size == 0 else os.truncate(one, 0)

    def write(self, row: dict[str, Any]) -> None:
        assert self._file is not None, "begun"
        self._file.append(self._encode(row))

    def sync(self) -> None:
        assert self._file is not None, "begun"
        self._file.sync()

    def close(self) -> None:
        assert self._file is not None, "begun"
        self._file.close()

    def _encode(self, row: dict[str, Any]) -> bytes:
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in row.items() if name != "step"]
        return _record(self._event(wall_time=time.time(), step=row["step"], summary=self._summary(value=values)))


def _record(event: Any) -> bytes:
    """An event in the framing of TensorBoard's files, with its checksums."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    buffer = io.BytesIO()
    RecordWriter(buffer).write(event.SerializeToString())
    return buffer.getvalue()


class WeightsAndBiases:
    """A run there, whose steps are those of the rows (``step``). A thread speaks to it, so that training does not wait.

    Offline, each start writes a run that holds all rows, and the newest is the one to send. Online, a start goes on with the run of the
    start before, where that holds no row that was taken back.

    Args:
        folder: the run folder, with config.toml; the files go to the folder wandb in it.
        say: tells the user.
    """

    def __init__(self, folder: Path, section: Metrics, say: Callable[[str], None]):
        self._folder, self._section, self._say = folder, section, say
        self._mode = resolve_wandb_mode(section)
        self._run: Any = None
        self._has_failed = False
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        (folder / "wandb").mkdir(exist_ok=True)
        self._thread.start()

    def begin(self, rows: list[dict[str, Any]]) -> None:
        self._tasks.put(lambda: self._begin(rows))

    def write(self, row: dict[str, Any]) -> None:
        self._tasks.put(lambda: self._run.log(row))

    def sync(self) -> None:
        """Nothing to wait for: a start compares what is there with metrics.jsonl."""

    def close(self) -> None:
        self._tasks.put(None)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            place = self._folder / "wandb"
            self._say(f"Weights & Biases has not taken everything within {CLOSE_SECONDS:.0f} s; `wandb sync` sends what lies in {place}")

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            self._try(task)
        self._try(self._finish)

    def _try(self, task: Callable[[], None]) -> None:
        """Any error is the service's or its client's: it is told once, and nothing more is sent."""
        if not self._has_failed:
            try:
                task()
            except Exception as error:
                self._has_failed = True
                why = f"{type(error).__name__}: {error}".strip().splitlines()[0]
                self._say(f"Weights & Biases gets no more rows ({why}); {self._folder / METRICS_FILE} has them all")

    def _begin(self, rows: list[dict[str, Any]]) -> None:
        self._finish()
        known, id_file = "", self._folder / "wandb" / RUN_ID_FILE
        if self._mode == "online" and rows:
            with contextlib.suppress(OSError):  # none before
                known = id_file.read_text().strip()
        self._run = self._init(known)
        if self._run.step > len(rows):  # so many rows are there
            self._finish()
            self._run = self._init("")
        replace_file(id_file, self._run.id)
        self._run.define_metric("*", step_metric="step")
        for row in rows[self._run.step :]:
            self._run.log(row)
        place = self._run.url if self._mode == "online" else f"offline; send it with `wandb sync {Path(self._run.dir).parent}`"
        self._say(f"wandb      {place}")

    def _init(self, run_id: str) -> Any:
        import wandb

        return wandb.init(
            project=self._section.wandb_project or os.environ.get("WANDB_PROJECT") or "tunelib",
            name=self._section.wandb_name or os.environ.get("WANDB_NAME") or self._folder.resolve().name,
            dir=self._folder,
            mode=self._mode,
            id=run_id or None,
            resume="allow" if run_id else None,
            config=read_written(self._folder / "config.toml"),
            settings=wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True),
        )

    def _finish(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None
