"""What TensorBoard and W&B read back is what metrics.jsonl holds: after a resume, after a rollback, and whatever fails is told once."""

import importlib.util
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from unit.observe.readers import read_jsonl, read_tensorboard, read_wandb, series_of

from tunelib.config.schema import Metrics
from tunelib.errors import ConfigError
from tunelib.observe import sinks
from tunelib.observe.sinks import WeightsAndBiases, check_sinks, open_metrics, resolve_wandb_mode

TB = Metrics(enable_tensorboard=True)
WANDB = Metrics(enable_wandb=True, wandb_mode="offline")
ROWS: list[dict[str, Any]] = [{"step": 0, "validation_loss": 6.5, "tokens": 0}]
for _step in range(1, 6):
    ROWS += [{"step": _step, "epoch": _step / 3, "lr": 1e-3 / _step, "loss": 5 / _step, "tokens": 2048 * _step}]
ROWS += [{"step": 5, "validation_loss": 1.25, "tokens": 10240}, {"step": 6, "epoch": 2.0, "lr": 1e-4, "passed_over": True, "tokens": 10240}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.toml").write_text("[training]\nsteps = 6\n[optimizer]\nlr = 0.5\n")
    return tmp_path


def write(folder: Path, section: Metrics, rows: list[dict[str, Any]], resumed_step: int | None = None, cut: int | None = None) -> list[str]:
    """Rows through metrics.jsonl and its sinks; what was said."""
    said: list[str] = []
    with open_metrics(folder, section, resumed_step, False, True, said.append) as metrics:
        for row in rows:
            metrics.write(row)
        metrics.sync()
        if cut is not None:
            metrics.cut(cut)
            metrics.write(ROWS[3])
    return said


def check_tensorboard(folder: Path) -> None:
    """Each name, step and value, to the 32 bits that an event holds."""
    wanted, found = series_of(read_jsonl(folder / "metrics.jsonl")), read_tensorboard(folder / "tb")
    assert found == {name: [(step, float(np.float32(value))) for step, value in points] for name, points in wanted.items()}


def check_wandb(folder: Path) -> None:
    """Each name, step and value of the newest run there."""
    assert series_of(read_wandb(folder)[-1].rows) == series_of(read_jsonl(folder / "metrics.jsonl"))


CHECKS = [(TB, check_tensorboard), (WANDB, check_wandb)]
each_sink = pytest.mark.parametrize(("section", "check"), CHECKS, ids=["tensorboard", "wandb"])


@each_sink
def test_sink_holds_the_rows_of_metrics_jsonl(folder: Path, section: Metrics, check: Any) -> None:
    write(folder, section, ROWS)
    check(folder)


@each_sink
def test_resumed_run_shows_no_step_twice(folder: Path, section: Metrics, check: Any) -> None:
    write(folder, section, ROWS)
    write(folder, section, [{"step": 4, "loss": 99.0, "lr": 0.5, "tokens": 1}], resumed_step=3)
    assert [step for step, _ in series_of(read_jsonl(folder / "metrics.jsonl"))["loss"]] == [1, 2, 3, 4]
    check(folder)


@each_sink
def test_rows_that_a_rollback_takes_back_are_gone(folder: Path, section: Metrics, check: Any) -> None:
    write(folder, section, ROWS, cut=2)
    assert [row["step"] for row in read_jsonl(folder / "metrics.jsonl")] == [0, 1, 2, 3]
    check(folder)


@each_sink
def test_sink_that_is_switched_on_later_gets_the_earlier_rows(folder: Path, section: Metrics, check: Any) -> None:
    write(folder, Metrics(), ROWS[:4])
    write(folder, section, ROWS[4:], resumed_step=3)
    check(folder)


@each_sink
def test_fresh_run_in_an_old_folder_shows_itself_alone(folder: Path, section: Metrics, check: Any) -> None:
    write(folder, section, ROWS)
    write(folder, section, ROWS[:2])
    check(folder)


def test_tensorboard_that_looks_on_forgets_what_was_taken_back(folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tb"))
    with open_metrics(folder, TB, None, False, True, print) as metrics:
        for row in ROWS:
            metrics.write(row)
        events.Reload()
        assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5]
        metrics.cut(2)
        metrics.write({"step": 3, "loss": 7.0})
        events.Reload()
        assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 5.0), (2, 2.5), (3, 7.0)]


def test_other_people_s_event_files_stay(folder: Path) -> None:
    (folder / "tb").mkdir()
    other = folder / "tb/events.out.tfevents.1700000000.host.1.0"
    other.write_bytes(b"")
    for _ in range(4):
        write(folder, TB, ROWS)
    assert other.exists()
    assert [path.stat().st_size > 0 for path in sorted((folder / "tb").glob("*tunelib*"))] == [False, True]
    check_tensorboard(folder)


def test_wandb_holds_the_settings(folder: Path) -> None:
    write(folder, WANDB, ROWS)
    assert read_wandb(folder)[0].config == {"training.steps": 6, "optimizer.lr": 0.5, "_wandb": {}}


def test_other_ranks_open_no_sink(folder: Path) -> None:
    both = Metrics(enable_tensorboard=True, enable_wandb=True, wandb_mode="offline")
    with open_metrics(folder, both, None, False, False, print) as metrics:
        metrics.write(ROWS[0])
    assert [path.name for path in folder.iterdir()] == ["config.toml"]


class Service:
    """Stands in for wandb.init with a server that keeps rows, which no test can reach."""

    def __init__(self) -> None:
        self.runs: dict[str, list[dict[str, Any]]] = {}

    def init(self, run_id: str) -> Any:
        run_id = run_id or f"run{len(self.runs)}"
        rows = self.runs.setdefault(run_id, [])
        return SimpleNamespace(
            id=run_id, step=len(rows), url=f"there/{run_id}", dir="", log=rows.append, define_metric=lambda *_, **__: None, finish=lambda: None
        )


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    service = Service()
    monkeypatch.setattr(WeightsAndBiases, "_init", lambda self, run_id: service.init(run_id))
    return service


ONLINE = Metrics(enable_wandb=True, wandb_mode="online")


def test_online_run_goes_on_where_nothing_was_taken_back(folder: Path, service: Service) -> None:
    write(folder, ONLINE, ROWS[:4])
    del service.runs["run0"][3:]  # the connection was lost before the last row
    write(folder, ONLINE, ROWS[4:], resumed_step=3)
    assert service.runs == {"run0": ROWS}


def test_online_run_that_holds_what_was_taken_back_is_left_and_another_begun(folder: Path, service: Service) -> None:
    write(folder, ONLINE, ROWS)
    write(folder, ONLINE, ROWS[3:], resumed_step=2)
    assert service.runs == {"run0": ROWS, "run1": ROWS}
    write(folder, ONLINE, ROWS[:2])
    assert service.runs["run2"] == ROWS[:2]


def test_failing_service_is_told_once_and_ends_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: WeightsAndBiases, run_id: str) -> None:
        raise ConnectionError("no route to host\nmore words")

    monkeypatch.setattr(WeightsAndBiases, "_init", fail)
    said = write(folder, ONLINE, ROWS)
    assert said == [f"Weights & Biases gets no more rows (ConnectionError: no route to host); {folder / 'metrics.jsonl'} has them all"]
    assert read_jsonl(folder / "metrics.jsonl") == ROWS


def test_hanging_service_is_not_waited_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(WeightsAndBiases, "_init", lambda self, run_id: release.wait(60))
    monkeypatch.setattr(sinks, "CLOSE_SECONDS", 0.2)
    begun = time.monotonic()
    said = write(folder, ONLINE, ROWS)
    release.set()
    assert time.monotonic() - begun < 2
    assert said == [f"Weights & Biases has not taken everything within 0 s; `wandb sync` sends what lies in {folder / 'wandb'}"]


def test_tensorboard_waits_for_room_on_the_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only its own disk is full, from the third row to the fifth."""
    said: list[str] = []
    with open_metrics(folder, TB, None, False, True, said.append) as metrics:
        (sink,) = metrics._sinks
        real, is_full = sink._file._file, False  # type: ignore[attr-defined]

        class FullAtTimes:
            def write(self, piece: bytes) -> int:
                if is_full:
                    raise OSError(28, "No space left on device")
                return real.write(piece[:7])  # a disk may take a part

            def fileno(self) -> int:
                return real.fileno()

            def close(self) -> None:
                real.close()

        sink._file._file = FullAtTimes()  # type: ignore[attr-defined]
        for number, row in enumerate(ROWS):
            is_full = 2 <= number < 5
            metrics.write(row)
    assert len(said) == 1
    assert said[0].endswith("cannot be written: No space left on device; its rows are kept, and written later")
    check_tensorboard(folder)


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine on which nobody has logged in."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_CONFIG_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))


def test_online_without_a_login_is_said(nobody: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    section = Metrics(enable_wandb=True)
    with pytest.raises(ConfigError, match=r"nobody has logged in .*run `wandb login`, give \$WANDB_API_KEY, or set metrics.wandb_mode to offline"):
        check_sinks(section, active=True)
    check_sinks(section, active=False)
    check_sinks(WANDB, active=True)
    with monkeypatch.context() as patch:
        patch.setenv("WANDB_API_KEY", "0" * 40)
        check_sinks(section, active=True)
    with monkeypatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        check_sinks(section, active=True)
    (tmp_path / ".netrc").write_text("machine elsewhere.example\n  login user\n  password 0\n")
    with pytest.raises(ConfigError):
        check_sinks(section, active=True)
    (tmp_path / ".netrc").write_text("machine elsewhere.example\n  login user\n  password 0\nmachine api.wandb.ai\n  login user\n  password 1\n")
    check_sinks(section, active=True)
    (tmp_path / ".netrc").unlink()
    (tmp_path / ".config/wandb").mkdir(parents=True)
    (tmp_path / ".config/wandb/settings").write_text("[default]\napi_key = 1\n")
    check_sinks(section, active=True)
    (tmp_path / ".config/wandb/settings").write_text("neither this")
    with pytest.raises(ConfigError):
        check_sinks(section, active=True)


def test_mode_is_the_setting_s_before_the_environment_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "dryrun")
    assert resolve_wandb_mode(Metrics(enable_wandb=True)) == "offline"
    assert resolve_wandb_mode(ONLINE) == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with pytest.raises(ConfigError, match=r"\$WANDB_MODE is 'disabled', not online or offline"):
        resolve_wandb_mode(Metrics(enable_wandb=True))


@pytest.mark.parametrize(("section", "package"), [(TB, "tensorboard"), (WANDB, "wandb")])
def test_missing_package_is_said(section: Metrics, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(ConfigError, match=f"needs the package {package}: pip install {package}"):
        check_sinks(section, active=True)
    # a run folder's own folder "wandb", seen from inside of it, is no package
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=None) if name == package else find(name))
    with pytest.raises(ConfigError, match=f"needs the package {package}"):
        check_sinks(section, active=True)
