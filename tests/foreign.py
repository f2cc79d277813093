"""Makers of checkpoints as other tools write them: transformers, Meta, torchtitan, plain ``torch.save``.

Nothing of tunelib takes part, so that what tunelib reads and writes can be held against them. All is drawn from a seed. The default
model is tiny: vocabulary 96, hidden 32, ffn 88, 2 layers, 4 heads, 2 kv heads of 8 dims.
"""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

State = dict[str, Tensor]

TINY: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "pad_token_id": None,
}
LLAMA_31 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "chat_template.jinja")

META_OF_LAYER = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
META_OF_TOP = {"model.embed_tokens.weight": "tok_embeddings.weight", "model.norm.weight": "norm.weight", "lm_head.weight": "output.weight"}
ROW_SPLIT, COLUMN_SPLIT = ("wq", "wk", "wv", "w1", "w3", "output"), ("wo", "w2")


# Hugging Face


def make_hf(
    folder: Path,
    *,
    shards: int = 1,
    as_bin: bool = False,
    tied: bool = False,
    kv_heads: int = 2,
    scaling: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    tokenizer: Path | None = None,
    old_config: bool = False,
    **more: Any,
) -> State:
    """A folder as transformers writes it; every tensor that its files hold, by name.

    Args:
        shards: exactly so many files of weights, with an index where there are several.
        as_bin: pytorch_model*.bin, which transformers 4 wrote; a tied head lies there once more.
        scaling: of the rotations, as in Llama 3.1.
        tokenizer: a folder whose tokenizer files are copied; the vocabulary and the bos and eos ids follow it.
        old_config: config.json as transformers 4 wrote it: rope_theta, rope_scaling, torch_dtype.
        more: fields of LlamaConfig.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    fields = TINY | {"num_key_value_heads": kv_heads, "tie_word_embeddings": tied}
    fields["rope_parameters"] = {"rope_theta": 10_000.0, "rope_type": "default"}
    if scaling:
        fields |= {"rope_parameters": {"rope_theta": 500_000.0, **LLAMA_31}, "max_position_embeddings": 131_072}
    if tokenizer is not None:
        folder.mkdir(parents=True, exist_ok=True)
        fields |= copy_tokenizer(tokenizer, folder)
    with torch.random.fork_rng():
        model = LlamaForCausalLM(LlamaConfig(**(fields | more)))
    with torch.no_grad():
        draw_weights(dict(model.named_parameters()), seed)
    torch.nn.Module.to(model, dtype).save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    if as_bin and model.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    if as_bin or shards > 1:
        (folder / "model.safetensors").unlink()
        _write_shards(folder, state, shards, "pytorch_model", "bin") if as_bin else _write_shards(folder, state, shards, "model", "safetensors")
    if old_config:
        _age_config(folder / "config.json")
    return state


def draw_weights(tensors: State, seed: int) -> None:
    """Fill tensors in place so that differences show: matrices of deviation 0.2, and norms that are not all one."""
    generator = torch.Generator().manual_seed(seed)
    for _, tensor in sorted(tensors.items()):
        drawn = torch.randn(tensor.shape, generator=generator)
        tensor.copy_(1 + 0.3 * drawn if tensor.ndim == 1 else 0.2 * drawn)


def logits(source: Path | State, tokens: Tensor, **more: Any) -> Tensor:
    """What transformers computes in float32 from a folder or a state.

    Args:
        tokens: (batch, positions).
        more: fields of LlamaConfig for a state; its head_dim is 8, and sizes follow its shapes. Without a head it is tied.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    if isinstance(source, Path):
        model = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
    else:
        fields = TINY | _fields_of(source, more.get("head_dim", TINY["head_dim"])) | more
        with torch.random.fork_rng():
            model = LlamaForCausalLM(LlamaConfig(**fields))
        missing, unexpected = model.load_state_dict({name: tensor.float() for name, tensor in source.items()}, strict=False)
        assert not unexpected, unexpected
        assert missing == (["lm_head.weight"] if fields["tie_word_embeddings"] else []), missing
    with torch.no_grad():
        return model.eval()(tokens).logits


def legacy_bin(path: Path, state: State) -> None:
    """A file of the form that torch wrote before 1.6: pickles one after the other, no zip archive."""
    torch.save(state, path, _use_new_zipfile_serialization=False)


def make_single(path: Path, state: State, nested: bool = False) -> None:
    """One file of tensors by name, below "model" where nested."""
    torch.save({"model": state} if nested else state, path)


def _fields_of(state: State, head_dim: int) -> dict[str, Any]:
    vocab_size, hidden_size = state["model.embed_tokens.weight"].shape
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": len(state["model.layers.0.mlp.gate_proj.weight"]),
        "num_hidden_layers": sum(name.endswith("mlp.gate_proj.weight") for name in state),
        "num_attention_heads": len(state["model.layers.0.self_attn.q_proj.weight"]) // head_dim,
        "num_key_value_heads": len(state["model.layers.0.self_attn.k_proj.weight"]) // head_dim,
        "tie_word_embeddings": "lm_head.weight" not in state,
    }


def copy_tokenizer(tokenizer: Path, folder: Path) -> dict[str, Any]:
    """Copy the files of a tokenizer; the fields of a config.json that follow from it."""
    from tokenizers import Tokenizer

    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, folder / name)
    if not (tokenizer / "tokenizer.json").is_file():
        return {}
    library = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text())
    special = {f"{kind}_token_id": library.token_to_id(settings[f"{kind}_token"]) for kind in ("bos", "eos") if settings.get(f"{kind}_token")}
    return {"vocab_size": max(library.get_vocab().values()) + 1, **special}


def _write_shards(folder: Path, state: State, shards: int, stem: str, suffix: str) -> None:
    """Exactly so many files; the index of several lies beside them."""
    names = list(state)
    files = [f"{stem}.{suffix}"] if shards == 1 else [f"{stem}-{number:05d}-of-{shards:05d}.{suffix}" for number in range(1, shards + 1)]
    groups = [names[len(names) * number // shards : len(names) * (number + 1) // shards] for number in range(shards)]
    for file, group in zip(files, groups, strict=True):
        _write_tensors(folder / file, {name: state[name] for name in group})
    if shards > 1:
        size = sum(tensor.nbytes for tensor in state.values())
        weight_map = {name: file for file, group in zip(files, groups, strict=True) for name in group}
        _write_json(folder / f"{stem}.{suffix}.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map})


def _age_config(path: Path) -> None:
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    _write_json(path, config | {"transformers_version": "4.46.3"})


# Meta


def hf_to_meta(state: State, heads: int, kv_heads: int, head_dim: int) -> State:
    """Hugging Face's tensors as Meta's: other names, q and k rows in pairs, and always an output.weight."""
    meta = {}
    for name, tensor in state.items():
        count = {"q_proj": heads, "k_proj": kv_heads}.get(name.split(".")[-2])
        meta[_meta_name(name)] = tensor.clone() if count is None else _halves_to_pairs(tensor, count, head_dim)
    meta.setdefault("output.weight", meta["tok_embeddings.weight"].clone())
    return meta


def meta_to_hf(state: State, heads: int, kv_heads: int, head_dim: int) -> State:
    """Meta's tensors as Hugging Face's, output.weight as lm_head.weight; rope.freqs and freqs_cis are left out."""
    hf_names = {_meta_name(name): name for name in _hf_names(sum(name.endswith("wq.weight") for name in state))}
    hf = {}
    for name, tensor in state.items():
        if name not in ("rope.freqs", "freqs_cis"):
            count = {"wq": heads, "wk": kv_heads}.get(name.split(".")[-2])
            hf[hf_names[name]] = tensor.clone() if count is None else _pairs_to_halves(tensor, count, head_dim)
    return hf


def meta_params(state_hf: State, heads: int, kv_heads: int, *, scaling: bool = False) -> dict[str, Any]:
    """A params.json as Llama 2 has it, or Llama 3.1 where scaling."""
    vocab_size, dim = state_hf["model.embed_tokens.weight"].shape
    layers = sum(name.endswith("q_proj.weight") for name in state_hf)
    # 2/3 of 4 × 32 is 85, rounded up to a multiple of 8: the 88 of the tiny model.
    params = {"dim": dim, "multiple_of": 8, "n_heads": heads, "n_layers": layers, "norm_eps": 1e-5, "vocab_size": vocab_size}
    if kv_heads != heads or scaling:
        params["n_kv_heads"] = kv_heads
    return params | ({"ffn_dim_multiplier": 1.0, "rope_theta": 500_000.0, "use_scaled_rope": True} if scaling else {})


def make_meta(
    folder: Path,
    state_hf: State,
    heads: int,
    kv_heads: int,
    params: dict[str, Any] | None = None,
    model_parallel: int = 1,
    embedding_split: str = "columns",
    extras: bool = False,
) -> State:
    """A folder as Meta gives it out, params.json and consolidated.NN.pth; the whole tensors by Meta's names.

    Args:
        params: the content of params.json; by default that of `meta_params`.
        model_parallel: the number of files.
        embedding_split: how tok_embeddings lies in several files: on "columns" (Llama 2) or on "rows" (Llama 3).
        extras: with rope.freqs, which the first files had.
    """
    assert embedding_split in ("columns", "rows"), embedding_split
    head_dim = len(state_hf["model.layers.0.self_attn.q_proj.weight"]) // heads
    meta = hf_to_meta(state_hf, heads, kv_heads, head_dim)
    if extras:
        meta["rope.freqs"] = _inverse_frequencies(head_dim)
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "params.json", meta_params(state_hf, heads, kv_heads) if params is None else params)
    for number in range(model_parallel):
        part = {name: _part_of(name, tensor, number, model_parallel, embedding_split) for name, tensor in meta.items()}
        torch.save(part, folder / f"consolidated.{number:02d}.pth")
    return meta


def _part_of(name: str, tensor: Tensor, number: int, count: int, embedding_split: str) -> Tensor:
    kind = name.split(".")[-2]
    if kind in ROW_SPLIT or (kind == "tok_embeddings" and embedding_split == "rows"):
        tensor = tensor.chunk(count, dim=0)[number]
    elif kind in COLUMN_SPLIT or kind == "tok_embeddings":
        tensor = tensor.chunk(count, dim=1)[number]
    return tensor.clone(memory_format=torch.contiguous_format)  # a view would be saved with all that it is a view of


def _halves_to_pairs(tensor: Tensor, heads: int, head_dim: int) -> Tensor:
    """Rotation i of a head turns rows i and i + head_dim/2 for Hugging Face, rows 2i and 2i + 1 for Meta."""
    half, moved = head_dim // 2, torch.empty_like(tensor)
    for head in range(heads):
        first = head * head_dim
        for i in range(half):
            moved[first + 2 * i] = tensor[first + i]
            moved[first + 2 * i + 1] = tensor[first + half + i]
    return moved


def _pairs_to_halves(tensor: Tensor, heads: int, head_dim: int) -> Tensor:
    half, moved = head_dim // 2, torch.empty_like(tensor)
    for head in range(heads):
        first = head * head_dim
        for i in range(half):
            moved[first + i] = tensor[first + 2 * i]
            moved[first + half + i] = tensor[first + 2 * i + 1]
    return moved


def _meta_name(name: str) -> str:
    if name in META_OF_TOP:
        return META_OF_TOP[name]
    _, _, layer, *kind, last = name.split(".")
    return f"layers.{layer}.{META_OF_LAYER['.'.join(kind)]}.{last}"


def _hf_names(layers: int) -> list[str]:
    return [
        *META_OF_TOP,
        *(f"model.layers.{layer}.{kind}.{last}" for layer in range(layers) for kind in META_OF_LAYER for last in ("weight", "bias")),
    ]


def _inverse_frequencies(head_dim: int, theta: float = 10_000.0) -> Tensor:
    return 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)


# torchtitan


def make_torchtitan_dcp(
    folder: Path,
    state_hf: State,
    heads: int,
    kv_heads: int,
    *,
    full: bool = False,
    nested: bool = False,
    processes: int = 1,
    extra: dict[str, Any] | None = None,
    timeout_seconds: float = 120,
) -> State:
    """What torchtitan up to 0.2.2 leaves in its folder step-N; the whole tensors by Meta's names, freqs_cis among them.

    Args:
        full: with the optimizer's tensors, and what is no tensor: learning rate, counters, place in the data.
        nested: the model's tensors lie below "model".
        processes: so many gloo processes save their rows of each tensor; by default one process saves all.
        extra: further entries of the saved dict, from one process.
    """
    head_dim = len(state_hf["model.layers.0.self_attn.q_proj.weight"]) // heads
    model = hf_to_meta(state_hf, heads, kv_heads, head_dim)
    angles = torch.outer(torch.arange(64).float(), _inverse_frequencies(head_dim))
    model["freqs_cis"] = torch.polar(torch.ones_like(angles), angles)  # (positions, head_dim / 2), complex64
    if processes == 1:
        saved = _torchtitan_state(model, full, nested, rank=0, processes=1) | (extra or {})
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
            dcp.save(saved, checkpoint_id=folder, no_dist=True)
    else:
        assert not extra, "one process saves further entries"
        _save_in_processes(folder, model, full, nested, processes, timeout_seconds)
    return model


def _torchtitan_state(model: State, full: bool, nested: bool, rank: int, processes: int) -> dict[str, Any]:
    """The dict that a rank gives to dcp.save, which joins nested keys with dots and pickles what is no tensor."""
    saved: dict[str, Any] = {"model": model} if nested else dict(model)
    if not full:
        return saved
    trained = {name: tensor for name, tensor in model.items() if name != "freqs_cis"}
    optimizer: dict[str, Any] = {}
    for name, tensor in trained.items():
        optimizer |= {
            f"state.{name}.step": torch.tensor(10.0),
            f"state.{name}.exp_avg": tensor * 0.1,
            f"state.{name}.exp_avg_sq": tensor * tensor,
        }
        optimizer |= {f"param_groups.{name}.lr": 8e-4, f"param_groups.{name}.betas": (0.9, 0.95), f"param_groups.{name}.fused": True}
    losses = io.BytesIO()
    torch.save([3.5, 3.25], losses)
    losses.seek(0)
    return saved | {
        "optimizer": optimizer,
        "lr_scheduler": {"base_lrs": [8e-4], "last_epoch": 10, "_last_lr": [7e-4], "lr_lambdas": [{}]},
        "train_state": {"step": torch.tensor(10, dtype=torch.int32), "ntokens_seen": 20480, "global_avg_losses": losses},
        "dataloader": {f"dp_rank_{rank}": pickle.dumps({"_sample_idx": 7, "_token_buffer": [1, 2, 3]}), "world_size": processes},
    }


def _save_in_processes(folder: Path, model: State, full: bool, nested: bool, processes: int, timeout_seconds: float) -> None:
    with tempfile.TemporaryDirectory() as place:
        torch.save(model, Path(place) / "model.pt")
        workers = [
            subprocess.Popen(
                [sys.executable, __file__, json.dumps([place, str(folder), full, nested, rank, processes])],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(processes)
        ]
        try:
            outputs = [worker.communicate(timeout=timeout_seconds)[0] for worker in workers]
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
    for worker, output in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, output[-6000:]


def _save_as_rank(place: str, folder: str, full: bool, nested: bool, rank: int, processes: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{place}/store", rank=rank, world_size=processes)
    mesh = init_device_mesh("cpu", (processes,))
    whole = torch.load(Path(place) / "model.pt", weights_only=True)
    model = {name: tensor if name == "freqs_cis" else distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in whole.items()}
    dcp.save(_torchtitan_state(model, full, nested, rank, processes), checkpoint_id=folder)
    dist.destroy_process_group()


# Harm


class Payload:
    """Unpickled without care, it creates the file ``marker``."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"import pathlib; pathlib.Path({str(self.marker)!r}).touch()",)


def malicious_pickle(path: Path, *, legacy: bool = False) -> Path:
    """A .bin or .pth that runs code when it is unpickled without care; the file that the code would create."""
    marker = path.with_name(f"{path.name}.ran")
    content = {"model.embed_tokens.weight": torch.ones(96, 32), "model.norm.weight": Payload(marker)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return marker


def malicious_dcp(folder: Path) -> Path:
    """Make a DCP folder's ``.metadata`` run code when it is unpickled without care; the file that the code would create.

    A folder that is not there is made, with one tensor. For an entry that runs code see ``extra`` of `make_torchtitan_dcp`.
    """
    path, marker = folder / ".metadata", folder.with_name(f"{folder.name}.ran")
    if not path.is_file():
        state = {"tok_embeddings.weight": torch.ones(96, 32)}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
            dcp.save(state, checkpoint_id=folder, no_dist=True)
    metadata = pickle.loads(path.read_bytes())
    metadata.planner_data = Payload(marker)
    path.write_bytes(pickle.dumps(metadata))
    return marker


# Damage to a sharded Hugging Face folder, and to a Meta folder


def _lose_shard(folder: Path) -> None:
    _shards(folder)[-1].unlink()


def _name_missing_file(folder: Path) -> None:
    _change_index(folder, lambda weight_map: weight_map | {next(iter(weight_map)): "model-00099-of-00099.safetensors"})


def _truncate_shard(folder: Path) -> None:
    _truncate(_shards(folder)[-1])


def _flip_header_byte(folder: Path) -> None:
    _flip_bit(_shards(folder)[0], b"{", 0)


def _flip_offset(folder: Path) -> None:
    _flip_bit(_shards(folder)[0], b'"data_offsets":[', len(b'"data_offsets":['))


def _flip_name(folder: Path) -> None:
    _flip_bit(_shards(folder)[0], b".weight", 1)


def _lose_tensor(folder: Path) -> None:
    name = _lose_tensor_of_shard(folder)
    _change_index(folder, lambda weight_map: {key: file for key, file in weight_map.items() if key != name})


def _lose_tensor_of_shard(folder: Path) -> str:
    tensors = _read_tensors(_shards(folder)[-1])
    name = next(reversed(tensors))
    _write_tensors(_shards(folder)[-1], {key: tensor for key, tensor in tensors.items() if key != name})
    return name


def _add_tensor(folder: Path) -> None:
    shard, name = _shards(folder)[-1], "model.layers.0.self_attn.q_norm.weight"
    _write_tensors(shard, _read_tensors(shard) | {name: torch.ones(8)})
    _change_index(folder, lambda weight_map: weight_map | {name: shard.name})


def _change_shape(folder: Path) -> None:
    shard = _shards(folder)[-1]
    tensors = _read_tensors(shard)
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
    _write_tensors(shard, tensors | {name: tensors[name][:-1].clone()})


def _name_outer_file(folder: Path) -> None:
    shard = _shards(folder)[0]
    outer = folder.parent / f"outside{shard.suffix}"
    shutil.copyfile(shard, outer)
    _change_index(folder, lambda weight_map: {name: f"../{outer.name}" if file == shard.name else file for name, file in weight_map.items()})


def _set_config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: _change_json(folder / "config.json", lambda config: config | changes)


def _set_params(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: _change_json(folder / "params.json", lambda params: params | changes)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "a missing shard": _lose_shard,
    "an index that names a missing file": _name_missing_file,
    "a truncated file": _truncate_shard,
    "a flipped byte that starts a header": _flip_header_byte,
    "a flipped byte in a header's offsets": _flip_offset,
    "a flipped byte in a tensor's name": _flip_name,
    "a tensor missing": _lose_tensor,
    "a tensor missing that the index names": _lose_tensor_of_shard,
    "an extra tensor": _add_tensor,
    "a wrong shape": _change_shape,
    "a config with more layers": _set_config(num_hidden_layers=3),
    "a config with fewer layers": _set_config(num_hidden_layers=1),
    "a config of another hidden_size": _set_config(hidden_size=64),
    "a config of another vocab_size": _set_config(vocab_size=104),
    "an unknown architecture": _set_config(architectures=["BambooForCausalLM"], model_type="bamboo"),
    "a tied config with a differing lm_head": _set_config(tie_word_embeddings=True),
    "an index that names a file outside of the folder": _name_outer_file,
}
"""What is wrong → a function that does so to a folder of `make_hf` with several safetensors files, untied, of the tiny sizes."""


def _lose_consolidated(folder: Path) -> None:
    _consolidated(folder)[-1].unlink()


def _truncate_consolidated(folder: Path) -> None:
    _truncate(_consolidated(folder)[-1])


def _change_norm(folder: Path) -> None:
    path = _consolidated(folder)[-1]
    tensors = _read_tensors(path)
    _write_tensors(path, tensors | {"layers.1.ffn_norm.weight": tensors["layers.1.ffn_norm.weight"] + 0.125})


def _lose_meta_tensor(folder: Path) -> None:
    for path in _consolidated(folder):
        _write_tensors(path, {name: tensor for name, tensor in _read_tensors(path).items() if name != "layers.1.feed_forward.w2.weight"})


def _lose_meta_tensor_of_one(folder: Path) -> None:
    path = _consolidated(folder)[-1]
    _write_tensors(path, {name: tensor for name, tensor in _read_tensors(path).items() if name != "layers.1.feed_forward.w2.weight"})


DAMAGE_META: dict[str, Callable[[Path], Any]] = {
    "a missing file of several": _lose_consolidated,
    "norms that differ between files": _change_norm,
    "a truncated file": _truncate_consolidated,
    "a tensor missing": _lose_meta_tensor,
    "a tensor missing in one file": _lose_meta_tensor_of_one,
    "params of more layers": _set_params(n_layers=3),
    "params of fewer layers": _set_params(n_layers=1),
    "params of other kv heads": _set_params(n_kv_heads=1),
    "params of another dim": _set_params(dim=64),
}
"""What is wrong → a function that does so to a folder of `make_meta` with model_parallel = 2 and 2 or 4 kv heads."""


def _shards(folder: Path) -> list[Path]:
    return sorted([*folder.glob("model-*.safetensors"), *folder.glob("pytorch_model-*.bin")])


def _consolidated(folder: Path) -> list[Path]:
    return sorted(folder.glob("consolidated.*.pth"))


def _read_tensors(path: Path) -> State:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def _write_tensors(path: Path, tensors: State) -> None:
    save_file(tensors, path, metadata={"format": "pt"}) if path.suffix == ".safetensors" else torch.save(tensors, path)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _flip_bit(path: Path, after: bytes, places: int) -> None:
    """Flip the lowest bit of the byte so many places after the start of the first occurrence of ``after`` behind the header's length."""
    content = bytearray(path.read_bytes())
    content[content.index(after, 8) + places] ^= 1
    path.write_bytes(content)


def _change_index(folder: Path, change: Callable[[dict[str, str]], dict[str, str]]) -> None:
    (path,) = folder.glob("*.index.json")
    _change_json(path, lambda index: index | {"weight_map": change(index["weight_map"])})


def _change_json(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    _write_json(path, change(json.loads(path.read_text())))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    _save_as_rank(*json.loads(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # the interpreter's own way out aborts now and then, while gloo's threads wait for it (docs/house.md)
