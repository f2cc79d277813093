"""How many checkpoints lie on the disk at once, as a plan says it."""

import pytest

from tunelib.config.schema import Checkpoint, Config, Job, Training
from tunelib.observe.plan import GIB, describe_checkpoints


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        ({}, 11),
        ({"keep_latest_k": 2}, 3),
        ({"keep_latest_k": 2, "keep_best": True}, 4),
        ({"keep_latest_k": 2, "keep_every_n": 300}, 3 + 100 // 3),  # saved every 100 steps
        ({"keep_latest_k": 0}, 100),
    ],
)
def test_all_that_is_kept_counts(settings: dict, most: int) -> None:
    section = Checkpoint(enable_checkpoint=True, interval=100, **settings)
    config = Config(job=Job(dump_folder="outputs/planned"), training=Training(steps=10_000), checkpoint=section)
    assert f"1.00 GiB each, {most} at once at most" in describe_checkpoints(config, GIB)
