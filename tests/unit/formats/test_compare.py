"""A checkpoint is whole or its faults are named; two are the same or the first difference is, whatever their forms."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import make_meta
from safetensors.torch import save_file
from unit.samples import TINY_FIELDS, tiny_model

import tunelib.formats.tensors as module
from tunelib import files
from tunelib.checkpoint.state import model_tensors
from tunelib.errors import FormatError
from tunelib.formats.compare import find_difference, find_faults
from tunelib.formats.source import StoredModel, open_checkpoint

UP, NORM = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"
State = dict[str, torch.Tensor]


@pytest.fixture
def tensors() -> State:
    return {name: tensor.clone() for name, tensor in model_tensors(tiny_model(torch.float32, intermediate_size=88)).items()}


def write(folder: Path, tensors: State, manifest: bool = False, **changes: Any) -> StoredModel:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY_FIELDS | {"intermediate_size": 88, "max_position_embeddings": 4096} | changes))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    if manifest:
        described = files.describe_files(folder, files.list_files(folder))
        (folder / files.MANIFEST).write_text(json.dumps({"format": files.OLDER_FORMAT, "files": described}))
    return open_checkpoint(folder)


def with_one_changed(tensors: State, name: str, *changes: tuple[tuple[int, ...], float]) -> State:
    changed = tensors[name].clone()
    for place, value in changes:
        changed[place] = value
    return tensors | {name: changed}


# Whole


@pytest.mark.parametrize("manifest", [False, True])
def test_whole_checkpoint_has_no_faults_and_every_byte_is_looked_at(tmp_path: Path, tensors: State, manifest: bool) -> None:
    counts: list[int] = []
    assert find_faults(write(tmp_path / "a", tensors, manifest), counts.append) == []
    assert sum(counts) == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_counted_by_weight(tmp_path: Path, tensors: State, monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 100)  # they lie in several blocks
    bad = with_one_changed(tensors, UP, ((3, 4), value), ((87, 31), value))
    assert find_faults(write(tmp_path / "a", bad)) == [f"{tmp_path / 'a'}: {UP}: 2 of 2816 numbers are not finite"]


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_file_that_is_not_what_the_manifest_says_is_named(tmp_path: Path, tensors: State, file: str) -> None:
    stored = write(tmp_path / "a", tensors, manifest=True)
    content = bytearray((tmp_path / "a" / file).read_bytes())
    content[-1] ^= 1
    (tmp_path / "a" / file).write_bytes(content)
    assert find_faults(stored) == [f"{tmp_path / 'a' / file} is damaged: its checksum is not the one in manifest.json"]


def test_all_faults_are_told_at_once(tmp_path: Path, tensors: State) -> None:
    stored = write(tmp_path / "a", with_one_changed(tensors, UP, ((0, 0), float("nan"))) | {"extra": torch.ones(1)}, manifest=True)
    (tmp_path / "a/config.json").unlink()
    faults = find_faults(stored)
    assert len(faults) == 3
    for words in ("config.json is missing", "extra is not part of the model", f"{UP}: 1 of 2816"):
        assert any(words in fault for fault in faults), words


def test_tensor_that_cannot_be_read_is_a_fault_and_the_others_are_looked_at(tmp_path: Path, tensors: State) -> None:
    stored = write(tmp_path / "a", with_one_changed(tensors, "model.embed_tokens.weight", ((0, 0), float("nan"))))
    path = tmp_path / "a/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])  # after the headers were read
    faults = find_faults(stored)
    assert len(faults) == 2
    assert any("model.safetensors is truncated" in fault for fault in faults)
    assert any("model.embed_tokens.weight: 1 of" in fault for fault in faults)


# Two of them


def test_same_weights_in_other_forms_do_not_differ(tmp_path: Path, tensors: State) -> None:
    one = write(tmp_path / "hf", tensors)
    make_meta(tmp_path / "meta", tensors, 4, 2, model_parallel=2)
    counts: list[int] = []
    difference = find_difference(one, open_checkpoint(tmp_path / "meta"), counts.append)
    assert difference == ""
    assert sum(counts) == 2 * sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("block", [10, 1 << 24])
@pytest.mark.parametrize("place", [(0, 0), (17, 5), (87, 31)])
def test_first_difference_is_named_with_its_place(tmp_path: Path, tensors: State, monkeypatch: pytest.MonkeyPatch, block: int, place: Any) -> None:
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", block)
    other = with_one_changed(with_one_changed(tensors, NORM, ((0,), 9.0)), UP, (place, tensors[UP][place].item() + 0.5))
    difference = find_difference(write(tmp_path / "a", tensors), write(tmp_path / "b", other))
    assert difference == f"{UP} differs, first at {list(place)}, near there by up to 0.5"


def test_numbers_that_are_nan_in_both_are_not_the_difference(tmp_path: Path, tensors: State) -> None:
    both = with_one_changed(tensors, UP, ((0, 0), float("nan")))
    assert find_difference(write(tmp_path / "a", both), write(tmp_path / "b", both)) == ""
    other = with_one_changed(both, UP, ((5, 6), tensors[UP][5, 6].item() + 0.5))
    assert find_difference(write(tmp_path / "c", both), write(tmp_path / "d", other)) == f"{UP} differs, first at [5, 6], near there by up to 0.5"
    lost = find_difference(write(tmp_path / "e", tensors), write(tmp_path / "f", both))
    assert lost.startswith(f"{UP} differs, first at [0, 0]")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_told_from_other_differences(tmp_path: Path, tensors: State, dtype: torch.dtype) -> None:
    one = write(tmp_path / "a", tensors)
    rounded = write(tmp_path / "b", {name: tensor.to(dtype) for name, tensor in tensors.items()})
    for difference in (find_difference(one, rounded), find_difference(rounded, one)):
        assert difference.endswith("every value is the same once rounded")
    moved = with_one_changed(tensors, UP, ((2, 2), 1.0))
    difference = find_difference(one, write(tmp_path / "c", {name: tensor.to(dtype) for name, tensor in moved.items()}))
    assert difference.startswith(f"{UP} differs, first at [2, 2]")


def test_models_that_compute_otherwise_differ_before_a_weight_is_read(tmp_path: Path, tensors: State) -> None:
    one = write(tmp_path / "a", tensors)
    for number, changes in enumerate([{"rope_theta": 5e5}, {"rms_norm_eps": 1e-6}, {"num_attention_heads": 2, "head_dim": 16}]):
        difference = find_difference(one, write(tmp_path / str(number), tensors, **changes))
        assert difference.startswith("the configs differ: ")
        assert all(name in difference for name in changes)
    assert find_difference(one, write(tmp_path / "longer", tensors, max_position_embeddings=9999, initializer_range=0.5)) == ""


def test_weight_that_one_lacks_and_a_shape_that_is_another_are_named(tmp_path: Path, tensors: State) -> None:
    one = write(tmp_path / "a", tensors)
    fewer = write(tmp_path / "b", {name: tensor for name, tensor in tensors.items() if name != UP})
    assert find_difference(one, fewer) == f"{UP} is missing in {tmp_path / 'b'}"
    assert find_difference(fewer, one) == f"{UP} is missing in {tmp_path / 'b'}"
    other = write(tmp_path / "c", tensors | {UP: tensors[UP][:-1].clone()})
    assert find_difference(one, other) == f"{UP} has shape [88, 32] in {tmp_path / 'a'} and [87, 32] in {tmp_path / 'c'}"


def test_file_that_ends_early_is_an_error_and_not_a_difference(tmp_path: Path, tensors: State) -> None:
    one, other = write(tmp_path / "a", tensors), write(tmp_path / "b", tensors)
    path = tmp_path / "b/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FormatError, match=r"b/model\.safetensors is truncated"):
        find_difference(one, other)


def test_sign_of_zero_is_a_difference(tmp_path: Path, tensors: State) -> None:
    one, other = (with_one_changed(tensors, UP, ((4, 4), value)) for value in (0.0, -0.0))
    assert find_difference(write(tmp_path / "a", one), write(tmp_path / "b", other)) == f"{UP} differs, first at [4, 4], near there by up to 0"
