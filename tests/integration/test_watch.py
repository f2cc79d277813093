"""A whole run seen from outside: TensorBoard, W&B and the summary hold what metrics.jsonl and the run's outputs do, also after a resume."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Run, run_processes, write_chats, write_toml
from unit.observe.readers import Series, read_tensorboard, read_wandb, series_of

from tunelib.errors import ConfigError

WATCHED = """
[checkpoint]
enable_checkpoint = true
interval = 4
[validation]
enable = true
fraction = 0.1
freq = 3
[metrics]
log_freq = 2
enable_tensorboard = true
enable_wandb = true
wandb_mode = "offline"
"""


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    return write_toml(tmp_path / "tiny.toml", write_chats(tmp_path / "chats.jsonl", 120), WATCHED)


def rounded(series: Series) -> Series:
    """Values as 32 bits hold them."""
    return {name: [(step, float(np.float32(value))) for step, value in points] for name, points in series.items()}


def check_sinks_of(run: Run) -> None:
    wanted = series_of(run.rows())
    assert read_tensorboard(run.folder / "tb") == rounded(wanted)
    newest = read_wandb(run.folder)[-1]
    assert series_of(newest.rows) == wanted
    assert newest.config["checkpoint.interval"] == 4
    assert newest.project == "tunelib"


def test_sinks_hold_the_series_of_metrics_jsonl_also_after_a_resume(
    toml: Path, tmp_path: Path, train: Callable[..., Run], capsys: pytest.CaptureFixture
) -> None:
    run = train(toml, "--training.steps", "7", folder=tmp_path / "run")
    assert {"loss", "validation_loss", "lr", "grad_norm", "tokens_per_second", "memory_gib"} <= series_of(run.rows()).keys()
    check_sinks_of(run)
    said = capsys.readouterr().out
    assert (run.folder / "summary.txt").read_text() in said
    numbers = json.loads((run.folder / "summary.json").read_text())
    assert numbers["validation_loss"] == run.series("validation_loss")[-1]
    assert numbers["tokens"] == run.rows()[-1]["tokens"]
    assert (numbers["checkpoint"], numbers["export"]) == (str(run.folder / "checkpoint/step-7"), str(run.folder / "export"))
    resumed = train(toml, "--training.steps", "10", "--checkpoint.load_step", "4", folder=run.folder)
    assert [step for step, _ in series_of(resumed.rows())["loss"]] == [2, 4, 6, 8, 10]
    check_sinks_of(resumed)
    assert len(read_wandb(run.folder)) == 2


def test_one_of_two_processes_writes(toml: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run_processes([[str(toml), "--training.steps", "3", "--job.dump_folder", str(run.folder)]], 2)
    check_sinks_of(run)
    assert len(list((run.folder / "tb").iterdir())) == 1
    assert "summary" in {path.stem for path in run.folder.iterdir()}


def test_missing_login_is_said_before_anything_is_made(
    toml: Path, tmp_path: Path, train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="nobody has logged in to Weights & Biases"):
        train(toml, "--training.steps", "3", "--metrics.wandb_mode", "online", folder=tmp_path / "run")
    assert not (tmp_path / "run/config.toml").exists()
