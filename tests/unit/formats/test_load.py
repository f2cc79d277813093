"""A model finds its weights in a Hugging Face folder, a DCP folder, or nowhere; what does not fit is said before storage is given."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from unit.samples import TINY_FIELDS, tiny_config, tiny_model

from tunelib.checkpoint.dcp_writer import save_tensors
from tunelib.checkpoint.state import model_tensors
from tunelib.config.schema import Model, RopeScaling
from tunelib.config.sizes import SIZES
from tunelib.errors import FormatError
from tunelib.formats.load import Weights, check_weights, find_weights, give_weights
from tunelib.model.decoder import build_on_meta
from tunelib.model.families import hf_config, parse_config


def write_hf(folder: Path, tensors: dict[str, torch.Tensor], **changes: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(TINY_FIELDS | changes))
    save_file(tensors, folder / "model.safetensors")
    return folder


def write_dcp(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_tensors(tensors, folder)
    (folder / "config.json").write_text(json.dumps(hf_config(tiny_config())))
    return folder


def load_from(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    weights = find_weights(Model(), str(folder), 0, 8)
    model = build_on_meta(weights.config, dtype)
    check_weights(weights)
    model.to_empty(device="cpu")
    model.tie_weights()
    give_weights(model, weights, seed=0)
    return model_tensors(model)


@pytest.mark.parametrize("write", [write_hf, write_dcp])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_arrive_as_they_lie_there(tmp_path: Path, write, dtype: torch.dtype) -> None:
    stored = {name: tensor.to(dtype) for name, tensor in model_tensors(tiny_model(torch.float32)).items()}
    loaded = load_from(write(tmp_path / "in", stored))
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[name], stored[name].float()) for name in stored)


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    stored = model_tensors(tiny_model(torch.float32, tie_word_embeddings=True))
    loaded = load_from(write_hf(tmp_path / "in", stored, tie_word_embeddings=True))
    assert "lm_head.weight" not in loaded
    assert torch.equal(loaded["model.embed_tokens.weight"], stored["model.embed_tokens.weight"])


@pytest.mark.parametrize("write", [write_hf, write_dcp])
def test_weights_that_do_not_fit_are_refused_by_name_before_storage_is_given(tmp_path: Path, write) -> None:
    stored = model_tensors(tiny_model(torch.float32))
    missing = {name: tensor for name, tensor in stored.items() if name != "model.norm.weight"}
    for number, (tensors, words) in enumerate(
        [
            (missing, r"model\.norm\.weight.* missing"),
            (stored | {"model.norm.weight": torch.ones(5)}, r"model\.norm\.weight.*\[5\] instead of \[32\]"),
        ]
    ):
        folder = write(tmp_path / str(number), tensors)
        weights = find_weights(Model(), str(folder), 0, 8)
        model = build_on_meta(weights.config, torch.float32)
        with pytest.raises(FormatError, match=words):
            check_weights(weights)
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_dcp_folder_of_others_is_said_to_be_unverified(tmp_path: Path) -> None:
    folder = write_dcp(tmp_path / "in", model_tensors(tiny_model(torch.float32)))
    assert "unverified" in find_weights(Model(), str(folder), 0, 8).sentence


def test_path_that_is_no_folder_is_refused_by_its_key(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"checkpoint\.initial_load_path: .*none does not exist"):
        find_weights(Model(), str(tmp_path / "none"), 0, 8)


def test_model_without_a_folder_is_what_the_section_says() -> None:
    fields = {name: value for name, value in TINY_FIELDS.items() if name != "architectures"}
    assert find_weights(Model(**fields), "", 7, 8).config == tiny_config()


def test_unset_fields_follow_the_tokenizer_and_the_rows() -> None:
    fields = {name: value for name, value in TINY_FIELDS.items() if name not in ("architectures", "vocab_size", "max_position_embeddings")}
    config = find_weights(Model(**fields), "", 641, 96).config
    assert (config.vocab_size, config.max_position_embeddings) == (642, 96)  # an even vocabulary


def test_named_size_may_have_some_fields_replaced() -> None:
    base = parse_config({"architectures": ["LlamaForCausalLM"], **SIZES["llama3.2-1b"]}, "size")
    changed = find_weights(Model(flavor="llama3.2-1b", num_hidden_layers=2, rope_scaling=RopeScaling("llama3", factor=8.0)), "", 7, 8).config
    assert (changed.num_hidden_layers, changed.hidden_size, changed.tie_word_embeddings) == (2, base.hidden_size, True)
    assert changed.rope_scaling is not None
    assert changed.rope_scaling.factor == 8.0
    assert find_weights(Model(flavor="llama3.2-1b"), "", 7, 8).config == base


def test_drawn_weights_follow_from_the_seed_alone() -> None:
    def draw(seed: int) -> dict[str, torch.Tensor]:
        config = tiny_config()
        model = build_on_meta(config, torch.float32).to_empty(device="cpu")
        give_weights(model, Weights(config, ""), seed)
        return model_tensors(model)

    first, again, other = draw(1), draw(1), draw(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
