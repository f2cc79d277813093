"""What a stranger's files may hold, and what may happen meanwhile: nothing of it passes in silence."""

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TOKENIZER
from foreign import hf_to_meta, make_hf, make_meta, make_single, make_torchtitan_dcp
from safetensors.torch import save_file

from tunelib.checkpoint.dcp_reader import SafeReader
from tunelib.errors import ConfigError, FormatError, SaveError
from tunelib.formats.compare import find_difference, find_faults
from tunelib.formats.convert import convert, plan_conversion
from tunelib.formats.source import open_checkpoint
from tunelib.formats.torch_file import read_torch_file

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")


def test_meta_folder_that_lost_its_head_is_not_a_tied_model(tmp_path: Path) -> None:
    state = make_hf(tmp_path / "hf")
    make_meta(tmp_path / "meta", state, 4, 2)
    path = tmp_path / "meta/consolidated.00.pth"
    held = torch.load(path, weights_only=True)
    del held["output.weight"]
    torch.save(held, path)
    with pytest.raises(FormatError, match=r"lm_head\.weight is missing"):
        plan_conversion(tmp_path / "meta", tmp_path / "out", "hf")


def test_head_that_equals_the_embedding_in_its_first_rows_only_is_not_tied(tmp_path: Path) -> None:
    state = make_hf(tmp_path / "hf", tied=True)
    head = state["model.embed_tokens.weight"].clone()
    head[-1] += 1
    make_meta(tmp_path / "meta", state | {"lm_head.weight": head}, 4, 2)
    with pytest.raises(FormatError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        plan_conversion(tmp_path / "meta", tmp_path / "out", "hf")


def test_two_names_of_one_weight_are_refused(tmp_path: Path) -> None:
    state = make_hf(tmp_path / "hf")
    make_meta(tmp_path / "meta", state, 4, 2)
    path = tmp_path / "meta/consolidated.00.pth"
    torch.save(torch.load(path, weights_only=True) | {"model.norm.weight": torch.full((32,), 7.0)}, path)
    with pytest.raises(FormatError, match=r"holds model\.norm\.weight twice, as norm\.weight and as model\.norm\.weight"):
        open_checkpoint(tmp_path / "meta")
    wrapped = {f"_orig_mod.{name}": tensor for name, tensor in state.items()} | {"model.norm.weight": torch.full((32,), 7.0)}
    (tmp_path / "torch").mkdir()
    make_single(tmp_path / "torch/model.pt", wrapped)
    shutil.copy(tmp_path / "hf/config.json", tmp_path / "torch")
    with pytest.raises(FormatError, match=r"twice, as _orig_mod\.model\.norm\.weight and as model\.norm\.weight"):
        open_checkpoint(tmp_path / "torch")


def test_parts_of_two_types_are_refused_and_not_rounded(tmp_path: Path) -> None:
    state = make_hf(tmp_path / "hf", dtype=torch.float32)
    make_meta(tmp_path / "meta", state, 4, 2, model_parallel=2)
    path = tmp_path / "meta/consolidated.00.pth"
    torch.save({name: tensor.bfloat16() if tensor.ndim > 1 else tensor for name, tensor in torch.load(path, weights_only=True).items()}, path)
    with pytest.raises(FormatError, match=r"is bfloat16 in one place and float32 in another"):
        plan_conversion(tmp_path / "meta", tmp_path / "out", "hf")


@pytest.mark.parametrize("kind", ["hf", "meta", "dcp", "torch"])
def test_number_that_the_type_cannot_hold_is_refused_and_not_infinite(tmp_path: Path, kind: str) -> None:
    state = make_hf(tmp_path / "hf")
    state["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e5
    save_file(state, tmp_path / "hf/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match=r"up_proj\.weight holds 1e\+05, which float16 cannot"):
        convert(plan_conversion(tmp_path / "hf", tmp_path / "out", kind, dtype="float16"))
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    convert(plan_conversion(tmp_path / "hf", tmp_path / "out", kind, dtype="bfloat16"))


def test_damage_that_the_manifest_knows_of_is_not_passed_on(tmp_path: Path) -> None:
    make_hf(tmp_path / "hf")
    convert(plan_conversion(tmp_path / "hf", tmp_path / "ours", "hf"))
    path = tmp_path / "ours/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(FormatError, match=r"model\.safetensors is damaged: its checksum"):
        plan_conversion(tmp_path / "ours", tmp_path / "out", "dcp")


def test_two_conversions_to_one_name_do_not_meet(tmp_path: Path) -> None:
    make_hf(tmp_path / "hf")
    first, second = (plan_conversion(tmp_path / "hf", tmp_path / "out", kind) for kind in ("dcp", "meta"))
    refusals: list[str] = []

    def start_another(_: int) -> None:
        if not refusals:
            with pytest.raises(ConfigError) as caught:
                convert(second)
            refusals.append(str(caught.value))

    convert(first, start_another)
    assert "another process is writing" in refusals[0]
    assert open_checkpoint(tmp_path / "out").form.kind == "dcp"
    with pytest.raises(SaveError, match="cannot be written"):
        convert(second)  # planned when the name was free
    assert open_checkpoint(tmp_path / "out").form.kind == "dcp"


def test_file_that_appeared_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    make_hf(tmp_path / "hf")
    conversion = plan_conversion(tmp_path / "hf", tmp_path / "x.pt", "torch")
    (tmp_path / "x.pt").write_text("precious")
    with pytest.raises(SaveError, match="cannot be written"):
        convert(conversion)
    assert (tmp_path / "x.pt").read_text() == "precious"


def test_names_of_the_likeness_are_kept_in_every_form(tmp_path: Path) -> None:
    state = make_hf(tmp_path / "hf")
    shutil.copytree(tmp_path / "hf", tmp_path / "titan")
    (tmp_path / "titan/model.safetensors").unlink()
    titan = make_torchtitan_dcp(tmp_path / "titan", state, 4, 2, nested=True)
    convert(plan_conversion(tmp_path / "titan", tmp_path / "again", "dcp"))
    convert(plan_conversion(tmp_path / "hf", tmp_path / "alike", "dcp", like_path=tmp_path / "titan"))
    for folder in ("again", "alike"):
        metadata = SafeReader(tmp_path / folder).read_metadata()
        assert set(metadata.state_dict_metadata) == {f"model.{name}" for name in titan if name != "freqs_cis"}
    shutil.copytree(tmp_path / "hf", tmp_path / "named")
    (tmp_path / "named/model.safetensors").unlink()
    make_single(tmp_path / "named/weights.pt", hf_to_meta(state, 4, 2, 8))
    convert(plan_conversion(tmp_path / "hf", tmp_path / "file", "torch", like_path=tmp_path / "named"))
    assert torch.load(tmp_path / "file/weights.pt", weights_only=True).keys() == torch.load(tmp_path / "named/weights.pt", weights_only=True).keys()


def test_manifest_of_another_program_is_not_ours(tmp_path: Path) -> None:
    make_hf(tmp_path / "hf")
    (tmp_path / "hf/manifest.json").write_text(json.dumps({"name": "an app"}))
    assert find_faults(open_checkpoint(tmp_path / "hf")) == []
    convert(plan_conversion(tmp_path / "hf", tmp_path / "out", "torch"))


@pytest.mark.parametrize("make", [lambda path, state: torch.save(state, path), make_single])
def test_every_flipped_bit_that_says_where_tensors_lie_is_found(tmp_path: Path, make: Callable[[Path, Any], None]) -> None:
    """The small record that names the tensors has a checksum, at which torch does not look."""
    path = tmp_path / "model.pt"
    state = {"model.embed_tokens.weight": torch.randn(6, 4), "b": torch.randn(5), "c": torch.randn(3, 3).t()}
    make(path, state)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        record = next(record for record in archive.infolist() if record.filename.endswith("data.pkl"))
        begin = content.index(archive.read(record))
    for place in range(begin, begin + record.file_size):
        for bit in (1, 16):
            path.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
            with pytest.raises(FormatError):
                read_torch_file(path)


def test_likeness_needs_no_weights(tmp_path: Path) -> None:
    state = make_hf(tmp_path / "hf", tokenizer=TOKENIZER)
    make_single(tmp_path / "model.pt", state)
    shutil.copytree(tmp_path / "hf", tmp_path / "words")
    (tmp_path / "words/model.safetensors").unlink()
    convert(plan_conversion(tmp_path / "model.pt", tmp_path / "out", "hf", like_path=tmp_path / "words"))
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (TOKENIZER / "tokenizer.json").read_bytes()
    assert find_difference(open_checkpoint(tmp_path / "hf"), open_checkpoint(tmp_path / "out")) == ""


def test_nothing_is_written_into_what_is_read(tmp_path: Path) -> None:
    make_hf(tmp_path / "hf")
    with pytest.raises(FormatError, match=r"lies in .*hf, which is only read"):
        plan_conversion(tmp_path / "hf", tmp_path / "hf/out", "dcp")


@pytest.mark.parametrize("kind", ["torch", "dcp", "hf"])
def test_flipped_bytes_of_a_file_with_checksums_of_its_own_are_found_without_a_manifest(tmp_path: Path, kind: str) -> None:
    state = make_hf(tmp_path / "hf", as_bin=kind == "hf")
    if kind != "hf":
        convert(plan_conversion(tmp_path / "hf", tmp_path / "out", kind))
        (tmp_path / "out/manifest.json").unlink()
    folder = tmp_path / ("hf" if kind == "hf" else "out")
    assert find_faults(open_checkpoint(folder)) == []
    path = next(path for path in folder.iterdir() if path.suffix in (".pt", ".bin", ".distcp"))
    content = bytearray(path.read_bytes())
    content[content.index(state["model.layers.1.mlp.up_proj.weight"].numpy().tobytes()) + 99] ^= 1
    path.write_bytes(content)
    assert any("the checksum of its record" in fault for fault in find_faults(open_checkpoint(folder)))
