"""A run folder is read as it is, also while the run goes on; what is none is said."""

from pathlib import Path

import pytest
from unit.observe.readers import read_jsonl, series_of, write_run

from tunelib.errors import ConfigError, DataError
from tunelib.observe.runs import differing_settings, load_runs


def test_series_are_those_of_metrics_jsonl(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "one", 40)
    (run,) = load_runs([folder])
    assert run.series == series_of(read_jsonl(folder / "metrics.jsonl"))
    assert (run.last_step, run.settings["training.steps"], len(run.samples)) == (40, 40, 2)


def test_row_that_is_being_written_is_left_out_and_numbers_that_are_not_finite_too(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "one", 3)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "loss": NaN, "lr": 0.5}\n{"step": 5, "lo')
    (run,) = load_runs([folder])
    assert run.series["lr"][-1] == (4, 0.5)
    assert run.series["loss"][-1][0] == 3


@pytest.mark.parametrize("line", ["{nonsense", "[1]", '{"loss": 1}', '{"step": "x"}', '{"step": -1}', "\0\0\0"])
def test_line_that_is_no_row_is_named(tmp_path: Path, line: str) -> None:
    folder = write_run(tmp_path / "one", 3)
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(f"{line}\n{text}")
    with pytest.raises(DataError, match=r"metrics.jsonl:1: is no row .* else remove that line"):
        load_runs([folder])


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "outputs/one", 3)
    with pytest.raises(ConfigError, match=r"nowhere is no run folder: it has no metrics.jsonl; give a run's folder"):
        load_runs([tmp_path / "nowhere"])
    with pytest.raises(ConfigError, match=f"did you mean {folder}"):
        load_runs([tmp_path / "outputs"])
    with pytest.raises(ConfigError, match="is given twice"):
        load_runs([folder, tmp_path / "outputs/../outputs/one"])
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(DataError, match="has no rows yet"):
        load_runs([folder])


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    runs = load_runs([write_run(tmp_path / "a/run", 3), write_run(tmp_path / "b/run", 3)])
    assert [run.name for run in runs] == ["a/run", "b/run"]


def test_differing_settings_are_those_that_differ(tmp_path: Path) -> None:
    runs = load_runs([write_run(tmp_path / "a", 3), write_run(tmp_path / "b", 3, **{"optimizer.lr": 2e-3, "training.seq_len": 64})])
    assert differing_settings(runs) == [("optimizer.lr", [1e-3, 2e-3]), ("training.seq_len", [None, 64])]
