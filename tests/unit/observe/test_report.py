"""The opening lines and the summary say true numbers."""

import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from unit.samples import make_index

from tunelib.observe.report import Summary, process_age, unigram_entropy


def test_unigram_entropy_is_that_of_the_trained_labels() -> None:
    index = make_index([4, 4], trained=[[True, True, False, True], [True, False, False, False]])
    index.sources[0].marked[:] = [9, 1, 1, ~7, 2, 9, 2, ~8, ~8, ~8]  # trained labels: 1, 1, 2, and 2
    assert unigram_entropy(index, np.arange(len(index))) == pytest.approx(math.log(2))
    index.sources[0].marked[:] = 3
    assert unigram_entropy(index, np.arange(len(index))) == 0


def test_unigram_entropy_is_of_the_selected_documents_only() -> None:
    index = make_index([2, 2])
    assert unigram_entropy(index, np.arange(len(index))) == pytest.approx(math.log(4))
    assert unigram_entropy(index, np.array([0])) == pytest.approx(math.log(2))


def test_speed_is_since_the_last_call() -> None:
    summary = Summary()
    summary.add_step(100, 2.0, 1.0)
    summary.add_step(200, 1.0, 1.0)
    assert summary.speed() == {"tokens_per_second": 100.0, "seconds_per_step": 1.5}
    summary.add_step(50, 0.5, 1.0)
    assert summary.speed() == {"tokens_per_second": 100.0, "seconds_per_step": 0.5}


def test_summary_says_losses_and_where_things_lie(tmp_path: Path) -> None:
    summary = Summary()
    for step in range(20):
        summary.add_step(10, 0.1, float(step))
    for loss in (3.0, 2.5, 2.0):
        summary.add_validation(loss)
    text = "\n".join(summary.lines(20, 200, 5.0, 1.0, tmp_path, tmp_path / "checkpoint/step-20", "a folder of some form"))
    for words in (
        "step 20",
        "training loss 14.5000 (mean of the last 10 steps)",
        "validation loss 3.0000 → 2.0000",
        "100 tokens/s",
        "s in this process, the first step after ",
        "checkpoint/step-20",
        "export: a folder of some form",
    ):
        assert words in text


def test_age_of_a_process_counts_from_its_start() -> None:
    began = time.monotonic()
    before = process_age()
    time.sleep(0.3)
    after = process_age()
    assert before is not None
    assert after is not None
    assert after - before == pytest.approx(time.monotonic() - began, abs=0.05)
    program = "import time; time.sleep(0.5); from tunelib.observe.report import process_age; print(process_age())"
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert 0.5 <= float(done.stdout) <= time.monotonic() - began + 0.02


def test_finished_run_that_took_no_step_has_a_summary(tmp_path: Path) -> None:
    text = "\n".join(Summary().lines(7, 70, 0.1, 1.0, tmp_path, None, "a folder of some form"))
    assert "step 7" in text
    assert "loss" not in text
