"""Early end and export of the best weights: what the validation losses ask for, also where the run was stopped and resumed."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run, run_processes, write_chats, write_toml

import train as program
from tunelib.checkpoint.dcp_reader import load_tensors
from tunelib.errors import Stopped

VALIDATED = """
[checkpoint]
enable_checkpoint = true
interval = 8
keep_latest_k = 1
keep_best = true
[validation]
enable = true
fraction = 0.2
freq = 2
"""
STEPS = ["--training.steps", "16"]
UP_AND_DOWN = ["--optimizer.lr", "0.2"]  # so large that losses rise again
OVERFITTED = ["--lora.enable", "--lora.rank", "4", "--optimizer.lr", "0.03"]
"""The loss is lowest after 8 steps, and rises after them, on every layout."""


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    return write_toml(tmp_path / "tiny.toml", write_chats(tmp_path / "chats.jsonl", 100), VALIDATED.replace("0.2", "0.1"))


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """So few documents that they are soon known by heart."""
    return write_toml(tmp_path / "few.toml", write_chats(tmp_path / "few.jsonl", 24), VALIDATED)


def losses_of(run: Run) -> dict[int, float]:
    return {row["step"]: row["validation_loss"] for row in run.rows() if "validation_loss" in row}


def best_of(run: Run) -> int:
    """The step with the lowest validation loss of those that are saved: all but the first."""
    losses = {step: loss for step, loss in losses_of(run).items() if step > 0}
    return min(losses, key=losses.__getitem__)


def steps_saved(run: Run) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run.folder / "checkpoint").iterdir())


def saved_weights(run: Run, step: int) -> dict[str, torch.Tensor]:
    tensors = {name: torch.empty_like(tensor) for name, tensor in run.weights().items()}
    load_tensors(tensors, run.folder / f"checkpoint/step-{step}")
    return tensors


def holds(run: Run, weights: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, weights[name]) for name, tensor in run.weights().items())


def end_of_patience(run: Run, patience: int) -> int:
    """The step at which a run that has these losses is to end, were it long enough."""
    lowest, worse = float("inf"), 0
    for step, loss in list(losses_of(run).items())[1:]:  # the first is of weights not trained yet
        lowest, worse = min(lowest, loss), 0 if loss < lowest else worse + 1
        if worse == patience:
            return step
    raise AssertionError("its patience was not tried")


def test_best_weights_are_exported_and_kept(train: Callable[..., Run], toml: Path, capsys: pytest.CaptureFixture) -> None:
    last = train(toml, *STEPS, *UP_AND_DOWN)
    best = best_of(last)
    assert best < 16, "the last weights are the best ones: nothing is shown"
    assert holds(last, saved_weights(last, 16))
    run = train(toml, *STEPS, *UP_AND_DOWN, "--checkpoint.load_best_at_end")
    assert losses_of(run) == losses_of(last)
    assert steps_saved(run) == [best, 16]
    assert holds(run, saved_weights(run, best))
    numbers = json.loads((run.folder / "summary.json").read_text())
    assert (numbers["step"], numbers["exported_step"], numbers["exported_validation_loss"]) == (16, best, losses_of(run)[best])
    assert f"; exported: step {best}, validation loss {losses_of(run)[best]:.4f}" in (run.folder / "summary.txt").read_text()
    assert not holds(run, saved_weights(run, 16))
    assert f"to be exported: the weights of step {best}, with validation loss {losses_of(run)[best]:.4f}" in capsys.readouterr().out
    whole = {name: tensor.clone() for name, tensor in run.weights().items()}
    shutil.rmtree(run.folder / "export")
    train(toml, *STEPS, *UP_AND_DOWN, "--checkpoint.load_best_at_end", folder=run.folder)  # finished: exported again
    assert holds(run, whole)


def test_best_weights_are_exported_beside_a_last_checkpoint_of_weights_alone(train: Callable[..., Run], toml: Path) -> None:
    words = [*STEPS, *UP_AND_DOWN, "--checkpoint.load_best_at_end", "--checkpoint.model_weights_only"]
    run = train(toml, *words)
    whole = {name: tensor.clone() for name, tensor in run.weights().items()}
    assert holds(run, saved_weights(run, best_of(run)))
    train(toml, *words, folder=run.folder)
    assert holds(run, whole)


def test_damaged_best_checkpoint_is_named_and_the_next_best_exported(train: Callable[..., Run], toml: Path, capsys: pytest.CaptureFixture) -> None:
    words = [*STEPS, *UP_AND_DOWN, "--checkpoint.load_best_at_end", "--checkpoint.keep_latest_k", "0"]
    run = train(toml, *words)
    losses, best = losses_of(run), best_of(run)
    (data,) = (run.folder / f"checkpoint/step-{best}").glob("*.distcp")
    content = data.read_bytes()
    data.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    saved = [step for step in steps_saved(run) if step != best]
    second = min(saved, key=losses.__getitem__)
    capsys.readouterr()
    train(toml, *words, folder=run.folder)
    said = capsys.readouterr().out
    assert f"step {best} is damaged" in said
    assert f"step {best} had {losses[best]:.4f}, and is not saved" in said
    assert holds(run, saved_weights(run, second))


def test_run_ends_when_its_patience_does_and_restarts_know_it(train: Callable[..., Run], toml: Path, capsys: pytest.CaptureFixture) -> None:
    free = train(toml, *STEPS, *UP_AND_DOWN)
    end = end_of_patience(free, 1)
    assert end < 16
    capsys.readouterr()
    run = train(toml, *STEPS, *UP_AND_DOWN, "--validation.patience", "1")
    assert "the run ends here (validation.patience)" in capsys.readouterr().out
    assert max(row["step"] for row in run.rows()) == end
    assert "train on" not in (run.folder / "summary.txt").read_text(), "more steps would not begin"
    assert holds(run, saved_weights(run, end))
    rows = run.rows()
    train(toml, *STEPS, *UP_AND_DOWN, "--validation.patience", "1", folder=run.folder)
    assert "the run ends here (validation.patience)" in capsys.readouterr().out
    assert run.rows() == rows
    train(toml, *STEPS, *UP_AND_DOWN, folder=run.folder)  # whose patience is endless
    assert losses_of(run) == losses_of(free)
    assert run.series("loss") == free.series("loss")


@pytest.mark.parametrize("step", [7, 9, 12])
def test_stopped_and_resumed_run_ends_and_exports_as_the_one_that_never_stopped(
    train: Callable[..., Run], few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    words = [*STEPS, *OVERFITTED, "--validation.patience", "3", "--checkpoint.load_best_at_end"]
    whole = train(few, *words)
    assert steps_saved(whole) == [8, 14]
    train_step, count = program.train_step, 0

    def stop_at(*given: object) -> tuple[float, float]:
        nonlocal count
        count += 1
        if count == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(*given)  # type: ignore[arg-type]  # passed on as they came

    monkeypatch.setattr(program, "train_step", stop_at)
    cut = tmp_path / "cut"
    with pytest.raises(Stopped):
        train(few, *words, folder=cut)
    monkeypatch.setattr(program, "train_step", train_step)
    resumed = train(few, *words, folder=cut)
    assert losses_of(resumed) == losses_of(whole)
    assert resumed.series("loss") == whole.series("loss")
    assert steps_saved(resumed) == steps_saved(whole)
    assert holds(resumed, whole.weights())


def test_validation_that_a_signal_cut_is_written_once_however_often_the_finished_run_is_started(
    train: Callable[..., Run], few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*STEPS, *OVERFITTED, "--validation.prompts", "Who?"]
    whole, cut, evaluate = train(few, *words), Run(tmp_path / "cut"), program.evaluate

    def stop_after_the_last_step(*given: Any) -> float | None:
        if len(cut.series("loss")) == 16:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*given)

    monkeypatch.setattr(program, "evaluate", stop_after_the_last_step)
    with pytest.raises(Stopped):
        train(few, *words, folder=cut.folder)
    monkeypatch.setattr(program, "evaluate", evaluate)
    assert len(cut.series("validation_loss")) == len(whole.series("validation_loss")) - 1
    for _ in range(2):
        train(few, *words, folder=cut.folder)
        assert losses_of(cut) == losses_of(whole)
        assert cut.series("validation_loss") == whole.series("validation_loss")
        assert cut.samples() == whole.samples()


def test_two_processes_end_and_export_as_one(train: Callable[..., Run], few: Path, tmp_path: Path) -> None:
    words = [*STEPS, *OVERFITTED, "--training.dtype", "float64", "--validation.patience", "3", "--checkpoint.load_best_at_end"]
    one, two = train(few, *words), Run(tmp_path / "two")
    run_processes([[str(few), *words, "--job.dump_folder", str(two.folder)]], 2)
    assert losses_of(two) == pytest.approx(losses_of(one), rel=1e-3)  # at this learning rate AdamW makes much of 1e-14 after step 8
    assert steps_saved(two) == steps_saved(one) == [8, 14]
    for name, tensor in one.weights().items():
        torch.testing.assert_close(two.weights()[name], tensor, rtol=1e-6, atol=1e-6)  # those of step 8
    state = json.loads((two.folder / "checkpoint/step-14/state.json").read_text())
    assert (state["best_step"], state["num_worse"]) == (8, 3)
