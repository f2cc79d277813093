"""Tasks are scored where validation is, with the same figures on every layout, and a run that is cut in the midst of it loses none."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Run, run_processes, write_chats, write_toml

from tunelib.errors import ConfigError, Stopped
from tunelib.infer.harness import Exam

TASKS = """
[checkpoint]
enable_checkpoint = true
interval = 2
[validation]
enable = true
fraction = 0.2
freq = 2
tasks = ["larkhaven_choice", "larkhaven_answer"]
task_path = "train_configs/tasks"
task_limit = 5
task_chat_template = true
"""
STEPS = ["--training.steps", "4"]
FIGURES = ("tasks/larkhaven_choice/acc", "tasks/larkhaven_answer/exact_match/line")
LAYOUTS = {
    "shard": [],
    "tensor": ["--parallelism.tensor_parallel_degree", "2"],
    "pipeline": ["--parallelism.pipeline_parallel_degree", "2"],
    "context": ["--parallelism.context_parallel_degree", "2"],
}


@pytest.fixture
def toml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(ROOT)
    return write_toml(tmp_path / "tiny.toml", write_chats(tmp_path / "chats.jsonl", 60), TASKS)


def figures_of(run: Run) -> list[dict[str, Any]]:
    return [row for row in run.rows() if FIGURES[0] in row]


def test_figures_are_rows_of_their_own_where_the_loss_is_measured(train: Callable[..., Run], toml: Path, capsys: pytest.CaptureFixture) -> None:
    run = train(toml, *STEPS)
    assert [row["step"] for row in figures_of(run)] == [0, 2, 4]
    assert all(set(row) == {"step", "tokens", *FIGURES} for row in figures_of(run))
    said = capsys.readouterr().out
    for row in figures_of(run):
        assert f"step {row['step']}: larkhaven_choice acc {row[FIGURES[0]]:.4f}, larkhaven_answer exact_match line {row[FIGURES[1]]:.4f}" in said


def test_scoring_changes_nothing_of_the_training(train: Callable[..., Run], toml: Path, tmp_path: Path) -> None:
    words = [*STEPS, "--lora.enable", "--lora.rank", "4", "--lora.dropout", "0.5"]
    plain = tmp_path / "plain.toml"
    plain.write_text(toml.read_text().partition("tasks =")[0])
    scored = train(toml, *words)
    assert figures_of(scored)
    assert scored.series("loss") == train(plain, *words).series("loss")


@pytest.mark.parametrize("layout", [pytest.param(name, marks=[] if name == "shard" else [pytest.mark.slow]) for name in LAYOUTS])
def test_figures_do_not_depend_on_the_layout(train: Callable[..., Run], toml: Path, tmp_path: Path, layout: str) -> None:
    """Each log-likelihood is compared, not the share of right answers alone."""
    words = [*STEPS, "--training.dtype", "float64"]
    one, two = train(toml, *words), Run(tmp_path / "two")
    run_processes([[str(toml), *words, *LAYOUTS[layout], "--job.dump_folder", str(two.folder)]], 2)
    assert figures_of(two) == figures_of(one)


def test_signal_in_the_midst_of_it_leaves_all_to_the_resumed_run(
    train: Callable[..., Run], toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(toml, *STEPS)
    score, count = Exam.score, 0

    def stop_in_the_second(*words: Any) -> Any:
        nonlocal count
        count += 1
        if count == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return score(*words)

    monkeypatch.setattr(Exam, "score", stop_in_the_second)
    with pytest.raises(Stopped):
        train(toml, *STEPS, folder=tmp_path / "cut")
    monkeypatch.setattr(Exam, "score", score)
    resumed = train(toml, *STEPS, folder=tmp_path / "cut")
    assert figures_of(resumed) == figures_of(whole)
    assert resumed.series("validation_loss") == whole.series("validation_loss")
    assert resumed.series("loss") == whole.series("loss")


def test_unknown_task_is_named_before_a_weight_is_allocated(train: Callable[..., Run], toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import train as program

    monkeypatch.setattr(program, "spread_model", lambda *words: pytest.fail("a model was made"))
    with pytest.raises(ConfigError, match="lm-eval knows no task 'larkhaven_chioce'; did you mean 'larkhaven_choice'"):
        train(toml, *STEPS, "--validation.tasks", "larkhaven_chioce")
