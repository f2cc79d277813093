"""A number that is NaN, in the loss, in a gradient of one rank, in a moment or a weight: each training.on_nonfinite does what it says."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Run, write_chats, write_toml
from crash.same import check_same_run, check_same_tensors, load_state, rows_of, step_names

pytestmark = pytest.mark.crash

SAVING = "[checkpoint]\nenable_checkpoint = true\ninterval = 2\nkeep_latest_k = 0\n"
FAULTY_STEP = 4
SEEN_IN = {"loss": 4, "gradient": 4, "weight": 4, "moment": 5}
"""The step that sees what is spoiled in step 4: a moment reaches the weights in its step, and the loss in the next."""

Train = Callable[..., tuple[Run, list[Any]]]


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def train(request: pytest.FixtureRequest, forks: Any, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Run 8 steps in a folder; the last rank spoils its numbers."""
    folder = tmp_path_factory.mktemp("runs")
    toml = write_toml(folder / "tiny.toml", write_chats(folder / "chats.jsonl", 120), SAVING)

    def train(name: str, policy: str = "stop", *words: str, what: str = "", steps: list[int] | None = None) -> tuple[Run, list[Any]]:
        words = ("--training.steps", "8", "--training.on_nonfinite", policy, *words, "--job.dump_folder", str(folder / name))
        faulty = {"fault": "spoil_numbers", "what": what, "steps": steps or [FAULTY_STEP], "at_rank": request.param - 1} if what else {}
        ended = forks.run([toml, *words], request.param, **faulty)
        assert len({each.code for each in ended}) == 1, "\n".join(f"ended with {each.code}: {each.said[-3000:]}" for each in ended)
        assert all("Traceback" not in each.said for each in ended), ended
        return Run(folder / name), ended

    return train


@pytest.fixture(scope="module")
def plain(train: Train) -> Run:
    """A run without a fault."""
    return train("plain")[0]


@pytest.fixture(scope="module")
def passed_over(train: Train) -> Callable[[int], Run]:
    """A run that passes a step over from the first, because its gradient is not finite, and never was in the state of any other."""
    runs: dict[int, Run] = {}

    def passed_over(step: int) -> Run:
        if step not in runs:
            runs[step], ended = train(f"passed over {step}", "skip", what="gradient", steps=[step])
            assert ended[0].code == 0, ended[0].said
        return runs[step]

    return passed_over


@pytest.mark.parametrize("what", SEEN_IN)
def test_stop_ends_the_run_before_weights_change_and_the_same_command_goes_on(train: Train, plain: Run, what: str) -> None:
    run, ended = train(f"stop at {what}", what=what)
    assert ended[0].code == 1
    seen_in = SEEN_IN[what]
    assert "".join(each.said for each in ended).count(f"error: step {seen_in}: loss ") == 1
    assert [row["step"] for row in run.rows()] == list(range(1, seen_in))
    check_told(run, [seen_in])
    # The moment spoils the weights in step 4, which ends as if it were good: its checkpoint counts for nothing.
    assert step_names(run) == (["step-2", "step-4"] if what == "moment" else ["step-2"])
    check_finite(run, {"step-2"})
    assert not (run.folder / "export").exists()
    _, ended = train(f"stop at {what}")
    assert ended[0].code == 0, ended[0].said
    assert ended[0].said.startswith("resuming after step 2: the newest good checkpoint")
    assert ("step 4 holds numbers that are not finite" in ended[0].said) == (what == "moment")
    check_same_run(run, plain)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_skip_leaves_the_state_as_it_was_and_goes_on(train: Train, what: str) -> None:
    run, ended = train(f"skip {what}", "skip", "--checkpoint.interval", "1", what=what)
    assert ended[0].code == 0, ended[0].said
    check_passed_over(run, [FAULTY_STEP])
    before, after = (load_state(run.folder / f"checkpoint/step-{step}") for step in (3, 4))
    check_same_tensors(after, before)
    check_finite(run, {f"step-{step}" for step in range(1, 9)})
    assert "1 of 8 steps were passed over: 4" in ended[0].said
    # What is passed over is part of the state: the same again from the checkpoint after it, without the fault.
    expected = rows_of(run)
    for step in (5, 6, 7, 8):
        (run.folder / f"checkpoint/step-{step}").rename(run.folder / f"checkpoint/other-{step}")
    _, ended = train(f"skip {what}", "skip", "--checkpoint.interval", "1")
    assert ended[0].said.startswith("resuming after step 4: ")
    assert rows_of(run) == expected
    check_same_tensors(load_state(run.folder / "checkpoint/step-8"), load_state(run.folder / "checkpoint/other-8"))


@pytest.mark.parametrize("what", ["moment", "weight"])
def test_skip_cannot_mend_weights_and_ends_at_its_limit_with_good_checkpoints_left(train: Train, plain: Run, what: str) -> None:
    run, ended = train(f"skip {what}", "skip", "--training.max_nonfinite_steps", "2", what=what)
    assert ended[0].code == 1
    first = SEEN_IN[what]
    assert f"error: step {first + 2}: loss nan" in ended[0].said
    assert "after 2 steps were passed over (training.max_nonfinite_steps)" in ended[0].said
    check_told(run, [first, first + 1, first + 2])
    check_finite(run, {"step-2"})
    assert not (run.folder / "export").exists()
    _, ended = train(f"skip {what}", "skip", "--training.max_nonfinite_steps", "2")
    assert ended[0].code == 0, ended[0].said
    assert ended[0].said.startswith("resuming after step 2: the newest good checkpoint; step ")
    check_same_run(run, plain)


@pytest.mark.parametrize("resume", ["auto", "never"])
@pytest.mark.parametrize("what", SEEN_IN)
def test_rollback_equals_a_run_that_passed_the_step_over_from_the_first(
    train: Train, passed_over: Callable[[int], Run], what: str, resume: str
) -> None:
    run, ended = train(f"roll back {what} {resume}", "rollback", "--checkpoint.resume", resume, what=what)
    assert ended[0].code == 0, ended[0].said
    assert "gone back to step 2\n" in ended[0].said
    check_told(run, [SEEN_IN[what]])
    expected = passed_over(SEEN_IN[what])
    check_passed_over(run, [SEEN_IN[what]])
    check_same_run(run, expected)
    check_finite(run, {"step-2", "step-4", "step-6", "step-8"})
    check_same_tensors(load_state(run.folder / "checkpoint/step-8"), load_state(expected.folder / "checkpoint/step-8"))


def test_rollback_waits_for_the_save_in_the_background(train: Train, passed_over: Callable[[int], Run]) -> None:
    """The newest checkpoint is that of step 4, which is being written as step 5 fails."""
    run, ended = train("background", "rollback", "--checkpoint.async_mode", "async", what="weight", steps=[5])
    assert ended[0].code == 0, ended[0].said
    assert "gone back to step 4\n" in ended[0].said
    check_same_run(run, passed_over(5))


def test_stop_waits_for_the_good_save_in_the_background(train: Train) -> None:
    run, ended = train("background stop", "stop", "--checkpoint.async_mode", "async", what="weight", steps=[7])
    assert ended[0].code == 1
    assert step_names(run) == ["step-2", "step-4", "step-6"]
    check_finite(run, {"step-2", "step-4", "step-6"})


@pytest.mark.parametrize(("policy", "what"), [("skip", "loss"), ("skip", "gradient"), ("rollback", "gradient"), ("rollback", "weight")])
def test_limit_counts_the_steps_of_the_whole_run(train: Train, policy: str, what: str) -> None:
    name = f"limit of {policy} {what}"
    run, ended = train(name, policy, "--training.max_nonfinite_steps", "2", what=what, steps=[3, 5, 7])
    assert ended[0].code == 1
    assert "error: step 7: loss " in ended[0].said
    assert "after 2 steps were passed over (training.max_nonfinite_steps)" in ended[0].said
    check_told(run, [3, 5, 7])
    assert step_names(run) == ["step-2", "step-4", "step-6"]
    _, ended = train(name, policy, "--training.max_nonfinite_steps", "2", what=what, steps=[8])
    assert ended[0].code == 1, "those of before it was resumed count too"
    assert "error: step 8: loss " in ended[0].said


def test_rollback_without_a_checkpoint_says_so(train: Train) -> None:
    run, ended = train("nothing", "rollback", what="weight", steps=[1])
    assert ended[0].code == 1
    assert "step 1: loss nan, gradient norm nan, and there is no checkpoint to go back to" in ended[0].said
    assert run.rows() == []
    assert not (run.folder / "checkpoint").exists()


@pytest.mark.parametrize("policy", ["stop", "rollback"])
def test_weight_that_no_loss_sees_does_not_leave_in_an_export(train: Train, policy: str) -> None:
    run, ended = train(f"unseen {policy}", policy, what="unused weight")
    assert ended[0].code == 1
    assert "step-8 holds numbers that are not finite, and counts for nothing" in ended[0].said
    assert not (run.folder / "export").exists()


def check_passed_over(run: Run, steps: list[int]) -> None:
    """Rows of all steps, the state, and the numbers of all others are finite."""
    assert [row["step"] for row in run.rows()] == list(range(1, 9))
    assert [row["step"] for row in run.rows() if "passed_over" in row] == steps
    assert json.loads((run.folder / "checkpoint/step-8/state.json").read_text())["passed_over"] == steps
    assert all(torch.isfinite(weight).all() for weight in run.weights().values())


def check_told(run: Run, steps: list[int]) -> None:
    """The steps whose numbers were not finite, with their documents."""
    rows = [json.loads(line) for line in (run.folder / "nonfinite.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == steps
    assert all("nan" in (row["loss"], row["grad_norm"]) for row in rows)
    assert all("chats.jsonl" in document for row in rows for document in row["documents"])


def check_finite(run: Run, names: set[str]) -> None:
    """Exactly these checkpoints hold finite numbers, and each says of itself whether it does."""
    finite = set()
    for name in step_names(run):
        folder = run.folder / "checkpoint" / name
        is_finite = all(torch.isfinite(tensor).all() for tensor in load_state(folder).values() if tensor.is_floating_point())
        assert json.loads((folder / "manifest.json").read_text())["finite"] == is_finite
        finite |= {name} if is_finite else set()
    assert finite == names
