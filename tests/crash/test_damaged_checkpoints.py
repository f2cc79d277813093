"""Faults on a committed checkpoint: each is found, and the file named; the run goes on from the newest good step, and ends as if nothing had been."""

import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import Run, write_chats, write_toml
from crash.same import check_same_run, check_same_tensors, load_state, step_names

from tunelib import files
from tunelib.checkpoint.manager import CheckpointManager
from tunelib.config.schema import Checkpoint

pytestmark = pytest.mark.crash

SAVING = """
[checkpoint]
enable_checkpoint = true
interval = 2
keep_latest_k = 0
[validation]
enable = true
fraction = 0.1
freq = 4
"""
STEPS = ["--training.steps", "8"]
SHARD = "__0_0.distcp"
CHANCE = random.Random(6)


@dataclass(frozen=True)
class Runs:
    """An uninterrupted run of 8 steps, and the folder of one that was killed after it had saved step 6."""

    forks: Any
    world_size: int
    toml: Path
    whole: Run
    killed: Path

    def go_on(self, folder: Path, *words: str, **faulty: Any) -> list[Any]:
        """The same command on a run folder."""
        return self.forks.run([self.toml, *STEPS, "--job.dump_folder", folder, *words], self.world_size, **faulty)


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def runs(request: pytest.FixtureRequest, forks: Any, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    toml = write_toml(folder / "tiny.toml", write_chats(folder / "chats.jsonl", 120), SAVING)
    runs = Runs(forks, request.param, toml, Run(folder / "whole"), folder / "killed")
    assert {ended.code for ended in runs.go_on(runs.whole.folder)} == {0}
    killed = runs.go_on(runs.killed, fault="signal_at", call="train.train_step", count=7, number=signal.SIGKILL)
    assert {ended.code for ended in killed} == {-signal.SIGKILL}
    assert step_names(Run(runs.killed)) == ["step-2", "step-4", "step-6"]
    return runs


def flip(path: Path, bit: int | None = None) -> None:
    """Change one bit of a file, by default one in its midst."""
    content = bytearray(path.read_bytes())
    bit = len(content) * 4 if bit is None else bit
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def zero_page(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(4096)
        file.write(bytes(4096))


def take_from_step_4(name: str) -> Callable[[Path], object]:
    return lambda step: shutil.copy(step.with_name("step-4") / name, step / name)


def rename_step_4(step: Path) -> None:
    shutil.rmtree(step)
    shutil.copytree(step.with_name("step-4"), step)


def take_permissions(name: str = "") -> Callable[[Path], object]:
    return lambda step: (step / name).chmod(0)


# What is done to the folder of step 6, and the file that is named.
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "flip in a shard": (lambda step: flip(step / SHARD), SHARD),
    "flip in .metadata": (lambda step: flip(step / ".metadata"), ".metadata"),
    "flip in config.toml": (lambda step: flip(step / "config.toml"), "config.toml"),
    "flip in config.json": (lambda step: flip(step / "config.json"), "config.json"),
    "flip in state.json": (lambda step: flip(step / "state.json"), "state.json"),
    "zeroed page": (lambda step: zero_page(step / SHARD), SHARD),
    "one byte less": (lambda step: os.truncate(step / SHARD, (step / SHARD).stat().st_size - 1), SHARD),
    "empty shard": (lambda step: os.truncate(step / SHARD, 0), SHARD),
    "one byte more": (lambda step: os.truncate(step / SHARD, (step / SHARD).stat().st_size + 1), SHARD),
    "missing shard": (lambda step: (step / SHARD).unlink(), SHARD),
    "missing .metadata": (lambda step: (step / ".metadata").unlink(), ".metadata"),
    "missing state.json": (lambda step: (step / "state.json").unlink(), "state.json"),
    "shard of another step": (take_from_step_4(SHARD), SHARD),
    "state of another step": (take_from_step_4("state.json"), "state.json"),
    "old metadata over new shards": (take_from_step_4(".metadata"), ".metadata"),
    "old good manifest": (take_from_step_4(files.MANIFEST), files.MANIFEST),
    "whole folder of another step": (rename_step_4, files.MANIFEST),
    "empty manifest": (lambda step: os.truncate(step / files.MANIFEST, 0), files.MANIFEST),
    "half a manifest": (lambda step: os.truncate(step / files.MANIFEST, 300), files.MANIFEST),
    "garbage for a manifest": (lambda step: (step / files.MANIFEST).write_bytes(CHANCE.randbytes(500)), files.MANIFEST),
    "another JSON for a manifest": (lambda step: (step / files.MANIFEST).write_text('{"format": 2, "files": {}}'), files.MANIFEST),
    "missing manifest": (lambda step: (step / files.MANIFEST).unlink(), files.MANIFEST),
    "flip of what the manifest says": (lambda step: flip(step / files.MANIFEST, bit_of_number(step)), files.MANIFEST),
    "shard without permissions": (take_permissions(SHARD), SHARD),
    "manifest without permissions": (take_permissions(files.MANIFEST), files.MANIFEST),
    "folder without permissions": (take_permissions(), files.MANIFEST),
}


def bit_of_number(step: Path) -> int:
    """The bit that makes step 6 step 7."""
    before, _ = (step / files.MANIFEST).read_bytes().split(b"6,", 1)
    assert before.endswith(b'"step": ')
    return 8 * len(before)


def bytes_of(path: Path) -> Any:
    """What a file or folder holds, whatever its permissions, which stay."""
    mode = path.stat().st_mode
    path.chmod(mode | 0o700)
    content = {child.name: bytes_of(child) for child in path.iterdir()} if path.is_dir() else path.read_bytes()
    path.chmod(mode)
    return content


def copy_killed(runs: Runs, tmp_path: Path) -> Run:
    return Run(Path(shutil.copytree(runs.killed, tmp_path / "run")))


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_step_is_named_and_kept_and_the_run_ends_as_if_nothing_had_been(runs: Runs, tmp_path: Path, fault: str) -> None:
    run = copy_killed(runs, tmp_path)
    damage, name = FAULTS[fault]
    step = run.folder / "checkpoint/step-6"
    damage(step)
    damaged = bytes_of(step)
    ended = runs.go_on(run.folder, fault="leave_permissions_to_files")
    assert [each.code for each in ended] == [0] * runs.world_size, ended[0].said
    first_line = ended[0].said.split("\n")[0]
    assert first_line.startswith("resuming after step 4: the newest good checkpoint; step 6 is damaged (")
    assert str(step / name) in first_line
    assert first_line.endswith(" and is now step-6.damaged-0")
    assert bytes_of(run.folder / "checkpoint/step-6.damaged-0") == damaged
    check_same_run(run, runs.whole)
    assert step_names(run) == ["step-2", "step-4", "step-6", "step-6.damaged-0", "step-8"]
    assert find_faults(run, 6) == []
    check_same_tensors(load_state(step), load_state(runs.whole.folder / "checkpoint/step-6"))


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_step_that_is_asked_for_is_an_error_and_all_stays_as_it_is(runs: Runs, tmp_path: Path, fault: str) -> None:
    run = copy_killed(runs, tmp_path)
    damage, name = FAULTS[fault]
    damage(run.folder / "checkpoint/step-6")
    before = bytes_of(run.folder)
    ended = runs.go_on(run.folder, "--checkpoint.load_step", "6", fault="leave_permissions_to_files")
    assert [each.code for each in ended] == [2] * runs.world_size
    assert ended[0].said.startswith(f"error: {run.folder / 'checkpoint/step-6' / name} ")
    assert all("Traceback" not in each.said for each in ended)
    assert bytes_of(run.folder) == before


def test_two_damaged_steps_at_once_are_both_named(runs: Runs, tmp_path: Path) -> None:
    run = copy_killed(runs, tmp_path)
    last_shard = f"__{runs.world_size - 1}_0.distcp"
    flip(run.folder / "checkpoint/step-4" / last_shard)
    flip(run.folder / "checkpoint/step-6" / last_shard)
    ended = runs.go_on(run.folder)
    assert [each.code for each in ended] == [0] * runs.world_size, ended[0].said
    first_line = ended[0].said.split("\n")[0]
    assert first_line.startswith("resuming after step 2: ")
    assert all(f"checkpoint/step-{step}/{last_shard} is damaged" in first_line for step in (4, 6))
    check_same_run(run, runs.whole)
    assert step_names(run) == ["step-2", "step-4", "step-4.damaged-0", "step-6", "step-6.damaged-0", "step-8"]


def test_all_steps_damaged_is_an_error_that_changes_nothing(runs: Runs, tmp_path: Path) -> None:
    """Nobody wants hours of training begun anew because of permissions, say; whoever does can say so."""
    run = copy_killed(runs, tmp_path)
    for step in (2, 4, 6):
        flip(run.folder / f"checkpoint/step-{step}/.metadata")
    before = bytes_of(run.folder)
    ended = runs.go_on(run.folder)
    assert [each.code for each in ended] == [2] * runs.world_size, ended[0].said
    assert "holds no good checkpoint; nothing was changed:" in ended[0].said
    assert all(f"step-{step}/.metadata is damaged" in ended[0].said for step in (2, 4, 6))
    assert bytes_of(run.folder) == before
    ended = runs.go_on(run.folder, "--checkpoint.resume", "never")
    assert [each.code for each in ended] == [0] * runs.world_size, ended[0].said
    check_same_run(run, runs.whole)


def test_flip_of_any_bit_is_found(runs: Runs, tmp_path: Path) -> None:
    """Every bit of the manifest, and 1,000 of the other files, in which the place does not matter to a checksum."""
    run = copy_killed(runs, tmp_path)
    step = run.folder / "checkpoint/step-6"
    places = [(files.MANIFEST, bit) for bit in range(8 * (step / files.MANIFEST).stat().st_size)]
    sizes = {name: entry["size"] for name, entry in files.read_manifest(step)["files"].items()}
    places += [(name, CHANCE.randrange(8 * sizes[name])) for name in CHANCE.choices(sorted(sizes), k=1000)]
    assert find_faults(run, 6) == []
    unseen = []
    for name, bit in places:
        flip(step / name, bit)
        if not any(str(step / name) in problem for problem in find_faults(run, 6)):
            unseen.append((name, bit))
        flip(step / name, bit)
    assert unseen == []
    assert find_faults(run, 6) == []


def test_manifest_of_an_earlier_format_is_read_as_it_is(runs: Runs, tmp_path: Path) -> None:
    run = copy_killed(runs, tmp_path)
    for step in (2, 4, 6):
        path = run.folder / f"checkpoint/step-{step}" / files.MANIFEST
        manifest = json.loads(path.read_text())
        del manifest["crc32"]
        path.write_text(json.dumps(manifest | {"format": files.OLDER_FORMAT}))
    ended = runs.go_on(run.folder)
    assert ended[0].said.startswith("resuming after step 6: the newest good checkpoint\n")
    check_same_run(run, runs.whole)


def find_faults(run: Run, step: int) -> list[str]:
    """What a start finds wrong with a step."""
    section = Checkpoint(enable_checkpoint=True)
    return CheckpointManager(section, run.folder / "checkpoint", True, "", "{}", lambda _: None)._verify(step)[1]
