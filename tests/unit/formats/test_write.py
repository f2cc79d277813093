"""A folder gets its name when all of it is on the disk; whatever stops it before leaves what was there, and nothing else."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from unit.samples import tiny_config, tiny_model

from tunelib import files
from tunelib.checkpoint.state import model_tensors
from tunelib.errors import ConfigError, FormatError, SaveError
from tunelib.files import STAGING, find_damage, read_manifest
from tunelib.formats.dcp import DcpWriter
from tunelib.formats.live import LiveWeights
from tunelib.formats.plan import Plan, Wish, plan_form
from tunelib.formats.safetensors_file import SafetensorsWriter
from tunelib.formats.source import expected_shapes, open_checkpoint
from tunelib.formats.tensors import TensorInfo
from tunelib.formats.torch_file import TorchWriter
from tunelib.formats.write import write_checkpoint
from tunelib.model.families import hf_config

EMBEDDING = "model.embed_tokens.weight"
CONFIG = tiny_config(intermediate_size=88, initializer_range=0.3)
MODEL = tiny_model(torch.float32, intermediate_size=88)
TENSORS = model_tensors(MODEL)
WRITERS = {"hf": SafetensorsWriter, "meta": TorchWriter, "torch": TorchWriter, "dcp": DcpWriter}
KINDS = sorted(WRITERS)
read = LiveWeights(MODEL).read


def make_plan(kind: str, dtype: torch.dtype = torch.float32, **wishes: Any) -> Plan:
    weights = {name: TensorInfo(name, dtype, tuple(shape)) for name, shape in expected_shapes(CONFIG).items()}
    form = plan_form(Wish(kind, **wishes), weights, CONFIG)
    return Plan(form, hf_config(CONFIG), {} if kind == "meta" else {"config.json": json.dumps(hf_config(CONFIG))})


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", KINDS)
def test_folder_holds_the_weights_and_a_manifest_that_verifies(tmp_path: Path, kind: str) -> None:
    counts: list[int] = []
    plan = make_plan(kind)
    write_checkpoint(plan, read, tmp_path / "out", wrote=counts.append)
    stored = open_checkpoint(tmp_path / "out", plan.fields)
    assert all(torch.equal(stored.read(name), tensor) for name, tensor in TENSORS.items())
    manifest = read_manifest(tmp_path / "out")
    assert {*manifest["files"], files.MANIFEST} == set(content_of(tmp_path / "out"))
    assert find_damage(tmp_path / "out", manifest["files"], manifest["files"]) == []
    assert sum(counts) == plan.num_bytes
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_only_the_one_file_is_kept_where_the_target_is_a_file(tmp_path: Path) -> None:
    write_checkpoint(make_plan("torch"), read, tmp_path / "weights.pt", single_file="model.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pt"]
    loaded = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert list(loaded) == list(TENSORS)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())


def test_one_weight_is_held_at_a_time_in_the_order_of_the_files(tmp_path: Path) -> None:
    plan, asked = make_plan("hf", max_shard_bytes=20_000), []

    def ask(name: str, where: Any) -> torch.Tensor:
        asked.append(name)
        return read(name, where)

    write_checkpoint(plan, ask, tmp_path / "out")
    assert asked == [entry.source for entries in plan.form.files.values() for entry in entries]


# What stops it

OLD = {"one": torch.ones(1)}


def _fail_at_write(patch: pytest.MonkeyPatch, kind: str) -> None:
    write, count = WRITERS[kind].write, iter(range(1000))

    def fail(self: Any, tensor: torch.Tensor) -> None:
        if next(count) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, tensor)

    patch.setattr(WRITERS[kind], "write", fail)


def _fail_in_file(patch: pytest.MonkeyPatch, kind: str) -> None:
    write = files.ChecksummedFile.write

    def fail(self: Any, data: Any) -> int:
        if self.size > 10_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, data)

    patch.setattr(files.ChecksummedFile, "write", fail)


def _fail_at_finish(patch: pytest.MonkeyPatch, kind: str) -> None:
    def fail(self: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    patch.setattr(WRITERS[kind], "finish", fail)


def _fail_beside(patch: pytest.MonkeyPatch, kind: str) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    patch.setattr(files, "write_file", fail)


def _fail_at_rename(patch: pytest.MonkeyPatch, kind: str) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    patch.setattr(files, "sync_path", fail)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("older", [False, True], ids=["nothing there", "an older one there"])
@pytest.mark.parametrize("fail", [_fail_at_write, _fail_in_file, _fail_at_finish, _fail_beside, _fail_at_rename])
def test_failed_write_leaves_what_was_there_and_nothing_else(tmp_path: Path, kind: str, older: bool, fail: Any) -> None:
    target = tmp_path / "out"
    if older:
        write_checkpoint(make_plan("hf"), read, target)
    before = content_of(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        fail(patch, kind)
        with pytest.raises(SaveError, match=r"out cannot be written: .*(No space left|Input/output|Permission denied)"):
            write_checkpoint(make_plan(kind, torch.bfloat16), read, target)
    assert content_of(tmp_path) == before
    assert list(tmp_path.iterdir()) == ([target] if older else [])
    write_checkpoint(make_plan(kind, torch.bfloat16), read, target)  # and the next attempt works
    assert open_checkpoint(target, hf_config(CONFIG)).form.kind == kind
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("error", [FormatError("the source ends early"), KeyboardInterrupt()], ids=["FormatError", "KeyboardInterrupt"])
def test_source_that_fails_leaves_nothing(tmp_path: Path, kind: str, error: BaseException) -> None:
    def stumble(name: str, where: Any) -> torch.Tensor:
        if "layers.1" in name:
            raise error
        return read(name, where)

    with pytest.raises(type(error)):
        write_checkpoint(make_plan(kind), stumble, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_check_looks_before_the_folder_has_its_name_and_can_refuse_it(tmp_path: Path) -> None:
    seen: list[Path] = []

    def refuse(folder: Path) -> dict[str, object]:
        seen.append(folder)
        assert not (tmp_path / "out").exists()
        assert torch.equal(load_file(folder / "model.safetensors")[EMBEDDING], TENSORS[EMBEDDING])
        raise SaveError("it is not what was trained")

    with pytest.raises(SaveError, match="not what was trained"):
        write_checkpoint(make_plan("hf"), read, tmp_path / "out", check=refuse)
    assert [folder.name for folder in seen] == [f".out{STAGING}"]
    assert list(tmp_path.iterdir()) == []
    assert write_checkpoint(make_plan("hf"), read, tmp_path / "out", check=lambda _: {"fact": 1}) == {"fact": 1}


def test_older_folder_is_replaced_only_when_the_new_one_is_whole(tmp_path: Path) -> None:
    write_checkpoint(make_plan("hf"), read, tmp_path / "out")
    before = content_of(tmp_path / "out")

    def look(_: Path) -> dict[str, object]:
        assert content_of(tmp_path / "out") == before
        return {}

    write_checkpoint(make_plan("hf", torch.bfloat16), read, tmp_path / "out", check=look)
    assert load_file(tmp_path / "out/model.safetensors")[EMBEDDING].dtype == torch.bfloat16
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_folder_of_others_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match="was not written by a run"):
        write_checkpoint(make_plan("hf"), read, tmp_path / "out")
    assert content_of(tmp_path) == {"out/thesis.tex": b"mine"}


def test_what_a_killed_attempt_left_does_not_stand_in_the_way(tmp_path: Path) -> None:
    write_checkpoint(make_plan("hf"), read, tmp_path / "whole")
    shutil.move(tmp_path / "whole", tmp_path / f".out{STAGING}")
    (tmp_path / f".out{STAGING}/stray").touch()
    write_checkpoint(make_plan("meta"), read, tmp_path / "out")
    assert {*content_of(tmp_path)} == {"out/consolidated.00.pth", "out/manifest.json"}
