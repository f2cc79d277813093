"""The makers of tests/foreign.py are right: what they write, its own tools read, and a forward pass in Meta's form agrees."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign
import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from conftest import TOKENIZER
from foreign import DAMAGE, DAMAGE_META, State, hf_to_meta, logits, make_hf, make_meta, make_torchtitan_dcp, meta_params, meta_to_hf
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

TOKENS = torch.randint(0, 96, (2, 100), generator=torch.Generator().manual_seed(1))
ALONE = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
SHAPES: dict[str, dict[str, Any]] = {
    "grouped": {},
    "one head each": {"kv_heads": 4},
    "tied": {"tied": True},
    "scaled": {"scaling": True},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
}


def equal(first: State, second: State) -> bool:
    return first.keys() == second.keys() and all(first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first)


# Hugging Face


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_opens_every_form_alike(tmp_path: Path, shape: str) -> None:
    options = SHAPES[shape]
    state = make_hf(tmp_path / "one", **options)
    expected = logits(tmp_path / "one", TOKENS)
    assert expected.std() > 1  # a difference would show
    for number, form in enumerate([{"shards": 3}, {"as_bin": True}, {"as_bin": True, "shards": 3}, {"old_config": True}]):
        folder = tmp_path / str(number)
        found = make_hf(folder, **options, **form)
        stored = found.pop("lm_head.weight") if options.get("tied") and form.get("as_bin") else None
        assert equal(found, state)
        assert stored is None or torch.equal(stored, state["model.embed_tokens.weight"])
        assert len([*folder.glob("*.safetensors"), *folder.glob("*.bin")]) == form.get("shards", 1)
        assert len([*folder.glob("*.index.json")]) == (form.get("shards", 1) > 1)
        assert {"config.json", "generation_config.json"} <= {path.name for path in folder.iterdir()}
        assert torch.equal(logits(folder, TOKENS), expected)


def test_options_and_seeds_make_other_models(tmp_path: Path) -> None:
    tokens, found = TOKENS, []
    for number, options in enumerate([{}, {"seed": 1}, {"tied": True}, {"kv_heads": 4}, {"scaling": True}, {"rope_parameters": {"rope_theta": 5e5}}]):
        make_hf(tmp_path / str(number), **options)
        found.append(logits(tmp_path / str(number), tokens))
    assert all((first - second).abs().max() > 0.05 for n, first in enumerate(found) for second in found[:n])


def test_makers_leave_the_random_numbers_of_others_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    logits(make_hf(tmp_path), TOKENS)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("shape", ["grouped", "one head each", "tied"])
def test_state_computes_what_its_folder_does(tmp_path: Path, shape: str) -> None:
    state = make_hf(tmp_path, **SHAPES[shape])
    assert torch.equal(logits(state, TOKENS, max_position_embeddings=256), logits(tmp_path, TOKENS))


def test_tokenizer_comes_along_and_the_vocabulary_follows(tmp_path: Path) -> None:
    state = make_hf(tmp_path, tokenizer=TOKENIZER)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["vocab_size"] == len(tokenizer) == len(state["model.embed_tokens.weight"])
    assert (config["bos_token_id"], config["eos_token_id"]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_files_of_torch_hold_the_tensors(tmp_path: Path) -> None:
    state = make_hf(tmp_path / "hf")
    foreign.legacy_bin(tmp_path / "legacy.bin", state)
    foreign.make_single(tmp_path / "flat.pt", state)
    foreign.make_single(tmp_path / "nested.pt", state, nested=True)
    assert (tmp_path / "flat.pt").read_bytes().startswith(b"PK")
    assert not (tmp_path / "legacy.bin").read_bytes().startswith(b"PK")
    for name in ("legacy.bin", "flat.pt", "nested.pt"):
        found = torch.load(tmp_path / name, weights_only=True)
        assert equal(found["model"] if "nested" in name else found, state)


# Meta


def run_meta(state: State, params: dict[str, Any], tokens: Tensor) -> Tensor:
    """Llama with complex rotations of neighbouring pairs, from Meta's tensors and params.json."""
    heads, kv_heads, eps = params["n_heads"], params.get("n_kv_heads", params["n_heads"]), params["norm_eps"]
    head_dim, length = params["dim"] // heads, tokens.shape[1]
    angles = torch.outer(torch.arange(length).float(), 1.0 / 10_000.0 ** (torch.arange(0, head_dim, 2).float() / head_dim))
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]  # (S, 1, D / 2)

    def rotate(x: Tensor) -> Tensor:  # (B, S, H, D)
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turns).flatten(-2)

    x = state["tok_embeddings.weight"][tokens]
    for layer in range(params["n_layers"]):
        w = {name.removeprefix(f"layers.{layer}."): tensor for name, tensor in state.items() if name.startswith(f"layers.{layer}.")}
        h = F.rms_norm(x, x.shape[-1:], w["attention_norm.weight"], eps)
        q = rotate((h @ w["attention.wq.weight"].T).unflatten(-1, (heads, head_dim)))
        k = rotate((h @ w["attention.wk.weight"].T).unflatten(-1, (kv_heads, head_dim)))
        v = (h @ w["attention.wv.weight"].T).unflatten(-1, (kv_heads, head_dim))
        q, k, v = (part.transpose(1, 2) for part in (q, k.repeat_interleave(heads // kv_heads, 2), v.repeat_interleave(heads // kv_heads, 2)))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
        x = x + attended @ w["attention.wo.weight"].T
        h = F.rms_norm(x, x.shape[-1:], w["ffn_norm.weight"], eps)
        x = x + (F.silu(h @ w["feed_forward.w1.weight"].T) * (h @ w["feed_forward.w3.weight"].T)) @ w["feed_forward.w2.weight"].T
    return F.rms_norm(x, x.shape[-1:], state["norm.weight"], eps) @ state["output.weight"].T


@pytest.mark.parametrize("shape", ["grouped", "one head each", "tied"])
def test_forward_pass_in_metas_form_agrees_with_transformers(tmp_path: Path, shape: str) -> None:
    state = make_hf(tmp_path / "hf", **SHAPES[shape])
    kv_heads = SHAPES[shape].get("kv_heads", 2)
    make_meta(tmp_path / "meta", state, 4, kv_heads)
    found = torch.load(tmp_path / "meta/consolidated.00.pth", weights_only=True)
    params = json.loads((tmp_path / "meta/params.json").read_text())
    expected = logits(tmp_path / "hf", TOKENS)
    torch.testing.assert_close(run_meta(found, params, TOKENS), expected, rtol=0, atol=1e-4)  # float32, another order of summation
    unmoved = found | {f"layers.0.attention.w{kind}.weight": state[f"model.layers.0.self_attn.{kind}_proj.weight"] for kind in "qk"}
    assert (run_meta(unmoved, params, TOKENS) - expected).abs().max() > 0.1  # the order of the rows matters


@pytest.mark.parametrize("shape", SHAPES)
def test_way_to_meta_and_back_changes_nothing(tmp_path: Path, shape: str) -> None:
    state = make_hf(tmp_path, **SHAPES[shape])
    kv_heads = SHAPES[shape].get("kv_heads", 2)
    back = meta_to_hf(hf_to_meta(state, 4, kv_heads, 8), 4, kv_heads, 8)
    if shape == "tied":
        assert torch.equal(back.pop("lm_head.weight"), state["model.embed_tokens.weight"])
    assert equal(back, state)


@pytest.mark.parametrize("embedding_split", ["columns", "rows"])
@pytest.mark.parametrize("extras", [False, True])
def test_several_files_hold_each_tensor_once_and_norms_in_each(tmp_path: Path, embedding_split: str, extras: bool) -> None:
    whole = make_meta(tmp_path, make_hf(tmp_path / "hf"), 4, 2, model_parallel=2, embedding_split=embedding_split, extras=extras)
    parts = [torch.load(tmp_path / f"consolidated.{number:02d}.pth", weights_only=True) for number in range(2)]
    assert ("rope.freqs" in whole) == extras
    for name, tensor in whole.items():
        pieces = [part[name] for part in parts]
        if tensor.ndim == 1:
            assert all(torch.equal(piece, tensor) for piece in pieces)
        else:
            columns = "wo." in name or "w2." in name or ("tok_embeddings" in name and embedding_split == "columns")
            assert torch.equal(torch.cat(pieces, dim=int(columns)), tensor)
            assert all(piece.untyped_storage().nbytes() == piece.nbytes for piece in pieces)


# torchtitan


@ALONE
@pytest.mark.parametrize(("full", "nested", "processes"), [(False, False, 1), (False, True, 1), (True, False, 1), (True, True, 1), (True, False, 2)])
def test_plain_dcp_reads_what_torchtitan_leaves(tmp_path: Path, full: bool, nested: bool, processes: int) -> None:
    whole = make_torchtitan_dcp(tmp_path / "step-10", make_hf(tmp_path / "hf"), 4, 2, full=full, nested=nested, processes=processes)
    entries = dcp.FileSystemReader(tmp_path / "step-10").read_metadata().state_dict_metadata
    prefix = "model." if nested else ""
    others = {name for name in entries if name.split(".")[0] in ("optimizer", "lr_scheduler", "train_state", "dataloader")}
    assert {name for name in entries if name not in others} == {prefix + name for name in whole}
    assert {type(entries[name]).__name__ for name in others} == ({"BytesStorageMetadata", "TensorStorageMetadata"} if full else set())
    found = {prefix + name: torch.zeros_like(tensor) for name, tensor in whole.items()}
    dcp.load(found, checkpoint_id=tmp_path / "step-10", no_dist=True)
    assert equal({name.removeprefix(prefix): tensor for name, tensor in found.items()}, whole)
    assert len(list((tmp_path / "step-10").glob("*.distcp"))) == processes
    assert len(entries[f"{prefix}norm.weight"].chunks) == processes


# Harm


@pytest.mark.parametrize("legacy", [False, True])
def test_malicious_file_runs_code_only_where_care_is_left_off(tmp_path: Path, legacy: bool) -> None:
    marker = foreign.malicious_pickle(tmp_path / "pytorch_model.bin", legacy=legacy)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert not marker.exists()
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)
    assert marker.exists()


def test_malicious_dcp_runs_code_when_its_metadata_is_read(tmp_path: Path) -> None:
    make_torchtitan_dcp(tmp_path / "made", make_hf(tmp_path / "hf"), 4, 2)
    for folder in (tmp_path / "made", tmp_path / "new"):
        marker = foreign.malicious_dcp(folder)
        assert not marker.exists()
        dcp.FileSystemReader(folder).read_metadata()
        assert marker.exists()


@ALONE
def test_malicious_entry_of_dcp_runs_code_when_it_is_loaded(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    make_torchtitan_dcp(tmp_path / "made", make_hf(tmp_path / "hf"), 4, 2, extra={"train_state": {"step": foreign.Payload(marker)}})
    dcp.FileSystemReader(tmp_path / "made").read_metadata()
    assert not marker.exists()
    dcp.load({"train_state": {"step": 0}}, checkpoint_id=tmp_path / "made", no_dist=True)
    assert marker.exists()


# Damage


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def check_one_change(folder: Path, damage: Callable[[Path], Any], most: int) -> None:
    before = content_of(folder)
    damage(folder)
    after = content_of(folder)
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    assert 1 <= len(changed) <= most, changed


def read_hf(folder: Path) -> State:
    """The tensors of a sharded folder, by the plainest means; it stumbles over whatever is wrong."""
    config = LlamaConfig.from_pretrained(folder)
    assert config.architectures == ["LlamaForCausalLM"]
    found: State = {}
    for name, file in json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].items():
        assert Path(file).name == file
        found[name] = load_file(folder / file)[name]
    with torch.device("meta"):
        expected = LlamaForCausalLM(config).state_dict()
    assert {name: tensor.shape for name, tensor in found.items()} == {name: tensor.shape for name, tensor in expected.items()}
    assert not config.tie_word_embeddings or torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    return found


def read_meta(folder: Path) -> State:
    """The same for a Meta folder in two files, its embeddings split on columns."""
    params = json.loads((folder / "params.json").read_text())
    parts = [torch.load(folder / f"consolidated.{number:02d}.pth", weights_only=True) for number in range(2)]
    assert parts[0].keys() == parts[1].keys()
    assert all(torch.equal(tensor, parts[1][name]) for name, tensor in parts[0].items() if tensor.ndim == 1)
    columns = ("wo", "w2", "tok_embeddings")
    whole = {name: torch.cat([p[name] for p in parts], int(name.split(".")[-2] in columns)) if t.ndim == 2 else t for name, t in parts[0].items()}
    sizes = foreign.TINY | {"hidden_size": params["dim"], "num_hidden_layers": params["n_layers"], "num_key_value_heads": params["n_kv_heads"]}
    with torch.device("meta"):
        expected = LlamaForCausalLM(LlamaConfig(**sizes)).state_dict()
    found = meta_to_hf(whole, 4, 2, 8)
    assert {name: tensor.shape for name, tensor in found.items()} == {name: tensor.shape for name, tensor in expected.items()}
    return found


STUMBLES = (AssertionError, OSError, KeyError, ValueError, RuntimeError, SafetensorError)


@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.filterwarnings("ignore:You are using a model of type")
def test_damage_is_done_and_no_more(tmp_path: Path, name: str) -> None:
    state = make_hf(tmp_path / "hf", shards=3)
    assert equal(read_hf(tmp_path / "hf"), state)
    check_one_change(tmp_path / "hf", DAMAGE[name], most=2)
    with pytest.raises(STUMBLES):
        read_hf(tmp_path / "hf")


@pytest.mark.parametrize("name", DAMAGE_META)
def test_damage_to_meta_is_done_and_no_more(tmp_path: Path, name: str) -> None:
    state = make_hf(tmp_path / "hf")
    make_meta(tmp_path / "meta", state, 4, 2, model_parallel=2)
    assert equal(read_meta(tmp_path / "meta"), state)
    check_one_change(tmp_path / "meta", DAMAGE_META[name], most=2)
    with pytest.raises(STUMBLES):
        read_meta(tmp_path / "meta")


def test_params_follow_the_state(tmp_path: Path) -> None:
    state = make_hf(tmp_path, scaling=True)
    assert load_file(tmp_path / "model.safetensors").keys() == state.keys()
    params = meta_params(state, 4, 2, scaling=True)
    assert (params["dim"], params["n_layers"], params["vocab_size"], params["n_kv_heads"], params["use_scaled_rope"]) == (32, 2, 96, 2, True)
    assert "n_kv_heads" not in meta_params(state, 4, 4)
