"""The summary says true numbers, where things lie, and commands that work; in words, and for a program."""

import json
import sys
from pathlib import Path

import pytest
import torch
from unit.samples import tiny_config

from tunelib.batch import Batch
from tunelib.config.schema import Checkpoint, Config, Dataset, Lora, MixedSource, Training
from tunelib.data.loader import Step
from tunelib.flops import step_flops
from tunelib.observe import summary as room
from tunelib.observe.peak import Peak
from tunelib.observe.summary import End, Outputs, Summary, next_commands, what_is_trained
from tunelib.parallel.runtime import Runtime

CPU = Runtime(0, 1, torch.device("cpu"), torch.float32, torch.float32, torch.float32)


def make_step(num_tokens: int, lengths: tuple[int, ...] = (8,), num_trained: int = 4) -> Step:
    empty = torch.zeros(1, sum(lengths), dtype=torch.int64)
    return Step(1, [Batch(empty, empty, empty, lengths)], num_trained, num_tokens, 0.0)


def make_summary(num_steps: int = 20, seconds: float = 0.1, config: Config | None = None) -> Summary:
    summary = Summary(config or Config(), tiny_config(), "all of a tiny model")
    for step in range(num_steps):
        summary.add_step(make_step(10), seconds, float(step))
    return summary


def test_speed_is_since_the_last_call() -> None:
    summary = make_summary(0)
    summary.add_step(make_step(100), 2.0, 1.0)
    summary.add_step(make_step(200), 1.0, 1.0)
    assert summary.speed() == {"tokens_per_second": 100.0, "seconds_per_step": 1.5}
    summary.add_step(make_step(50), 0.5, 1.0)
    assert summary.speed() == {"tokens_per_second": 100.0, "seconds_per_step": 0.5}


def test_summary_says_losses_and_where_things_lie(tmp_path: Path) -> None:
    summary = make_summary()
    for loss in (3.0, 2.5, 2.0):
        summary.add_validation(loss)
    outputs = Outputs(tmp_path, tmp_path / "checkpoint/step-20", "a folder of some form")
    text = "\n".join(summary.lines(End(20, 200, 5.0, 1.0, outputs, None, {"talk to it": "python x"})))
    for words in (
        "trained    all of a tiny model",
        "step 20",
        "training loss 14.5000 (mean of the last 10 steps)",
        "validation loss 3.0000 → 2.0000",
        "100 tokens/s",
        "s in this process, the first step after ",
        "peak memory 1.00 GiB",
        "checkpoint/step-20",
        "export: a folder of some form",
        "next       python x  # talk to it",
    ):
        assert words in text
    assert "machine" not in text


def test_share_of_the_machine_is_of_what_a_step_cannot_do_without(tmp_path: Path) -> None:
    """Two documents of this rank's 8 tokens; the other rank has as many."""
    summary = make_summary(0)
    summary.add_step(make_step(16, (5, 3), num_trained=6), 0.5, 1.0)
    needed = step_flops(tiny_config(), [5, 3, 5, 3], 6)
    end = End(1, 16, 5.0, 1.0, Outputs(tmp_path), Peak(8 * needed, "measured somehow"))
    assert summary.numbers(end)["share_of_machine"] == pytest.approx(0.25)
    assert any(line.startswith("machine    25% of its peak ") and line.endswith("measured somehow)") for line in summary.lines(end))


def test_end_is_told_and_written(tmp_path: Path) -> None:
    said: list[str] = []
    make_summary().end(20, 200, 5.0, Outputs(tmp_path), CPU, said.append)
    assert (tmp_path / "summary.txt").read_text().splitlines() == said
    numbers = json.loads((tmp_path / "summary.json").read_text())
    assert (numbers["step"], numbers["training_loss"], numbers["tokens_per_second"]) == (20, 14.5, pytest.approx(100))
    assert numbers["machine_flops_per_second"] is None, "a tiny run"
    before = (tmp_path / "summary.txt").read_bytes()
    make_summary(0).end(20, 200, 5.0, Outputs(tmp_path), CPU, said.append)
    assert (tmp_path / "summary.txt").read_bytes() == before, "a start that found the run finished has nothing to add"


def test_loss_that_is_not_finite_is_no_number_of_json(tmp_path: Path) -> None:
    summary = make_summary(1)
    summary.add_validation(float("nan"))
    summary.end(1, 10, 1.0, Outputs(tmp_path), CPU, lambda line: None)
    numbers = json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)
    assert numbers["validation_loss"] is None


def test_longer_run_is_held_against_the_machine(tmp_path: Path) -> None:
    said: list[str] = []
    make_summary(2, seconds=3.0).end(2, 20, 7.0, Outputs(tmp_path), CPU, said.append)
    (line,) = (line for line in said if line.startswith("machine"))
    assert "measured by float32 products" in line
    numbers = json.loads((tmp_path / "summary.json").read_text())
    assert 0 < numbers["share_of_machine"] < 1


def test_peak_below_what_was_reached_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "find_peak", lambda *words: Peak(1.0, "measured while another program had the machine"))
    said: list[str] = []
    make_summary(2, seconds=3.0).end(2, 20, 7.0, Outputs(tmp_path), CPU, said.append)
    assert not any(line.startswith("machine") for line in said)
    assert json.loads((tmp_path / "summary.json").read_text())["share_of_machine"] is None


def test_disk_without_room_is_told_and_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(room, "replace_file", full)
    said: list[str] = []
    make_summary().end(20, 200, 5.0, Outputs(tmp_path), CPU, said.append)
    assert said[-1] == f"{tmp_path / 'summary.txt'} cannot be written: No space left on device; the lines above are all there is"


def test_finished_run_that_took_no_step_has_a_summary(tmp_path: Path) -> None:
    text = "\n".join(make_summary(0).lines(End(7, 70, 0.1, 1.0, Outputs(tmp_path, None, "a folder of some form"))))
    assert "step 7" in text
    assert "loss" not in text


def test_what_was_trained_names_adapters_and_sources() -> None:
    config = Config(dataset=Dataset(path="a.jsonl"), training=Training(global_batch_size=4, seq_len=64))
    shapes = {"a": torch.Size((1000, 1000)), "b": torch.Size((500,))}
    line = what_is_trained(config, 2_000_000, shapes, 30, "weights from there")
    assert line == "all of a model of 2.0 M parameters (weights from there), 30 steps of 4 rows of 64 tokens, on a.jsonl"
    mix = (MixedSource(path="a.jsonl"), MixedSource(hub="b/c"))
    config = Config(dataset=Dataset(mix=mix), lora=Lora(enable=True, use_dora=True))
    assert what_is_trained(config, 2_000_000, shapes, 3, "w").startswith("DoRA adapters of 1.00 M parameters on a model of 2.0 M")
    assert what_is_trained(config, 2_000_000, shapes, 3, "w").endswith("on a.jsonl, b/c")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with these scripts, which is the current directory."""
    root = tmp_path / "repository"
    (root / "scripts").mkdir(parents=True)
    for name in ("generate.py", "merge_adapter.py", "plot_runs.py", "../train.py"):
        (root / "scripts" / name).write_text("")
    monkeypatch.chdir(root)
    return root


def test_next_commands_name_what_is_there(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "outputs/my run"
    (folder / "export").mkdir(parents=True)
    (folder / "export/config.json").write_text("{}")
    config = Config(training=Training(epochs=3), checkpoint=Checkpoint(initial_load_path="base", enable_checkpoint=True))
    outputs = Outputs(folder, folder / "checkpoint/step-3", "a folder")
    assert next_commands(config, outputs, root=root) == {
        "talk to it": "python scripts/generate.py 'outputs/my run/export'",
        "look at the curves": "python scripts/plot_runs.py 'outputs/my run'",
        "train on": "python train.py 'outputs/my run/config.toml' --training.epochs 6",
    }
    (folder / "export/tokenizer_config.json").write_text('{"chat_template": "…"}')
    assert next_commands(config, outputs, root=root)["talk to it"].endswith("export' --chat")
    monkeypatch.setattr(sys, "executable", str(root / ".venv/bin/python"))
    assert next_commands(config, outputs, root=root)["train on"].startswith(".venv/bin/python train.py")
    adapter = Outputs(folder, adapter="the adapter")
    assert next_commands(config, adapter, root=root) == {
        "merge it": ".venv/bin/python scripts/merge_adapter.py base 'outputs/my run/adapter' 'outputs/my run/export'",
        "look at the curves": ".venv/bin/python scripts/plot_runs.py 'outputs/my run'",
    }


def test_installed_package_without_scripts_names_none(tmp_path: Path) -> None:
    assert next_commands(Config(), Outputs(tmp_path, tmp_path / "checkpoint/step-3", "a folder"), root=tmp_path / "nowhere") == {}
