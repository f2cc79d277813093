"""The opening lines say true numbers."""

import math
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT
from unit.samples import make_index

from tunelib.observe.report import process_age, unigram_entropy


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
