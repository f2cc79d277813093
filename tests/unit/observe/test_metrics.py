"""metrics.jsonl holds each step once, floats at full precision; a resumed run goes on after its step."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tunelib.observe.metrics import RowWriter


def write_rows(path: Path, rows: list[dict[str, Any]], resumed_step: int | None = None) -> None:
    with RowWriter(path, resumed_step, active=True) as writer:
        for row in rows:
            writer.write(row)


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


STEPS = [{"step": step, "loss": 1 / step} for step in (1, 2, 3, 4)]


def test_floats_keep_every_bit(tmp_path: Path) -> None:
    values = [0.1 + 0.2, 1e-300, math.pi, 5e-324]
    write_rows(tmp_path / "metrics.jsonl", [{"step": number, "loss": value} for number, value in enumerate(values)])
    assert [row["loss"] for row in read_rows(tmp_path / "metrics.jsonl")] == values


def test_row_is_on_disk_at_once(tmp_path: Path) -> None:
    with RowWriter(tmp_path / "metrics.jsonl", None, active=True) as writer:
        writer.write(STEPS[0])
        assert read_rows(tmp_path / "metrics.jsonl") == STEPS[:1]


def test_resumed_run_cuts_the_rows_that_it_will_make_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_rows(path, STEPS)
    write_rows(path, [{"step": 3, "loss": 9.0}], resumed_step=2)
    assert read_rows(path) == [*STEPS[:2], {"step": 3, "loss": 9.0}]


def test_validation_that_is_made_again_leaves_no_earlier_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    looks = [{"step": 2, "validation_loss": 1.0}, {"step": 2, "tasks/some/acc": 0.5}]
    rows = [{"step": 1, "lr": 1.0}, {"step": 1, "validation_loss": 2.0}, {"step": 2, "lr": 1.0}, *looks]
    write_rows(path, rows)
    write_rows(path, [], resumed_step=2)
    assert read_rows(path) == rows
    with RowWriter(path, 2, active=True, is_revalidated=True) as writer:
        writer.write(looks[0])
    assert read_rows(path) == [*rows[:3], looks[0]]


def test_fresh_run_begins_the_file_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_rows(path, STEPS)
    write_rows(path, STEPS[:1])
    assert read_rows(path) == STEPS[:1]


@pytest.mark.parametrize("rest", ['{"step": 3, "lo', '{"step": 3', "\0\0\0\0", "{}", "[]", "null"])
def test_line_that_a_crash_cut_off_is_dropped(tmp_path: Path, rest: str) -> None:
    path = tmp_path / "metrics.jsonl"
    write_rows(path, STEPS[:2])
    path.write_text(path.read_text() + rest)
    write_rows(path, STEPS[2:], resumed_step=2)
    assert read_rows(path) == STEPS


@pytest.mark.parametrize("text", ["a\nb", "a\u2028b", "a\x85b", "a\x0cb", "日本 🙂"], ids=ascii)
def test_answer_may_hold_any_character(tmp_path: Path, text: str) -> None:
    path = tmp_path / "samples.jsonl"
    rows = [{"step": 0, "answer": text}, {"step": 5, "answer": text}]
    write_rows(path, rows[:1])
    write_rows(path, rows[1:], resumed_step=3)
    assert read_rows(path) == rows


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with RowWriter(tmp_path / "metrics.jsonl", None, active=False) as writer:
        writer.write(STEPS[0])
    assert list(tmp_path.iterdir()) == []
