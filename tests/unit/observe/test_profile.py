"""Phases of a step are told as they were."""

import time
from types import SimpleNamespace

from torch.profiler import ProfilerActivity, profile, record_function

from tunelib.observe.profile import covered, mark, phase_table


def test_intervals_count_once() -> None:
    assert covered([]) == 0
    assert covered([(5, 7), (0, 2), (1, 3), (1, 2)]) == 5


def test_phases_take_what_they_took() -> None:
    began = time.monotonic()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        with mark("data"):
            time.sleep(0.02)
        for _ in range(2):
            with mark("forward"):
                time.sleep(0.05)
                with record_function("gloo:all_gather"):
                    time.sleep(0.01)
        time.sleep(0.04)
        with record_function("something else"):
            pass
    spare = time.monotonic() - began - 0.18  # seconds that were not slept
    title, *rows = phase_table(7, profiled).splitlines()
    assert title.startswith("step 7: 0.")
    seconds = {row.split()[0]: float(row.split()[1]) for row in rows}
    assert list(seconds) == ["data", "forward", "rest", "communication"]
    for phase, least in {"data": 0.02, "forward": 0.12, "rest": 0.04, "communication": 0.02}.items():
        assert least <= seconds[phase] < least + spare, rows


def test_a_step_without_marks_is_all_rest() -> None:
    event = SimpleNamespace(name="aten::mm", time_range=SimpleNamespace(start=0, end=2e6))
    table = phase_table(1, SimpleNamespace(events=lambda: [event]))
    assert table.splitlines() == ["step 1: 2.000 s while profiled", "  rest              2.000 s 100.0%"]
