"""A disk that is full, fails or is slow: the older checkpoint stays, the user is told, training goes on, and nothing hangs."""

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Run, write_chats, write_toml
from forks import Forks

pytestmark = pytest.mark.crash
SAVING = "[checkpoint]\nenable_checkpoint = true\ninterval = 2\nkeep_latest_k = 0\n"


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """A run of eight steps of a small model."""
    toml = write_toml(tmp_path / "tiny.toml", write_chats(tmp_path / "chats.jsonl", 120), SAVING)
    return [str(toml), "--model.num_hidden_layers", "1", "--training.steps", "8"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of four mebibytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("a tmpfs can be mounted by root alone")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def steps_of(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoint").iterdir())


def fill(disk: Path, leave: int) -> Path:
    """Fill a disk but for some bytes."""
    ballast = disk / "ballast"
    with open(ballast, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize - leave)
    return ballast


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_full_disk_is_told_and_borne_and_training_goes_on(words: list[str], forks: Forks, small_disk: Path, mode: str, world_size: int) -> None:
    """It is full when the first checkpoint is written, and has room again before the last."""
    folder = small_disk / "run"
    ballast = fill(small_disk, leave=300_000)  # a checkpoint takes about 600,000
    words += ["--checkpoint.async_mode", mode, "--checkpoint.export_dtype", "float32", "--job.dump_folder", str(folder)]
    first, *others = forks.run(words, world_size, fault="room_again", step=6, ballast=str(ballast))
    assert [first.code, *(ended.code for ended in others)] == [0] * world_size, first.said
    assert "NOT SAVED (2 in a row; checkpoint.max_failed_saves = 2)" in first.said
    assert "No space left on device" in first.said
    assert "Traceback" not in first.said
    assert steps_of(folder) == ["step-6", "step-8"]
    assert [row["step"] for row in Run(folder).rows()] == list(range(1, 9))


def test_disk_that_stays_full_ends_the_run_and_the_older_checkpoint_stays(words: list[str], forks: Forks, small_disk: Path) -> None:
    folder = small_disk / "run"
    words += ["--job.dump_folder", str(folder)]
    (ended,) = forks.run(words, fault="no_room_from", step=4, disk=str(small_disk), leave=200_000)
    assert ended.code == 1
    assert ended.said.count("NOT SAVED") == 2, ended.said
    assert "step-8 cannot be written" in ended.said
    assert "Traceback" not in ended.said
    assert steps_of(folder) == ["step-2"]
    (small_disk / "ballast").unlink()
    (ended,) = forks.run(words)
    assert ended.code == 0, ended.said
    assert "resuming after step 2" in ended.said
    assert steps_of(folder) == ["step-2", "step-4", "step-6", "step-8"]


def test_metrics_wait_for_room(words: list[str], forks: Forks, small_disk: Path) -> None:
    """Not a byte is free from step 3 to 60: the rows are written when there is room."""
    folder = small_disk / "run"
    words = [*words[:-1], "64", "--checkpoint.no-enable_checkpoint", "--job.dump_folder", str(folder)]
    (ended,) = forks.run(words, fault="no_room_from", step=3, until=60, disk=str(small_disk), leave=0)
    assert ended.code == 0, ended.said
    assert ended.said.count("metrics.jsonl cannot be written: No space left on device; its rows are kept, and written later") == 1
    assert [row["step"] for row in Run(folder).rows()] == list(range(1, 65))


@pytest.mark.parametrize("world_size", [1, 2])
def test_export_to_a_full_disk_says_so_and_leaves_what_was_there(words: list[str], forks: Forks, small_disk: Path, world_size: int) -> None:
    folder = small_disk / "run"
    words += ["--job.dump_folder", str(folder)]
    for ended in forks.run(words, world_size):
        assert ended.code == 0, ended.said
    before = {path.name: path.read_bytes() for path in (folder / "export").iterdir()}
    words += ["--checkpoint.no-enable_checkpoint", "--optimizer.lr", "0.1"]
    first, *others = forks.run(words, world_size, fault="no_room_from", step=8, disk=str(small_disk), leave=30_000)
    assert all(ended.code == 1 for ended in (first, *others)), first.said
    assert "No space left on device" in first.said
    assert "Traceback" not in first.said
    assert {path.name: path.read_bytes() for path in (folder / "export").iterdir()} == before
    assert not [path for path in folder.iterdir() if path.name.startswith(".export")]
    (small_disk / "ballast").unlink()
    for ended in forks.run(words, world_size):
        assert ended.code == 0, ended.said
    assert {path.name: path.read_bytes() for path in (folder / "export").iterdir()} != before


@pytest.mark.parametrize(("world_size", "rank"), [(1, 0), (2, 0), (2, 1)])
@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_errors_of_the_disk_in_a_save_are_told_and_borne(
    tmp_path: Path, words: list[str], forks: Forks, mode: str, world_size: int, rank: int
) -> None:
    """EIO of a single write, fsync, new file or rename; whichever it is, the next save holds what it should, and no rank waits for another."""
    whole = tmp_path / "whole"
    words += ["--checkpoint.async_mode", mode]
    for ended in forks.run([*words, "--job.dump_folder", whole], world_size):
        assert ended.code == 0, ended.said
    for kind in "wfcr" if rank == 0 else "wfc":
        folder = tmp_path / f"run-{kind}"
        how = {"under": str(folder / "checkpoint"), "kinds": kind, "error": errno.EIO}
        first, *others = forks.run([*words, "--job.dump_folder", folder], world_size, fault="disk_in_save", step=4, at_rank=rank, **how)
        assert [first.code, *(ended.code for ended in others)] == [0] * world_size, first.said
        assert "NOT SAVED (1 in a row; checkpoint.max_failed_saves = 2)" in first.said
        assert "Input/output error" in first.said
        assert steps_of(folder) == ["step-2", "step-6", "step-8"]
        assert Run(folder).series("loss") == Run(whole).series("loss")


@pytest.mark.parametrize(("world_size", "mode"), [(1, "async"), (2, "disabled")])
def test_error_of_any_single_change_in_a_save(tmp_path: Path, words: list[str], forks: Forks, world_size: int, mode: str) -> None:
    """Every seventh change of a save and the rotation after it fails once: the run ends well, and its last checkpoint is good."""
    words += ["--checkpoint.async_mode", mode, "--checkpoint.keep_latest_k", "1"]
    counted = tmp_path / "count"
    for change in range(1, 500, 7):
        folder = tmp_path / f"run-{change}"
        how = {"under": str(folder / "checkpoint"), "kinds": "wfcrmu", "first": change, "last": change, "error": errno.EIO, "counted": str(counted)}
        first, *others = forks.run([*words, "--job.dump_folder", folder], world_size, fault="disk_in_save", step=4, **how)
        assert [first.code, *(ended.code for ended in others)] == [0] * world_size, first.said
        assert steps_of(folder) in (["step-8"], [".step-2.tunelib-removed", "step-8"], ["step-4", "step-8"])
        (again, *_) = forks.run([*words, "--job.dump_folder", folder, "--checkpoint.resume", "must"], world_size)
        assert "finished at step 8" in again.said
        if int(counted.read_text()) < change:
            assert change > 50
            break
        assert "Input/output error" in first.said


@pytest.mark.parametrize("kind", ["u", "d"])
def test_error_in_the_rotation_leaves_the_new_checkpoint_good(tmp_path: Path, words: list[str], forks: Forks, kind: str) -> None:
    folder = tmp_path / "run"
    words += ["--checkpoint.keep_latest_k", "1", "--job.dump_folder", str(folder)]
    how = {"under": str(folder / "checkpoint"), "kinds": kind, "error": errno.EIO}
    (ended,) = forks.run(words, fault="disk_in_save", step=4, **how)
    assert ended.code == 0, ended.said
    assert "Input/output error" in ended.said
    assert "NOT SAVED" not in ended.said
    assert [name for name in steps_of(folder) if not name.startswith(".")] == ["step-8"]


def test_slow_disk_of_one_rank_changes_nothing(tmp_path: Path, words: list[str], forks: Forks) -> None:
    for mode, wait in (("disabled", 0.0), ("disabled", 0.005), ("async", 0.005)):
        folder = tmp_path / f"{mode}-{wait}"
        slow = {"fault": "disk_in_save", "step": 4, "at_rank": 1, "under": str(folder / "checkpoint"), "wait": wait}
        for ended in forks.run([*words, "--checkpoint.async_mode", mode, "--job.dump_folder", folder], 2, **slow):
            assert ended.code == 0, ended.said
        assert steps_of(folder) == ["step-2", "step-4", "step-6", "step-8"]
        assert Run(folder).series("loss") == Run(tmp_path / "disabled-0.0").series("loss")
