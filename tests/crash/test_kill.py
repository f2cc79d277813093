"""Wherever a run is killed or loses its power, it comes back: from a good step, without a step lost that was saved, and bit for bit the same.

The changes that a save makes to the disk are counted by disk.c, and each one kills a run of its own.
"""

import hashlib
import itertools
import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TABLE, Run, write_chats, write_toml
from crash.disk import Change, Disk, read_changes, read_tree, write_tree
from crash.same import load_state
from forks import Forks

from tunelib.checkpoint.manager import CheckpointManager
from tunelib.config.schema import Checkpoint

pytestmark = pytest.mark.timeout(1500)
STEPS, INTERVAL = 6, 2
LANES = 2


@dataclass(frozen=True)
class Reference:
    """The run that nothing happened to.

    Attributes:
        states: all tensors of its checkpoints, by step.
    """

    words: list[str]
    losses: list[float]
    states: dict[int, dict[str, torch.Tensor]]

    def check_steps(self, folder: Path) -> None:
        """That each checkpoint of a run is that of the reference, bit for bit."""
        for path in (folder / "checkpoint").iterdir():
            state, expected = load_state(path), self.states[int(path.name.removeprefix("step-"))]
            assert state.keys() == expected.keys()
            assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())

    def check(self, folder: Path) -> None:
        """That a run which has come back is this one, and has left nothing behind."""
        run = Run(folder)
        assert run.series("loss") == self.losses
        assert [row["step"] for row in run.rows()] == list(range(1, STEPS + 1))
        assert sorted(path.name for path in (folder / "checkpoint").iterdir()) == [f"step-{STEPS}"]
        self.check_steps(folder)


@pytest.fixture(scope="module")
def toml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kill")
    saving = f"[checkpoint]\nenable_checkpoint = true\ninterval = {INTERVAL}\nkeep_latest_k = 1\n"
    return write_toml(folder / "tiny.toml", write_chats(folder / "chats.jsonl", 120), saving)


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory, toml: Path, lanes: list[Forks]) -> dict[int, Reference]:
    """By number of processes."""
    found = {}
    for world_size in (1, 2):
        folder = tmp_path_factory.mktemp("reference")
        words = [str(toml), "--training.steps", str(STEPS), "--model.num_hidden_layers", "1"]
        for ended in lanes[0].run([*words, "--checkpoint.keep_latest_k", "0", "--job.dump_folder", folder], world_size):
            assert ended.code == 0, ended.said
        states = {step: load_state(folder / f"checkpoint/step-{step}") for step in range(INTERVAL, STEPS + 1, INTERVAL)}
        found[world_size] = Reference(words, Run(folder).series("loss"), states)
    return found


@pytest.fixture(scope="module")
def lanes(disk_library: Path) -> Iterator[list[Forks]]:
    """So many runs at a time."""
    lanes = [Forks(disk_library) for _ in range(LANES)]
    yield lanes
    for lane in lanes:
        lane.close()


def share(lanes: list[Forks], items: list[Any], work: Any) -> list[Any]:
    """``work(lane, item)`` for all items, each lane taking every other one."""
    with ThreadPoolExecutor(len(lanes)) as pool:
        dealt = [items[number :: len(lanes)] for number in range(len(lanes))]
        parts = [pool.submit(lambda lane=lane, mine=mine: [work(lane, item) for item in mine]) for lane, mine in zip(lanes, dealt, strict=True)]
        return [result for part in parts for result in part.result()]


def resumed_step(said: str) -> int:
    """The step that a run says it goes on from; 0 for one that begins."""
    sentence = next(line for line in said.splitlines() if "resuming after step" in line or "starting fresh" in line)
    return int(sentence.split("resuming after step ")[1].split(":")[0]) if "resuming" in sentence else 0


def come_back(lane: Forks, reference: Reference, words: list[str], folder: Path, world_size: int) -> int:
    """Give the command again, and check all that must hold; the step that it went on from."""
    first, *others = lane.run([*words, "--job.dump_folder", folder], world_size)
    assert [first.code, *(ended.code for ended in others)] == [0] * world_size, first.said
    assert "damaged" not in first.said  # what is killed leaves nothing by a name that could be taken for good
    reference.check(folder)
    shutil.rmtree(folder)
    return resumed_step(first.said)


@pytest.mark.crash
@pytest.mark.parametrize(("mode", "world_size", "rank"), [(mode, *who) for mode in ("disabled", "async") for who in ((1, 0), (2, 0), (2, 1))])
def test_kill_at_every_change_of_a_save_and_of_the_rotation_after_it(
    tmp_path: Path, lanes: list[Forks], references: dict[int, Reference], mode: str, world_size: int, rank: int
) -> None:
    reference, saved, before = references[world_size], 2 * INTERVAL, INTERVAL
    words = [*reference.words, "--checkpoint.async_mode", mode]
    fault = {"fault": "disk_in_save", "step": saved, "at_rank": rank}
    whole, counted = tmp_path / "whole", tmp_path / "count"
    for ended in lanes[0].run([*words, "--job.dump_folder", whole], world_size, **fault, counted=str(counted), under=str(whole / "checkpoint")):
        assert ended.code == 0, ended.said
    changes = int(counted.read_text())
    assert changes > (50 if rank == 0 else 20)

    def kill(lane: Forks, change: int) -> int:
        folder = tmp_path / f"run-{change}"
        kill_at = {"under": str(folder / "checkpoint"), "kill_at": change}
        ended = lane.run([*words, "--job.dump_folder", folder], world_size, **fault, **kill_at, patience=0)
        assert ended[rank].code == -9, ended[rank].said
        return come_back(lane, reference, words, folder, world_size)

    begun = time.monotonic()
    found = Counter(share(lanes, list(range(1, changes + 1)), kill))
    assert found.keys() == ({before, saved} if rank == 0 else {before})  # the commit, and what is after it, are rank 0's
    where = f"{'async' if mode == 'async' else 'sync ':5} {world_size} rank{'s' if world_size > 1 else ' '}, rank {rank}"
    counts = ", ".join(f"{number} from step {step}" for step, number in sorted(found.items()))
    TABLE.append(f"killed at each change of a save, {where}: {changes:4} kills, all went on bit for bit: {counts} ({time.monotonic() - begun:.0f} s)")


def find_commits(changes: list[Change], folder: str) -> dict[int, int]:
    """Number of changes after which a step is there, and whatever happens must be there → the step."""
    found, renamed = {}, None
    for number, change in enumerate(changes, 1):
        if change.kind == "r" and change.second.startswith(f"{folder}/step-"):
            renamed = int(change.second.removeprefix(f"{folder}/step-"))
        elif change.kind == "f" and change.path == folder and renamed is not None:
            found[number], renamed = renamed, None
    return found


@pytest.mark.crash
@pytest.mark.parametrize(("mode", "world_size"), list(itertools.product(("disabled", "async"), (1, 2))))
def test_power_loss_at_every_change_of_a_run(
    tmp_path: Path, lanes: list[Forks], references: dict[int, Reference], mode: str, world_size: int
) -> None:
    """What was not fsynced is lost: with the names of files, without them, and with zeros in the place of what was written."""
    reference, folder, logs = references[world_size], tmp_path / "run", tmp_path / "logs"
    words = [*reference.words, "--checkpoint.async_mode", mode]
    folder.mkdir()
    logs.mkdir()
    for ended in lanes[0].run([*words, "--job.dump_folder", folder], world_size, fault="disk", under=str(folder), logs=str(logs)):
        assert ended.code == 0, ended.said
    changes = [change for change in read_changes(sorted(logs.iterdir())) if not change.path.startswith((f"{folder}/export", f"{folder}/.export"))]
    committed = find_commits(changes, f"{folder}/checkpoint")
    assert sorted(committed.values()) == list(range(INTERVAL, STEPS + 1, INTERVAL))
    disk, seen, outcomes, to_resume = Disk(str(folder)), set(), Counter[int](), {}
    number_of_trees = 0
    for number, change in enumerate(changes, 1):
        disk.apply(change)
        at_least = max((step for at, step in committed.items() if at <= number), default=0)
        for names, data in (("synced", "synced"), ("written", "synced"), ("written", "zeros"), ("synced", "written")):
            tree = disk.after_power_loss(names, data)
            digest = hashlib.sha256(repr(sorted(tree.items())).encode()).digest()
            if (digest, at_least) in seen:
                continue
            seen.add((digest, at_least))
            number_of_trees += 1
            left = tmp_path / "left"
            write_tree(tree, left)
            manager = CheckpointManager(Checkpoint(enable_checkpoint=True), left / "checkpoint", True, "", "{}", lambda _: None)
            decision = manager.decide(STEPS)
            step = decision.state.step if decision.state is not None else 0
            assert step >= at_least, f"{names}, {data}, after {number} changes: {decision.sentence}"
            if decision.folder is not None:
                state = load_state(decision.folder)
                assert all(torch.equal(state[name], tensor) for name, tensor in reference.states[step].items())
                rows = [json.loads(line)["step"] for line in (left / "metrics.jsonl").read_bytes().split(b"\n") if line.endswith(b"}")]
                assert rows[:step] == list(range(1, step + 1))
            outcomes[step] += 1
            if outcomes[step] % 25 == 1:
                to_resume[f"{names}-{data}-{number}"] = (tree, step)
    end = {name: content for name, content in read_tree(folder).items() if not name.startswith("export")}
    assert disk.after_power_loss("written", "written") == end  # nothing was done that was not seen

    def resume(lane: Forks, name: str) -> None:
        tree, step = to_resume[name]
        write_tree(tree, tmp_path / name)
        first, *others = lane.run([*words, "--job.dump_folder", tmp_path / name], world_size)
        assert [first.code, *(ended.code for ended in others)] == [0] * world_size, first.said
        assert resumed_step(first.said) == step or "finished" in first.said
        assert Run(tmp_path / name).series("loss") == reference.losses

    share(lanes, list(to_resume), resume)
    counts = ", ".join(f"{number} at step {step}" for step, number in sorted(outcomes.items()))
    TABLE.append(
        f"power lost after each of {len(changes)} changes, {'async' if mode == 'async' else 'sync '} {world_size} ranks: "
        f"{number_of_trees} different disks, a good step on each: {counts}; {len(to_resume)} of them trained on, bit for bit"
    )


def kill_at_random(tmp_path: Path, lanes: list[Forks], references: dict[int, Reference], kills: int) -> None:
    """Runs of one and two processes, saving in the foreground and the background, half of them on a slow disk, killed at any time, and again."""
    outcomes = Counter[str]()
    kinds = list(itertools.product((1, 2), ("disabled", "async"), (0.0, 0.001)))

    def kill(lane: Forks, seed: int) -> None:
        chance, killed, number = random.Random(seed), 0, 0
        while killed < kills // LANES:
            world_size, mode, wait = kinds[number % len(kinds)]
            reference, folder = references[world_size], tmp_path / f"run-{seed}-{number}"
            words = [*reference.words, "--checkpoint.async_mode", mode]
            slow = {"fault": "disk", "under": str(folder / "checkpoint"), "wait": wait} if wait else {}
            for _ in range(2):  # the second time while it comes back
                when = chance.uniform(0.1, 0.6) * world_size + chance.uniform(0, 300) * wait
                codes = [ended.code for ended in lane.run([*words, "--job.dump_folder", folder], world_size, **slow, kill_after=when)]
                killed += codes != [0] * world_size
                outcomes["ended before"] += codes == [0] * world_size
            first, *others = lane.run([*words, "--job.dump_folder", folder], world_size)
            assert [first.code, *(ended.code for ended in others)] == [0] * world_size, first.said
            assert "damaged" not in first.said
            reference.check(folder)
            shutil.rmtree(folder)
            outcomes[f"went on from step {resumed_step(first.said)}"] += 1
            number += 1
        outcomes["SIGKILLs"] += killed
        outcomes["runs"] += number

    begun = time.monotonic()
    share(lanes, list(range(LANES)), kill)
    counts = ", ".join(f"{number} {what}" for what, number in sorted(outcomes.items()) if what not in ("SIGKILLs", "runs"))
    whole = f"{outcomes['SIGKILLs']} SIGKILLs for {outcomes['runs']} runs, all ended bit for bit"
    TABLE.append(f"killed at random: {whole}: {counts} ({time.monotonic() - begun:.0f} s)")


@pytest.mark.crash
def test_20_kills_at_random(tmp_path: Path, lanes: list[Forks], references: dict[int, Reference]) -> None:
    kill_at_random(tmp_path, lanes, references, 20)


@pytest.mark.kill200
def test_200_kills_at_random(tmp_path: Path, lanes: list[Forks], references: dict[int, Reference]) -> None:
    kill_at_random(tmp_path, lanes, references, 200)
