"""Which checkpoint a run goes on from, what is set aside, and what is kept."""

import dataclasses
import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

import tunelib.checkpoint.manager as manager_module
from tunelib import files
from tunelib.checkpoint.identity import check_identity
from tunelib.checkpoint.manager import CheckpointManager, Decision
from tunelib.checkpoint.state import RunState
from tunelib.config.schema import Checkpoint
from tunelib.errors import CheckpointError, NumbersError, SaveError, UnreachableError


def make_manager(folder: Path, **settings: Any) -> CheckpointManager:
    """The manager of a command with these settings; its resolved TOML says them, as the real one does."""
    section = Checkpoint(enable_checkpoint=True, **settings)
    return CheckpointManager(section, folder / "checkpoint", True, repr(section), "{}")


def begin(manager: CheckpointManager, num_steps: int = 1000) -> Decision:
    """What a start decides and does to the step folders."""
    decision = manager.decide(num_steps)
    manager.follow(decision)
    return decision


def weights(step: int) -> dict[str, torch.Tensor]:
    return {"w": torch.full((3,), float(step))}


def save_steps(folder: Path, *steps: int, kind: str = "full", **section: Any) -> None:
    manager = make_manager(folder, **section)
    for step in steps:
        manager.save(weights(step), RunState(step, 10 * step, 1, "cpu", {"data": "x"}), kind)


def names_in(folder: Path) -> set[str]:
    return {path.name for path in (folder / "checkpoint").iterdir()}


def damage(folder: Path, step: int, how: str = "flipped") -> None:
    path = folder / f"checkpoint/step-{step}"
    (data,) = path.glob("*.distcp")
    content = data.read_bytes()
    if how == "flipped":
        data.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif how == "truncated":
        data.write_bytes(content[:-1])
    elif how == "missing":
        data.unlink()
    elif how == "no manifest":
        (path / files.MANIFEST).unlink()
    elif how == "manifest without kind":
        manifest = json.loads((path / files.MANIFEST).read_text())
        del manifest["kind"]
        (path / files.MANIFEST).write_text(json.dumps(manifest | {"format": files.OLDER_FORMAT}))


def loaded_value(manager: CheckpointManager, decision: Decision) -> float:
    tensors = {"w": torch.zeros(3)}
    manager.load(tensors, decision)
    return tensors["w"][0].item()


# What a run goes on from


def test_new_run_starts_fresh_and_says_so(tmp_path: Path) -> None:
    decision = begin(make_manager(tmp_path))
    assert (decision.kind, decision.folder, decision.state) == ("fresh", None, None)
    assert "starting fresh" in decision.sentence


def test_run_without_checkpoints_looks_for_none(tmp_path: Path) -> None:
    save_steps(tmp_path, 5)
    decision = begin(CheckpointManager(Checkpoint(), tmp_path / "checkpoint", True, "", "{}"))
    assert decision.kind == "fresh"
    assert "enable_checkpoint is false" in decision.sentence
    assert names_in(tmp_path) == {"step-5"}


def test_newest_good_checkpoint_is_resumed_with_its_state(tmp_path: Path) -> None:
    save_steps(tmp_path, 2, 9, 10)
    manager = make_manager(tmp_path)
    decision = begin(manager)
    assert decision.kind == "resume"
    assert decision.state == RunState(10, 100, 1, "cpu", {"data": "x"})
    assert "after step 10" in decision.sentence
    assert loaded_value(manager, decision) == 10


@pytest.mark.parametrize("how", ["flipped", "truncated", "missing", "no manifest"])
def test_damaged_newest_is_named_and_set_aside_and_an_older_one_is_used(tmp_path: Path, how: str) -> None:
    save_steps(tmp_path, 1, 2, 3)
    damage(tmp_path, 3, how)
    manager = make_manager(tmp_path)
    decision = begin(manager)
    assert decision.state is not None
    assert decision.state.step == 2
    assert names_in(tmp_path) == {"step-1", "step-2", "step-3.damaged-0"}
    assert "step 3 is damaged" in decision.sentence
    assert "step-3.damaged-0" in decision.sentence
    assert loaded_value(manager, decision) == 2
    manager.save(weights(3), RunState(3, 30, 1, "cpu", {}))
    assert names_in(tmp_path) == {"step-1", "step-2", "step-3", "step-3.damaged-0"}


def test_all_damaged_is_an_error_that_changes_nothing_until_a_fresh_start_is_asked_for(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    for step in (1, 2):
        damage(tmp_path, step)
    with pytest.raises(CheckpointError, match=r"holds no good checkpoint; nothing was changed:\n  step 2: .*\n  step 1: "):
        begin(make_manager(tmp_path))
    assert names_in(tmp_path) == {"step-1", "step-2"}
    begin(make_manager(tmp_path, resume="never"))
    assert names_in(tmp_path) == {"step-1.superseded-0", "step-2.superseded-0"}


def test_damage_happens_twice_to_the_same_step(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    for _ in range(2):
        save_steps(tmp_path, 4)
        damage(tmp_path, 4)
        begin(make_manager(tmp_path))
    assert names_in(tmp_path) == {"step-1", "step-4.damaged-0", "step-4.damaged-1"}


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EMFILE, errno.ENOTCONN])
def test_disk_that_does_not_answer_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    save_steps(tmp_path, 1, 2)
    for name in ("_checksums_of", "_read_text"):
        with monkeypatch.context() as patch:
            patch.setattr(manager_module.files, name, fail)
            with pytest.raises(UnreachableError, match="cannot be read just now"):
                begin(make_manager(tmp_path))
    assert names_in(tmp_path) == {"step-1", "step-2"}


def test_weights_that_are_not_finite_are_neither_resumed_from_nor_an_end(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    manager = make_manager(tmp_path)
    for step, kind in ((2, "full"), (3, "model")):
        with pytest.raises(NumbersError, match="counts for nothing"):
            manager.save({"w": torch.tensor([1.0, math.nan])}, RunState(step, 10, 1, "cpu", {"data": "x"}), kind)
    decision = begin(make_manager(tmp_path), num_steps=3)
    assert decision.sentence.startswith("resuming after step 1: ")
    with pytest.raises(CheckpointError, match=r"step-2 holds numbers that are not finite: it cannot be resumed from"):
        begin(make_manager(tmp_path, load_step=2))


def test_weights_alone_take_the_place_of_the_full_checkpoint_that_a_signal_had_saved_at_the_last_step(tmp_path: Path) -> None:
    save_steps(tmp_path, 8)
    manager = make_manager(tmp_path)
    manager.load({"w": torch.zeros(3)}, begin(manager))
    assert manager.save(weights(8), RunState(8, 80, 1, "cpu", {}), "model") is not None
    assert files.read_manifest(tmp_path / "checkpoint/step-8")["kind"] == "model"
    assert names_in(tmp_path) == {"step-8", "step-8.superseded-0"}


def test_rotation_that_was_interrupted_is_done_when_the_run_ends_again(tmp_path: Path) -> None:
    save_steps(tmp_path, 4, 6)  # without a limit
    manager = make_manager(tmp_path, keep_latest_k=1)
    manager.load({"w": torch.zeros(3)}, begin(manager))
    assert manager.save(weights(6), RunState(6, 60, 1, "cpu", {})) is None
    assert names_in(tmp_path) == {"step-6"}


def test_best_checkpoint_is_not_lost_to_a_loss_that_is_no_number(tmp_path: Path) -> None:
    manager = make_manager(tmp_path, keep_latest_k=1, keep_best=True)
    for step, loss in enumerate([math.nan, 1.0, 2.0, 3.0], 1):
        manager.save(weights(step), RunState(step, 10, 1, "cpu", {}, validation_loss=loss))
    assert names_in(tmp_path) == {"step-2", "step-4"}


def test_folder_that_cannot_be_written_is_known_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_steps(tmp_path, 1)
    monkeypatch.setattr(manager_module.files.Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(SaveError, match=r"checkpoint cannot be written: .*Permission denied"):
        begin(make_manager(tmp_path))


def test_manifest_that_does_not_say_its_kind_is_damage(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    damage(tmp_path, 2, "manifest without kind")
    decision = begin(make_manager(tmp_path))
    assert decision.state is not None
    assert decision.state.step == 1


def test_whole_folder_of_another_step_is_damage(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    (tmp_path / "checkpoint/step-2").rename(tmp_path / "checkpoint/step-3")
    decision = begin(make_manager(tmp_path))
    assert decision.state is not None
    assert decision.state.step == 1
    assert "step-3/manifest.json is that of step 2" in decision.sentence


@pytest.mark.parametrize("name", ["step-007", "step-x", "step-", "step-3.damaged-0", "step-٣", "notes"])
def test_other_folders_are_left_alone(tmp_path: Path, name: str) -> None:
    save_steps(tmp_path, 2)
    (tmp_path / "checkpoint" / name).mkdir()
    decision = begin(make_manager(tmp_path))
    assert decision.state is not None
    assert decision.state.step == 2
    assert names_in(tmp_path) == {"step-2", name}


def test_debris_of_an_interrupted_save_is_removed_and_never_loaded(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    (tmp_path / "checkpoint/.step-2.tunelib-staging").mkdir()
    decision = begin(make_manager(tmp_path))
    assert decision.state is not None
    assert decision.state.step == 1
    assert names_in(tmp_path) == {"step-1"}


def test_model_only_checkpoint_never_resumes(tmp_path: Path) -> None:
    save_steps(tmp_path, 5)
    save_steps(tmp_path, 10, kind="model")
    decision = begin(make_manager(tmp_path))
    assert decision.state is not None
    assert decision.state.step == 5
    assert "step 10 holds model weights only" in decision.sentence
    with pytest.raises(CheckpointError, match="model weights only"):
        begin(make_manager(tmp_path, load_step=10))
    assert names_in(tmp_path) == {"step-5", "step-10"}


# Seeds


def test_seed_checkpoint_is_loaded_as_first_weights(tmp_path: Path) -> None:
    assert begin(make_manager(tmp_path, create_seed_checkpoint=True)).kind == "fresh"
    save_steps(tmp_path, 0, kind="seed")
    manager = make_manager(tmp_path)
    decision = begin(manager)
    assert decision.kind == "seed"
    assert "seed checkpoint" in decision.sentence
    assert loaded_value(manager, decision) == 0


def test_seed_is_the_first_thing_in_a_run_folder(tmp_path: Path) -> None:
    save_steps(tmp_path, 3)
    with pytest.raises(CheckpointError, match="already holds step 3"):
        begin(make_manager(tmp_path, create_seed_checkpoint=True))


def test_full_checkpoint_is_preferred_to_the_seed(tmp_path: Path) -> None:
    save_steps(tmp_path, 0, kind="seed")
    save_steps(tmp_path, 3)
    assert begin(make_manager(tmp_path)).kind == "resume"


def test_damaged_full_checkpoint_falls_back_to_the_seed(tmp_path: Path) -> None:
    save_steps(tmp_path, 0, kind="seed")
    save_steps(tmp_path, 3)
    damage(tmp_path, 3)
    assert begin(make_manager(tmp_path)).kind == "seed"


# load_step


def test_going_back_sets_later_steps_aside(tmp_path: Path) -> None:
    save_steps(tmp_path, 2, 4, 6)
    decision = begin(make_manager(tmp_path, load_step=2))
    assert decision.state is not None
    assert decision.state.step == 2
    assert names_in(tmp_path) == {"step-2", "step-4.superseded-0", "step-6.superseded-0"}


def test_restart_of_a_run_that_went_back_takes_its_newest_step(tmp_path: Path) -> None:
    save_steps(tmp_path, 2, 4, 6)
    manager = make_manager(tmp_path, load_step=2)
    begin(manager)
    manager.save(weights(4), RunState(4, 40, 1, "cpu", {}))
    decision = begin(make_manager(tmp_path, load_step=2))
    assert decision.state is not None
    assert decision.state.step == 4
    assert names_in(tmp_path) == {"step-2", "step-4", "step-4.superseded-0", "step-6.superseded-0"}


def test_restart_before_the_first_save_goes_back_again(tmp_path: Path) -> None:
    save_steps(tmp_path, 2, 4)
    for _ in range(2):
        decision = begin(make_manager(tmp_path, load_step=2))
        assert decision.state is not None
        assert decision.state.step == 2
    assert names_in(tmp_path) == {"step-2", "step-4.superseded-0"}


def test_missing_load_step_is_an_error_that_lists_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"load_step = 3.*no checkpoint"):
        begin(make_manager(tmp_path, load_step=3))
    save_steps(tmp_path, 2, 4)
    with pytest.raises(CheckpointError, match=r"load_step = 3.*steps 2, 4"):
        begin(make_manager(tmp_path, load_step=3))
    assert names_in(tmp_path) == {"step-2", "step-4"}


def test_damaged_load_step_is_an_error_and_nothing_is_set_aside(tmp_path: Path) -> None:
    save_steps(tmp_path, 2, 4)
    damage(tmp_path, 2)
    with pytest.raises(CheckpointError, match="checksum"):
        begin(make_manager(tmp_path, load_step=2))
    assert names_in(tmp_path) == {"step-2", "step-4"}


# resume


def test_resume_never_sets_everything_aside(tmp_path: Path) -> None:
    save_steps(tmp_path, 2, 4)
    decision = begin(make_manager(tmp_path, resume="never"))
    assert decision.kind == "fresh"
    assert "2 old checkpoints set aside" in decision.sentence
    assert names_in(tmp_path) == {"step-2.superseded-0", "step-4.superseded-0"}


def test_resume_must_stops_without_a_full_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'must'.*no full checkpoint"):
        begin(make_manager(tmp_path, resume="must"))
    save_steps(tmp_path, 0, kind="seed")
    save_steps(tmp_path, 5, kind="model")
    with pytest.raises(CheckpointError, match="no full checkpoint to resume from"):
        begin(make_manager(tmp_path, resume="must"))
    save_steps(tmp_path, 3)
    assert begin(make_manager(tmp_path, resume="must")).kind == "resume"


# Retention


def test_only_the_latest_full_checkpoints_are_kept(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2, 3, 4, keep_latest_k=2)
    assert names_in(tmp_path) == {"step-3", "step-4"}


def test_zero_keeps_all(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2, 3, keep_latest_k=0)
    assert len(names_in(tmp_path)) == 3


def test_retention_counts_full_checkpoints_only_and_never_takes_the_newest(tmp_path: Path) -> None:
    save_steps(tmp_path, 0, kind="seed")
    save_steps(tmp_path, 5, keep_latest_k=1)
    save_steps(tmp_path, 10, kind="model", keep_latest_k=1)
    assert names_in(tmp_path) == {"step-0", "step-5", "step-10"}


def test_set_aside_folders_are_not_counted_and_not_removed(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    damage(tmp_path, 2)
    begin(make_manager(tmp_path))
    save_steps(tmp_path, 2, 3, 4, keep_latest_k=1)
    assert names_in(tmp_path) == {"step-2.damaged-0", "step-4"}


@pytest.mark.parametrize("how", ["no manifest", "manifest without kind"])
def test_older_damaged_step_does_not_stop_the_saves_of_a_resumed_run(tmp_path: Path, how: str) -> None:
    save_steps(tmp_path, 1, 2)
    damage(tmp_path, 1, how)
    manager = make_manager(tmp_path)
    decision = begin(manager)
    assert decision.state is not None
    assert decision.state.step == 2
    manager.save(weights(3), RunState(3, 30, 1, "cpu", {}))
    assert "step-3" in names_in(tmp_path)


# Saving


def test_committed_step_verifies_and_carries_what_it_needs(tmp_path: Path) -> None:
    save_steps(tmp_path, 7)
    folder = tmp_path / "checkpoint/step-7"
    manifest = files.read_manifest(folder)
    assert (manifest["kind"], manifest["step"]) == ("full", 7)
    assert manifest["files"].keys() >= {".metadata", "config.toml", "config.json", "state.json"}
    assert files.find_damage(folder, manifest["files"], manifest["files"]) == []
    assert (folder / "config.toml").read_text() == make_manager(tmp_path).config_toml


def test_step_is_saved_once(tmp_path: Path) -> None:
    manager = make_manager(tmp_path)
    assert manager.save(weights(1), RunState(1, 1, 1, "cpu", {})) is not None
    assert manager.save(weights(2), RunState(1, 1, 1, "cpu", {})) is None
    resumed = make_manager(tmp_path)
    resumed.load(weights(0), begin(resumed))
    assert resumed.save(weights(2), RunState(1, 1, 1, "cpu", {})) is None


def test_failed_save_leaves_no_new_step_and_the_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_steps(tmp_path, 1)
    monkeypatch.setattr(manager_module.files, "commit_folder", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(SaveError, match=r"step-2 cannot be written.*No space left"):
        save_steps(tmp_path, 2)
    monkeypatch.undo()
    decision = begin(make_manager(tmp_path))
    assert decision.state is not None
    assert decision.state.step == 1
    assert names_in(tmp_path) == {"step-1"}


def test_failure_inside_dcp_is_a_save_error_with_its_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise CheckpointException("save", {0: (OSError(28, "No space left on device"), None)})  # type: ignore[dict-item]  # no traceback needed

    monkeypatch.setattr(torch.distributed.checkpoint, "save", fail)
    with pytest.raises(SaveError, match=r"cannot be written: rank 0: OSError.*No space left"):
        save_steps(tmp_path, 1)


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"interval": 3}, [3, 6]),
        ({"interval": 1}, [1, 2, 3, 4, 5, 6]),
        ({"interval": 1, "interval_type": "epochs"}, [3, 5]),
        ({"interval": 2, "interval_type": "epochs"}, [5]),
    ],
    ids=str,
)
def test_interval_counts_steps_or_epochs(tmp_path: Path, section: dict[str, Any], expected: list[int]) -> None:
    epochs_after = [0, 0, 0, 1, 1, 3, 3]  # two epochs end in step 5
    manager = make_manager(tmp_path, **section)
    assert [step for step in range(1, 7) if manager.is_due(step, (epochs_after[step - 1], epochs_after[step]))] == expected


def test_interval_counts_seconds_since_the_last_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(manager_module.time, "monotonic", lambda: now)
    manager = make_manager(tmp_path, interval=60, interval_type="seconds")
    now += 59
    assert not manager.is_due(1, (0, 0))
    now += 1
    assert manager.is_due(2, (0, 0))
    manager.save(weights(2), RunState(2, 2, 1, "cpu", {}))
    assert not manager.is_due(3, (0, 0))


def test_nothing_is_due_where_checkpoints_are_off(tmp_path: Path) -> None:
    manager = CheckpointManager(dataclasses.replace(Checkpoint(), interval=1), tmp_path, True, "", "{}")
    assert not manager.is_due(1, (0, 1))


# Another run


def test_same_identity_goes_on() -> None:
    check_identity({"data": {"file": "a"}, "seed": 1}, {"seed": 1, "data": {"file": "a"}})


def test_every_changed_thing_is_named_with_both_values() -> None:
    with pytest.raises(CheckpointError) as caught:
        check_identity({"file": "abc", "seed": 1, "gone": True, "same": 0}, {"file": "xyz", "seed": 2, "new": 5, "same": 0})
    for words in ("file: 'abc' then, 'xyz' now", "seed: 1 then, 2 now", "gone: True then", "new: None then, 5 now", "--checkpoint.resume never"):
        assert words in str(caught.value)
    assert "same" not in str(caught.value)


def test_of_a_table_the_changed_keys_are_named_and_consequences_where_there_is_no_cause() -> None:
    saved = {"model": {"rows": 1, "layers": 2}, "consequences": {"documents": 120}}
    with pytest.raises(CheckpointError) as caught:
        check_identity(saved, {"model": {"rows": 1, "layers": 3}, "consequences": {"documents": 121}})
    assert "  model: layers: 2 then, 3 now\n" in str(caught.value)
    assert "rows" not in str(caught.value)
    assert "documents" not in str(caught.value)
    with pytest.raises(CheckpointError, match="consequences: documents: 120 then, 121 now"):
        check_identity(saved, {**saved, "consequences": {"documents": 121}})


def test_refused_start_sets_nothing_aside(tmp_path: Path) -> None:
    save_steps(tmp_path, 2, 4)
    decision = make_manager(tmp_path, load_step=2).decide(1000)
    assert decision.supersede == (4,)
    assert names_in(tmp_path) == {"step-2", "step-4"}, "the caller may still find that the run is another one"


def test_finished_run_with_weights_alone_is_exported_again_and_not_trained_again(tmp_path: Path) -> None:
    save_steps(tmp_path, 2)
    save_steps(tmp_path, 4, kind="model")
    assert begin(make_manager(tmp_path), 4).kind == "finished"
    assert begin(make_manager(tmp_path), 5).kind == "resume", "it is to be extended"


def test_restart_by_torchrun_goes_on_even_if_resume_is_never(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_steps(tmp_path, 2)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert begin(make_manager(tmp_path, resume="never")).kind == "resume"
