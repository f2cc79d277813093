"""A folder that leaves has the form it came in, the tokenizer that was used, and all that others need to open it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import make_meta
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from unit.samples import TINY_FIELDS, tiny_config, tiny_model, write_tokenizer

from tunelib.checkpoint.state import model_tensors
from tunelib.data.tokenizer import Tokenizer
from tunelib.errors import FormatError
from tunelib.files import find_damage, read_manifest
from tunelib.formats.export import find_companions, plan_checkpoint
from tunelib.formats.found import SAFETENSORS
from tunelib.formats.live import LiveWeights
from tunelib.formats.load import Weights, plan_export_of
from tunelib.formats.plan import Plan, Wish
from tunelib.formats.source import expected_shapes, open_checkpoint
from tunelib.formats.tensors import TensorInfo
from tunelib.formats.write import write_checkpoint
from tunelib.model.decoder import Decoder
from tunelib.model.families import hf_config

INDEX_FILE = f"{SAFETENSORS}.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def save_reference(folder: Path, shard_size: str = "5GB", dtype: torch.dtype = torch.float32, **changes: Any) -> LlamaForCausalLM:
    """A folder that transformers wrote."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(TINY_FIELDS | changes))).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard_size)
    write_tokenizer(folder, ["<s>", "</s>"], "{{ messages[0]['content'] }}", bos_token="<s>", eos_token="</s>")
    return model


def write(plan: Plan, model: Decoder, target: Path) -> None:
    write_checkpoint(plan, LiveWeights(model).read, target)


def export(
    source: Path | None,
    target: Path,
    dtype: torch.dtype | None = None,
    tokenizer_folder: Path | None = None,
    chat_template: str | None = None,
    stop_ids: frozenset[int] = frozenset(),
    **changes: Any,
) -> dict[str, torch.Tensor]:
    """Export a drawn model as the run would that started from ``source``; returns its parameters."""
    model = tiny_model(torch.float32, **changes)
    weights = Weights(model.config, "", open_checkpoint(source) if source else None)
    plan = plan_export_of(model, weights, Tokenizer(tokenizer_folder) if tokenizer_folder else None, chat_template, stop_ids, dtype)
    write(plan, model, target)
    return model_tensors(model)


def write_folder(folder: Path, tensors: dict[str, torch.Tensor], **changes: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(TINY_FIELDS | changes))
    save_file(tensors, folder / SAFETENSORS)
    return folder


# Form


@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}], ids=["untied", "tied"])
def test_export_of_untouched_weights_is_the_folder_that_came_in(tmp_path: Path, shard_size: str, changes: dict[str, Any]) -> None:
    save_reference(tmp_path / "in", shard_size, torch.bfloat16, **changes)
    source = open_checkpoint(tmp_path / "in")
    model = tiny_model(torch.float32, **changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(source.read(name))
    write(plan_export_of(model, Weights(model.config, "", source), None, None, frozenset(), None), model, tmp_path / "out")
    files = sorted(path.name for path in (tmp_path / "in").glob("*.safetensors"))
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == files
    assert (len(files) > 1) == (shard_size == "20KB")
    for name in files:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "in" / name).read_bytes()
    companions = ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", *([INDEX_FILE] if len(files) > 1 else [])]
    for name in companions:
        assert json.loads((tmp_path / "out" / name).read_text()) == json.loads((tmp_path / "in" / name).read_text()), name


def test_trained_weights_lie_where_the_untrained_ones_did(tmp_path: Path) -> None:
    save_reference(tmp_path / "in", shard_size="20KB")
    parameters = export(tmp_path / "in", tmp_path / "out")
    for path in (tmp_path / "in").glob("*.safetensors"):
        after = load_file(tmp_path / "out" / path.name)
        assert after.keys() == load_file(path).keys()
        assert all(torch.equal(tensor, parameters[name]) for name, tensor in after.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_export_has_the_type_asked_for_and_its_config_says_so(tmp_path: Path, dtype: torch.dtype) -> None:
    save_reference(tmp_path / "in", dtype=torch.bfloat16)
    parameters = export(tmp_path / "in", tmp_path / "out", dtype)
    tensors = load_file(tmp_path / "out" / SAFETENSORS)
    assert all(torch.equal(tensor, parameters[name].to(dtype)) for name, tensor in tensors.items())
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == str(dtype).removeprefix("torch.")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == dtype


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}], ids=["untied", "tied"])
def test_model_drawn_here_opens_in_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer", ["<s>", "</s>"], bos_token="<s>", eos_token="</s>")
    parameters = export(None, tmp_path / "out", tokenizer_folder=tokenizer, **changes)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert opened.dtype == torch.float32
    assert all(torch.equal(tensor, parameters[name]) for name, tensor in opened.named_parameters())
    assert (opened.config.bos_token_id, opened.config.eos_token_id, opened.generation_config.eos_token_id) == (0, 1, 1)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a")["input_ids"] == Tokenizer(tokenizer).encode("a", add_special_tokens=False).ids


def test_derived_tensors_of_old_exports_do_not_leave(tmp_path: Path) -> None:
    tensors = model_tensors(tiny_model(torch.float32))
    derived = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    export(write_folder(tmp_path / "in", {**tensors, **derived}), tmp_path / "out")
    assert load_file(tmp_path / "out" / SAFETENSORS).keys() == tensors.keys()


def test_stored_copy_of_a_tied_head_leaves_as_the_embedding(tmp_path: Path) -> None:
    tensors = model_tensors(tiny_model(torch.float32, tie_word_embeddings=True))
    folder = write_folder(tmp_path / "in", {**tensors, HEAD: tensors[EMBEDDING].clone()}, tie_word_embeddings=True)
    parameters = export(folder, tmp_path / "out", tie_word_embeddings=True)
    assert torch.equal(load_file(tmp_path / "out" / SAFETENSORS)[HEAD], parameters[EMBEDDING])


def test_export_carries_a_manifest_that_verifies(tmp_path: Path) -> None:
    export(None, tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    assert manifest["kind"] == "export"
    assert find_damage(tmp_path / "out", manifest["files"], manifest["files"]) == []
    assert {*manifest["files"], "manifest.json"} == {path.name for path in (tmp_path / "out").iterdir()}


# Tokenizer, and how to generate


def test_exported_tokenizer_is_the_one_that_the_run_used(tmp_path: Path) -> None:
    save_reference(tmp_path / "in")
    own = write_tokenizer(tmp_path / "own", ["<own>"], "own template", pad_token="<own>")
    export(tmp_path / "in", tmp_path / "out", tokenizer_folder=own)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_text() == (own / name).read_text()


def test_template_that_was_trained_with_leaves_with_the_weights(tmp_path: Path) -> None:
    own = write_tokenizer(tmp_path / "own", ["<own>"], "the tokenizer's own template")
    export(None, tmp_path / "out", tokenizer_folder=own, chat_template="{{ messages[0].content }}!")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a!"


@pytest.mark.parametrize(
    ("found", "stop_ids", "expected"),
    [
        (None, {1}, 1),
        (None, {1, 7}, [1, 7]),
        ({"eos_token_id": 1, "temperature": 0.6}, {1}, 1),
        ({"eos_token_id": 1, "temperature": 0.6}, {1, 7}, [1, 7]),
        ({"eos_token_id": [1, 5]}, {7}, [1, 5, 7]),
        ({"temperature": 0.6}, {7}, 7),
    ],
)
def test_generation_stops_where_training_taught_it_to(tmp_path: Path, found: dict[str, Any] | None, stop_ids: set[int], expected: Any) -> None:
    if found is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(found))
    content = find_companions(tmp_path, None, {"eos_token_id": 1}, None, frozenset(stop_ids))["generation_config.json"]
    settings = json.loads(content.read_text() if isinstance(content, Path) else content)
    assert settings["eos_token_id"] == expected
    assert {name: settings[name] for name in (found or {}) if name != "eos_token_id"} == {
        n: v for n, v in (found or {}).items() if n != "eos_token_id"
    }


# Meta's folder


def plan_meta(home: Path, **changes: Any) -> Plan:
    config = tiny_config(intermediate_size=88, **changes)
    weights = {name: TensorInfo(name, torch.float32, tuple(shape)) for name, shape in expected_shapes(config).items()}
    return plan_checkpoint(Wish("meta"), None, weights, hf_config(config), home, None, None, frozenset())


def params_of(plan: Plan) -> dict[str, Any]:
    content = plan.companions["params.json"]
    assert isinstance(content, str)
    return json.loads(content)


def test_what_params_json_has_no_key_for_is_a_note_and_not_an_error(tmp_path: Path) -> None:
    plan = plan_meta(tmp_path, max_position_embeddings=777, initializer_range=0.041)
    notes = [note for note in plan.notes if "params.json" in note]
    assert len(notes) == 2
    assert any("max_position_embeddings" in note and "777" in note for note in notes)
    assert any("initializer_range" in note and "0.041" in note for note in notes)
    assert not [note for note in plan_meta(tmp_path, max_position_embeddings=4096).notes if "params.json" in note]


@pytest.mark.parametrize(("changes", "words"), [({"head_dim": 16}, "head_dim = 16"), ({"attention_bias": True}, "attention_bias")])
def test_what_params_json_cannot_express_is_an_error(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(FormatError, match=words):
        plan_meta(tmp_path, **changes)


def test_params_that_lie_there_stay_as_they_are(tmp_path: Path) -> None:
    make_meta(tmp_path, model_tensors(tiny_model(torch.float32, intermediate_size=88)), 4, 2)
    own = json.loads((tmp_path / "params.json").read_text()) | {"vocab_size": -1, "max_batch_size": 3}
    (tmp_path / "params.json").write_text(json.dumps(own))
    assert params_of(plan_meta(tmp_path)) == own


@pytest.mark.parametrize(
    "other",
    [{"dim": 64, "n_layers": 2, "n_heads": 4}, {"dim": 32, "n_layers": 2, "head_dim": 8, "hidden_dim": 88, "n_heads": 4}, {"n_layers": 2}],
    ids=["another model's", "with keys of others", "incomplete"],
)
def test_params_that_do_not_describe_the_model_are_not_taken_along(tmp_path: Path, other: dict[str, Any]) -> None:
    (tmp_path / "params.json").write_text(json.dumps(other))
    params = params_of(plan_meta(tmp_path))
    (tmp_path / "params.json").unlink()
    assert params == params_of(plan_meta(tmp_path))
    assert (params["dim"], params["n_kv_heads"]) == (32, 2)


def test_missing_tokenizer_model_is_a_note(tmp_path: Path) -> None:
    assert any("no tokenizer.model" in note for note in plan_meta(tmp_path).notes)
    (tmp_path / "original").mkdir()
    (tmp_path / "original/tokenizer.model").write_bytes(b"x")
    plan = plan_meta(tmp_path)
    assert plan.companions["tokenizer.model"] == b"x"
    assert not any("no tokenizer.model" in note for note in plan.notes)
