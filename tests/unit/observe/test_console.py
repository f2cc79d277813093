"""One rank speaks; without a terminal each logged step is a plain line."""

import pytest

from tunelib.observe.console import Console

ROW = {"step": 5, "loss": 1.23456, "grad_norm": 0.5, "lr": 1e-3, "tokens_per_second": 1234.5, "memory_gib": 0.25, "seconds_per_step": 2.0}


def test_logged_step_is_a_line_with_everything_to_watch(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(active=True)
    console.start_steps(1805, 0)
    console.step(ROW)
    console.end_steps()
    out = capsys.readouterr().out
    for words in ("step    5/1805", "loss 1.2346", "grad norm 0.500", "1,234 tokens/s", "0.25 GiB", "lr 1.00e-03", "ETA 1:00:00"):
        assert words in out
    assert out.count("\n") == 1


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(active=False)
    console.say("hello")
    console.start_steps(10, 0)
    console.step(ROW)
    console.end_steps()
    assert capsys.readouterr().out == ""
