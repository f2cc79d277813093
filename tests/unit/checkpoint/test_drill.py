"""What a drill compares, and when it is not content: a comparison that lets a difference pass would prove nothing."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tunelib.batch import IGNORED
from tunelib.checkpoint.dcp_writer import save_tensors
from tunelib.checkpoint.drill import FEWEST_STEPS, find_other_number, needed_settings, save_interval, tail_of, verdict_lines
from tunelib.checkpoint.drill_traces import (
    BATCHES,
    LIMITS,
    LOSS,
    OPTIMIZER,
    RANDOM_STATE,
    WEIGHTS,
    Comparison,
    Trace,
    compare_steps,
    compare_tensors,
    group_names,
    merge_batches,
    read_lines,
    relative_difference,
    table_lines,
    tensor_difference,
)
from tunelib.checkpoint.drill_worker import digest_row, holds_data, kill_in_a_save
from tunelib.config.fields import FIELDS

STATE = {"w": torch.tensor([1.0, 2.0]), "optimizer.w.step": torch.tensor(6.0), "rng.0.cpu": torch.arange(5, dtype=torch.uint8)}


def make_trace(**changes: Any) -> Trace:
    """A run of three steps; ``changes`` are columns of its second row."""
    rows = [{"step": step, "loss": 1.0 / step, "grad_norm": 0.5, "lr": 1e-3, "tokens": 10 * step} for step in (1, 2, 3)]
    rows[1].update(changes)
    return Trace(rows, {step: [f"a{step}", f"b{step}"] for step in (1, 2, 3)}, Path("nowhere"))


def compare(found: Trace, **limits: float) -> Comparison:
    comparison = Comparison("resumed", range(2, 4), limits)
    compare_steps(make_trace(), found, comparison)
    return comparison


def test_same_runs_are_equal() -> None:
    comparison = compare(make_trace())
    assert comparison.faults == []
    assert set(comparison.differences.values()) == {0.0}


@pytest.mark.parametrize(
    ("column", "value", "named"), [("loss", 0.5000001, "loss of step 2"), ("lr", 2e-3, "lr of"), ("tokens", 21, "tokens of"), ("loss", None, "None")]
)
def test_one_other_number_is_a_fault_and_is_named(column: str, value: float, named: str) -> None:
    (fault,) = compare(make_trace(**{column: value})).faults
    assert named in fault


def test_limit_lets_rounding_pass_and_nothing_more() -> None:
    assert compare(make_trace(loss=0.50000001), **{LOSS: 1e-6}).faults == []
    (fault,) = compare(make_trace(loss=0.501), **{LOSS: 1e-6}).faults
    assert fault == "loss of step 2 is 0.501 instead of 0.5 (relative difference 2.0e-03, at most 1e-06)"
    assert compare(make_trace(loss=math.nan), **{LOSS: 1e-6}).faults != []
    assert compare(make_trace(tokens=21), **{LOSS: 1e-6}).faults != []


def test_steps_outside_of_the_comparison_are_not_looked_at() -> None:
    found = make_trace()
    found.rows[0]["loss"] = 7.0
    assert compare(found).faults == []


def test_other_rows_and_missing_ones_are_faults() -> None:
    found = make_trace()
    found.batches[3] = ["a3", "c3"]
    assert compare(found).faults == ["step 3 trained on other rows"]
    del found.batches[3]
    assert compare(found).differences[BATCHES] == math.inf


@pytest.mark.parametrize(
    ("one", "other", "difference"), [(1.0, 1.0, 0), (None, None, 0), (1.0, None, math.inf), (math.nan, 1.0, math.inf), (1.0, -1.0, 2)]
)
def test_relative_difference(one: float | None, other: float | None, difference: float) -> None:
    assert relative_difference(one, other) == difference


def test_difference_of_tensors_is_relative_to_their_way() -> None:
    one = torch.tensor([0.0, 3.0, 4.0])
    assert tensor_difference(one, one.clone()) == 0
    assert tensor_difference(one, torch.tensor([0.0, 3.0, 4.5])) == pytest.approx(0.1)
    assert tensor_difference(one, torch.tensor([0.0, 3.0, 4.5]), begin=torch.tensor([0.0, 3.0, 3.5])) == pytest.approx(1.0)
    assert tensor_difference(one, one.double()) == math.inf
    assert tensor_difference(one, torch.tensor([0.0, 3.0, math.nan])) == math.inf
    assert tensor_difference(torch.tensor([1, 2]), torch.tensor([1, 3])) == math.inf
    assert tensor_difference(one, one + 1e-3, begin=one) == math.inf, "it should not have moved at all"


@pytest.mark.parametrize(
    ("name", "kind"), [("w", WEIGHTS), ("optimizer.w.step", OPTIMIZER), ("rng.0.cpu", RANDOM_STATE)], ids=["weight", "moment", "random state"]
)
def test_every_kind_of_tensor_is_compared(tmp_path: Path, name: str, kind: str) -> None:
    save_tensors(STATE, tmp_path / "one")
    save_tensors(STATE | {name: STATE[name] + 1}, tmp_path / "other")
    save_tensors(STATE | {"w": torch.zeros(2)}, tmp_path / "begin")
    comparison = Comparison("resumed", range(1, 2))
    compare_tensors(tmp_path / "one", tmp_path / "other", tmp_path / "begin", comparison, same_layout=True)
    assert comparison.faults == [f"{name} of the last checkpoint differs"]
    assert [found for found, difference in comparison.differences.items() if difference] == [kind]
    on_another = Comparison("resumed", range(1, 2), LIMITS["float32"])
    compare_tensors(tmp_path / "one", tmp_path / "other", tmp_path / "begin", on_another, same_layout=False)
    assert bool(on_another.faults) == (kind != RANDOM_STATE)


def test_tensor_that_is_missing_is_a_fault(tmp_path: Path) -> None:
    save_tensors(STATE, tmp_path / "one")
    save_tensors({name: tensor for name, tensor in STATE.items() if name != "optimizer.w.step"}, tmp_path / "other")
    comparison = Comparison("resumed", range(1, 2))
    compare_tensors(tmp_path / "one", tmp_path / "other", tmp_path / "one", comparison, same_layout=True)
    assert "optimizer.w.step is in one of" in comparison.faults[0]


def test_groups_hold_every_name_once() -> None:
    sizes = {"a": 1 << 27, "b": 1 << 27, "c": 1, "d": 1 << 30, "e": 5}
    assert list(group_names(sizes)) == [["a", "b"], ["c", "d"], ["e"]]
    assert list(group_names({})) == []


def write_batches(place: Path, rank: int, lines: list[tuple[int, int, list[str]]]) -> None:
    place.mkdir(exist_ok=True)
    text = "".join(json.dumps({"step": step, "share": share, "rows": rows}) + "\n" for step, share, rows in lines)
    (place / f"batches-{rank}.jsonl").write_text(text)


def test_rows_of_a_step_are_the_same_on_any_number_of_processes(tmp_path: Path) -> None:
    write_batches(tmp_path / "one", 0, [(1, 0, ["a", "b", "c", "a"])])
    write_batches(tmp_path / "two", 0, [(1, 0, ["a", "b"])])
    write_batches(tmp_path / "two", 1, [(1, 1, ["c", "a"])])
    for rank in range(2):  # two that work on the same rows, as with split products
        write_batches(tmp_path / "split", rank, [(1, 0, ["a", "b", "c", "a"])])
    write_batches(tmp_path / "lost", 0, [(1, 0, ["a", "b"])])
    expected = {1: ["a", "a", "b", "c"]}
    assert [merge_batches(tmp_path / name) for name in ("one", "two", "split")] == [expected] * 3
    assert merge_batches(tmp_path / "lost") != expected
    write_batches(tmp_path / "split", 1, [(1, 0, ["a", "b", "c", "d"])])
    assert merge_batches(tmp_path / "split") == {1: ["two processes of share 0 took different rows"]}


def test_line_that_a_kill_has_cut_off_is_the_last_one(tmp_path: Path) -> None:
    (tmp_path / "cut.jsonl").write_text('{"step": 1}\n{"st')
    assert list(read_lines(tmp_path / "cut.jsonl")) == [{"step": 1}]
    assert list(read_lines(tmp_path / "none.jsonl")) == []


def test_digest_of_a_row_depends_on_all_of_it_but_the_padding() -> None:
    tokens, labels, positions = torch.tensor([5, 6, 0, 7]), torch.tensor([6, IGNORED, 7, 8]), torch.tensor([0, 1, 0, 1])
    digest = digest_row(tokens, labels, positions)
    padded = (torch.cat((part, torch.tensor(fill))) for part, fill in ((tokens, [0, 0]), (labels, [IGNORED] * 2), (positions, [0, 1])))
    assert digest_row(*padded) == digest
    for place in range(3):
        changed = [part.clone() for part in (tokens, labels, positions)]
        changed[place][1] += 1
        assert digest_row(*changed) != digest
    assert len({digest_row(*[part[:length] for part in (tokens, labels, positions)]) for length in range(5)}) == 5


def test_only_a_file_of_the_folder_that_holds_bytes_is_in_the_midst_of_being_written(tmp_path: Path) -> None:
    (tmp_path / "staging").mkdir()
    for name, content, expected in (("staging/data", b"x", True), ("staging/empty", b"", False), ("beside", b"x", False)):
        with open(tmp_path / name, "wb") as file:
            file.write(content)
            file.flush()
            assert holds_data(file.fileno(), tmp_path / "staging") == expected, name
    descriptor = os.open(tmp_path / "staging", os.O_RDONLY)
    assert not holds_data(descriptor, tmp_path / "staging")
    os.close(descriptor)


def test_every_other_fsync_is_one(tmp_path: Path) -> None:
    synced: list[int] = []
    with open(tmp_path / "beside", "wb") as file:
        kill_in_a_save(synced.append, tmp_path / "staging", tmp_path)(file.fileno())
        assert synced == [file.fileno()]


def test_other_number_of_processes_is_half_or_one_that_works() -> None:
    def takes(*numbers: int) -> Any:
        return lambda number: "" if number in numbers else f"not {number}"

    assert find_other_number(1, 2, takes(1, 2)) == (2, "")
    assert find_other_number(8, 16, takes(4, 8)) == (4, "")
    assert find_other_number(8, 16, takes(8, 16)) == (16, "not 4")
    assert find_other_number(4, 8, takes(4)) == (0, "not 2")
    assert find_other_number(1, 1, takes(1, 2)) == (0, "this machine has room for 1")


@pytest.mark.parametrize("steps", range(FEWEST_STEPS, 20))
def test_there_is_a_save_before_the_one_that_is_killed_and_a_step_after_it(steps: int) -> None:
    interval = save_interval(steps)
    assert interval >= 1
    assert 2 * interval < steps
    assert needed_settings(steps).keys() <= FIELDS.keys()


def test_table_has_a_line_for_each_comparison_and_for_what_was_allowed() -> None:
    same, other = compare(make_trace()), compare(make_trace(loss=0.50000001), **{LOSS: 1e-6})
    lines = table_lines([same, other])
    assert [line.split()[:2] for line in lines] == [["steps", "batches"], ["resumed", "2–3"], ["resumed", "2–3"], ["at", "most"]]
    assert "2.0e-08" in lines[2]
    assert "DIFFERENT" in table_lines([compare(make_trace(loss=None))])[1]


def test_verdict_names_the_first_fault_and_a_run_that_is_not_the_same_twice() -> None:
    good, bad = compare(make_trace()), compare(make_trace(loss=1.0, lr=2.0))
    assert verdict_lines([good, good]) == ["verdict: this run comes back"]
    assert verdict_lines([good, bad]) == [
        "  resumed: loss of step 2 is 1.0 instead of 0.5",
        "verdict: it does NOT come back: resumed: lr of step 2 is 2.0 instead of 0.001",
    ]
    assert "it cannot be told" in verdict_lines([bad, good])[-1]


def test_end_of_what_a_run_said_is_shown(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("".join(f"line {number}\n" for number in range(100)))
    assert tail_of(log).endswith("line 99")
    assert "line 10\n" not in tail_of(log)
    log.write_text("")
    assert tail_of(log) == f"{log} is empty"
