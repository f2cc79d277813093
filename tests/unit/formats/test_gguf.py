"""A GGUF file holds the model's numbers in llama.cpp's layout and the tokenizer in llama.cpp's words, or is refused by name."""

import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor
from unit.data.test_tokenizer_model import BYTES, ENDS, LETTERS, NORMAL, write_model
from unit.samples import DEBUG_TOKENIZER, TINY_FIELDS, tiny_config

import tunelib.formats.gguf as module
from tunelib.data.tokenizer import Tokenizer
from tunelib.errors import FormatError
from tunelib.formats.gguf import GGUF_TYPES, GgufPlan, plan_gguf, write_gguf
from tunelib.formats.gguf_words import QWEN2_SPLIT, describe_words
from tunelib.model.config import ModelConfig
from tunelib.model.decoder import Decoder
from tunelib.model.families import parse_config

SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 648}  # rows of q8_0 are multiples of 32; 8 rows have no token
MODELS: dict[str, dict[str, Any]] = {
    "gqa tied": {**WIDE, "tie_word_embeddings": True},
    "mha untied": {**WIDE, "num_key_value_heads": 4},
    "own head_dim": {**WIDE, "head_dim": 24, "num_attention_heads": 4},
    "llama3 scaling": {**WIDE, "rope_scaling": SCALING},
    "biases": {**WIDE, "attention_bias": True, "mlp_bias": True},
}
# Names by hand, so that they do not come from the library that made them.
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def weights_of(config: ModelConfig) -> dict[str, Tensor]:
    """Random weights, biases and norms too."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(parameter.shape, generator=generator) for name, parameter in Decoder(config).named_parameters()}


def shapes_of(weights: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def plan(config: ModelConfig, kind: str = "float32", tokenizer: Tokenizer | None = None, template: str | None = None, name: str = "tiny") -> GgufPlan:
    return plan_gguf(config, shapes_of(weights_of(config)), tokenizer or Tokenizer(DEBUG_TOKENIZER), template, kind, name)


def write(path: Path, config: ModelConfig, kind: str = "float32", **options: Any) -> gguf.GGUFReader:
    """A model of `weights_of` written and opened again."""
    weights = weights_of(config)
    write_gguf(plan(config, kind, **options), path, lambda name, where: weights[name])
    return gguf.GGUFReader(path)


def facts_of(reader: gguf.GGUFReader) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}


def gguf_name(name: str) -> str:
    if name.startswith("model.layers."):
        _, _, layer, part = name.split(".", 3)
        part, _, ending = part.rpartition(".")
        return f"blk.{layer}.{NAMES[part]}.{ending}"
    return {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}[name]


def in_pairs(weight: Tensor, config: ModelConfig, name: str) -> Tensor:
    """q and k with the rows of each head in llama.cpp's order, row by row."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return weight
    half = config.head_dim // 2
    order = [head * config.head_dim + pair + part * half for head in range(heads) for pair in range(half) for part in range(2)]
    return weight[order]


@pytest.mark.parametrize("kind", GGUF_TYPES)
@pytest.mark.parametrize("model", MODELS)
def test_file_holds_the_models_numbers_in_the_layout_of_llama_cpp(tmp_path: Path, model: str, kind: str) -> None:
    config = parse_config({**TINY_FIELDS, **MODELS[model]}, model)
    found = {tensor.name: tensor for tensor in write(tmp_path / "model.gguf", config, kind).tensors}
    expected = {gguf_name(name): in_pairs(weight, config, name) for name, weight in weights_of(config).items()}
    assert found.keys() - {"rope_freqs.weight"} == expected.keys()
    assert ("output.weight" in found) != config.tie_word_embeddings
    stored = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}[kind]
    for name, weight in expected.items():
        tensor = found[name]
        assert tensor.tensor_type.name == ("F32" if weight.ndim == 1 else stored)
        assert tensor.shape.tolist() == list(weight.shape)[::-1]
        values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).reshape(weight.shape)
        if weight.ndim > 1 and kind == "q8_0":  # half a step of 1/127 of a block's largest, and float16's rounding of that step
            blocks = weight.reshape(-1, 32)
            assert ((values.reshape(-1, 32) - blocks).abs() <= blocks.abs().amax(1, keepdim=True) * (0.5 / 127 + 2**-11)).all()
        else:
            dtype = torch.float32 if weight.ndim == 1 else getattr(torch, kind)
            assert torch.equal(values, weight.to(dtype).float())


def test_blocks_of_rows_are_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_config({**TINY_FIELDS, **WIDE}, "tiny")
    for kind in GGUF_TYPES:
        write(tmp_path / "whole", config, kind)
        with monkeypatch.context() as patch:
            patch.setattr(module, "BLOCK_VALUES", 200)  # three rows
            write(tmp_path / "blocks", config, kind)
        assert (tmp_path / "whole").read_bytes() == (tmp_path / "blocks").read_bytes()


def test_weights_of_16_bits_are_written_as_they_are(tmp_path: Path) -> None:
    config = tiny_config(vocab_size=640)
    weights = {name: tensor.bfloat16() for name, tensor in weights_of(config).items()}
    write_gguf(plan(config, "bfloat16"), tmp_path / "model.gguf", lambda name, where: weights[name])
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert bytes(found["token_embd.weight"].data) == weights["model.embed_tokens.weight"].view(torch.uint8).numpy().tobytes()
    assert found["output_norm.weight"].data.tolist() == weights["model.norm.weight"].float().tolist()


def test_file_describes_the_model(tmp_path: Path) -> None:
    config = parse_config({**TINY_FIELDS, **MODELS["own head_dim"], "rope_theta": 50000.0, "rms_norm_eps": 0.25}, "tiny")
    facts = facts_of(write(tmp_path / "model.gguf", config, "q8_0", template="{{ messages }}", name="a small one"))
    assert {name: value for name, value in facts.items() if not name.startswith("tokenizer.")} == {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "a small one",
        "general.file_type": 7,
        "general.quantization_version": 2,
        "llama.context_length": 64,
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 24,
        "llama.attention.value_length": 24,
        "llama.rope.dimension_count": 24,
        "llama.rope.freq_base": 50000.0,
        "llama.attention.layer_norm_rms_epsilon": 0.25,
        "llama.vocab_size": 648,
    }
    assert facts["tokenizer.chat_template"] == "{{ messages }}"
    for kind, number in (("float32", 0), ("float16", 1), ("bfloat16", 32)):
        facts = facts_of(write(tmp_path / "model.gguf", config, kind))
        assert facts["general.file_type"] == number
        assert "general.quantization_version" not in facts
        assert "tokenizer.chat_template" not in facts


def test_rope_scaling_is_a_tensor_of_divisors(tmp_path: Path) -> None:
    fields = {**TINY_FIELDS, **WIDE, "head_dim": 128, "rope_theta": 500000.0, "rope_scaling": {**SCALING, "original_max_position_embeddings": 8192}}
    reader = write(tmp_path / "model.gguf", parse_config(fields, "tiny"))
    (factors,) = (tensor for tensor in reader.tensors if tensor.name == "rope_freqs.weight")
    expected = []
    for exponent in np.arange(0, 128, 2) / 128:  # the law as Llama 3.1 was published with it
        wavelength = 2 * np.pi * 500000.0**exponent
        smooth = (8192 / wavelength - 1) / (4 - 1)
        expected.append(1 if wavelength < 8192 / 4 else 8 if wavelength > 8192 else 1 / ((1 - smooth) / 8 + smooth))
    assert factors.tensor_type == gguf.GGMLQuantizationType.F32
    assert np.allclose(factors.data, expected, rtol=2e-6)  # float32, and wavelengths near a border
    assert {1.0, 8.0} < set(factors.data.tolist())
    assert not any(tensor.name == "rope_freqs.weight" for tensor in write(tmp_path / "plain.gguf", tiny_config(vocab_size=640)).tensors)


def test_block_of_zeros_stays_zeros_in_q8_0(tmp_path: Path) -> None:
    config = parse_config({**TINY_FIELDS, **WIDE}, "tiny")
    weights = weights_of(config)
    weights["model.layers.0.mlp.up_proj.weight"].zero_()
    write_gguf(plan(config, "q8_0"), tmp_path / "model.gguf", lambda name, where: weights[name])
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert not found["blk.0.ffn_up.weight"].data.any()


@pytest.mark.parametrize("kind", GGUF_TYPES)
def test_planned_size_is_that_of_the_file(tmp_path: Path, kind: str) -> None:
    config = parse_config({**TINY_FIELDS, **WIDE}, "tiny")
    reported: list[int] = []
    weights = weights_of(config)
    planned = plan(config, kind, template="x" * 5000)
    write_gguf(planned, tmp_path / "model.gguf", lambda name, where: weights[name], reported.append)
    size = (tmp_path / "model.gguf").stat().st_size
    assert abs(planned.num_bytes - size) < 2048
    assert len(reported) == 1 + len(weights)  # the header, then each tensor
    assert sum(reported) == planned.num_bytes


def test_one_weight_is_held_at_a_time(tmp_path: Path) -> None:
    config = tiny_config(vocab_size=640)
    shapes = shapes_of(weights_of(config))
    alive: list[Any] = []

    def read(name: str, where: tuple[slice, ...]) -> Tensor:
        assert where == ()
        assert all(reference() is None for reference in alive), f"an earlier weight is still held when {name} is read"
        tensor = torch.ones(shapes[name])
        alive.append(weakref.ref(tensor))
        return tensor

    for kind in ("float32", "float16"):
        write_gguf(plan(config, kind), tmp_path / "model.gguf", read)


def test_failed_writing_leaves_what_was_there(tmp_path: Path) -> None:
    config = tiny_config(vocab_size=640)
    path = tmp_path / "model.gguf"
    path.write_text("an older one")

    def read(name: str, where: tuple[slice, ...]) -> Tensor:
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        write_gguf(plan(config), path, read)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"model.gguf": "an older one"}


@pytest.mark.parametrize(
    ("kind", "value", "says"),
    [
        ("float16", 70000.0, r"holds 70000\.0; float16 holds numbers up to 65504: choose another type"),
        ("q8_0", float("nan"), r"holds nan; q8_0 holds numbers up to 8\.31901e\+06"),
        ("float32", float("inf"), r"holds inf; float32 holds"),
    ],
)
def test_numbers_that_the_type_cannot_hold_are_refused(tmp_path: Path, kind: str, value: float, says: str) -> None:
    config = parse_config({**TINY_FIELDS, **WIDE}, "tiny")
    weights = weights_of(config)
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    with pytest.raises(FormatError, match=rf"model\.layers\.1\.mlp\.up_proj\.weight {says}"):
        write_gguf(plan(config, kind), tmp_path / "model.gguf", lambda name, where: weights[name])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "kind", "says"),
    [
        ({}, "int4", "'int4' is not a type that GGUF files are written in; float32, float16, bfloat16, q8_0 are"),
        ({"architecture": "Qwen2ForCausalLM"}, "float32", "Qwen2ForCausalLM cannot be written as GGUF; LlamaForCausalLM can"),
        ({"head_dim": 7}, "float32", "head_dim = 7 is odd"),
        ({"tie_word_embeddings": True}, "float32", r"tie_word_embeddings is true, but lm_head\.weight is there"),
        ({"vocab_size": 700}, "float32", r"model\.embed_tokens\.weight has shape \(640, 32\) instead of \(700, 32\)"),
        ({}, "q8_0", r"model\.layers\.0\.mlp\.down_proj\.weight has rows of 40, which q8_0 cannot hold"),
    ],
)
def test_models_that_cannot_be_held_are_refused(changes: dict[str, Any], kind: str, says: str) -> None:
    config = tiny_config(vocab_size=640)
    with pytest.raises(FormatError, match=says):
        plan_gguf(replace(config, **changes), shapes_of(weights_of(config)), Tokenizer(DEBUG_TOKENIZER), None, kind, "tiny")


def test_unknown_weights_missing_tokenizers_and_telling_names_are_refused() -> None:
    config, tokenizer = tiny_config(vocab_size=640), Tokenizer(DEBUG_TOKENIZER)
    shapes = shapes_of(weights_of(config))
    with pytest.raises(FormatError, match=r"model\.layers\.0\.self_attn\.sinks has no place in a GGUF file of a Llama"):
        plan_gguf(config, shapes | {"model.layers.0.self_attn.sinks": (4,)}, tokenizer, None, "float32", "tiny")
    with pytest.raises(FormatError, match=r"tie_word_embeddings is false, but lm_head\.weight is missing"):
        plan_gguf(config, {name: shape for name, shape in shapes.items() if name != "lm_head.weight"}, tokenizer, None, "float32", "tiny")
    with pytest.raises(FormatError, match=r"there is none: put its files beside the weights"):
        plan_gguf(config, shapes, None, None, "float32", "tiny")
    with pytest.raises(FormatError, match=r"otherwise for names with 'phi-3'"):
        plan_gguf(config, shapes, tokenizer, None, "float32", "My-Phi-3")


# Tokenizers.


def edit_tokenizer(folder: Path, settings: dict[str, Any] | None = None, **changes: Any) -> Tokenizer:
    """The debug tokenizer with other entries of tokenizer.json (``model`` is added to) and of tokenizer_config.json."""
    shutil.copytree(DEBUG_TOKENIZER, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    changes["model"] = content["model"] | changes.get("model", {})
    (folder / "tokenizer.json").write_text(json.dumps(content | changes))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        found = json.loads((folder / name).read_text()) | (settings or {})
        (folder / name).write_text(json.dumps({key: value for key, value in found.items() if value is not None}))
    return Tokenizer(folder)


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def byte_level(use_regex: bool, **changes: Any) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex, **changes}


def split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
DIGITS = {"type": "Digits", "individual_digits": True}


def test_tokens_come_back_by_id(tmp_path: Path) -> None:
    facts = facts_of(write(tmp_path / "model.gguf", parse_config({**TINY_FIELDS, **WIDE}, "tiny")))
    content = json.loads((DEBUG_TOKENIZER / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    tokens = facts["tokenizer.ggml.tokens"]
    assert {token: number for number, token in enumerate(tokens[:640])} == vocab
    assert tokens[640:] == [f"[PAD{number}]" for number in range(640, 648)]
    assert facts["tokenizer.ggml.token_type"] == [3] * 4 + [1] * 636 + [5] * 8
    assert facts["tokenizer.ggml.merges"] == [" ".join(merge) for merge in content["model"]["merges"]]
    rest = {name.removeprefix("tokenizer.ggml."): value for name, value in facts.items() if name.startswith("tokenizer.")}
    assert {name: value for name, value in rest.items() if not isinstance(value, list)} == {
        "model": "gpt2",
        "pre": "gpt-2",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "padding_token_id": 3,
        "add_bos_token": False,
        "add_eos_token": False,
        "add_space_prefix": False,
    }


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gpt-2", {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}}),  # as GPT-2's own
        ("smollm", {"pre_tokenizer": sequence(DIGITS, byte_level(True))}),
        ("llama-bpe", {"pre_tokenizer": sequence(split(LLAMA3), byte_level(False)), "model": {"ignore_merges": True}}),
        ("qwen2", {"pre_tokenizer": sequence(split(QWEN2_SPLIT), byte_level(False)), "normalizer": {"type": "NFC"}}),
        ("gpt-2", {"model": {"merges": ["i s", "s e"]}}),  # merges as old files have them
    ],
)
def test_pre_tokenizer_is_recognised_by_its_structure(tmp_path: Path, name: str, changes: dict[str, Any]) -> None:
    assert describe_words(edit_tokenizer(tmp_path / "it", **changes), 640).pre == name


TEMPLATE_BOTH_SIDES = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "<|im_end|>", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {text: {"id": text, "ids": [number], "tokens": [text]} for text, number in (("<|im_start|>", 1), ("<|im_end|>", 2))},
}


def added(number: int, text: str, special: bool = True, **changes: Any) -> dict[str, Any]:
    return {"id": number, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special, **changes}


SPECIALS = [added(0, "<|endoftext|>"), added(1, "<|im_start|>"), added(2, "<|im_end|>"), added(3, "<|pad|>")]


def test_bos_and_eos_are_what_encoding_puts_around_a_text(tmp_path: Path) -> None:
    settings = {"add_bos_token": False, "add_eos_token": False}  # which a tokenizer.json does not heed
    tokenizer = edit_tokenizer(tmp_path / "both", settings, post_processor=TEMPLATE_BOTH_SIDES)
    words = describe_words(tokenizer, 640)
    assert (words.adds_bos, words.adds_eos, words.ids["bos"], words.ids["eos"]) == (True, True, 1, 2)
    tokenizer = edit_tokenizer(tmp_path / "no name", {"bos_token": None}, post_processor=TEMPLATE_BOTH_SIDES)
    assert describe_words(tokenizer, 640).ids["bos"] == 1
    words = describe_words(edit_tokenizer(tmp_path / "none", {"bos_token": None}), 640)
    assert (words.adds_bos, words.ids["bos"]) == (False, 2)  # eos: without one llama.cpp takes the word of id 11
    tokenizer = edit_tokenizer(tmp_path / "other", {"bos_token": "<|pad|>"}, post_processor=TEMPLATE_BOTH_SIDES)
    with pytest.raises(FormatError, match=r"it puts the ids \[1\] before a text, and llama\.cpp can put only bos, 3"):
        describe_words(tokenizer, 640)


def test_ends_of_an_answer_are_told_as_far_as_llama_cpp_can_be(tmp_path: Path) -> None:
    def ids_with(name: str, ends: list[int], settings: dict[str, Any] | None = None) -> dict[str, int]:
        folder = tmp_path / name
        edit_tokenizer(folder, settings)
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        ids = describe_words(Tokenizer(folder), 640).ids
        return {name: ids[name] for name in ("eos", "eot", "eom") if name in ids}

    assert ids_with("one", [2]) == {"eos": 2}
    assert ids_with("two", [2, 40]) == {"eos": 2, "eot": 40}
    assert ids_with("three", [2, 40, 50]) == {"eos": 2, "eot": 40, "eom": 50}
    assert ids_with("four", [0, 2, 40, 50]) == {"eos": 2, "eot": 40, "eom": 50}  # llama.cpp knows <|endoftext|>, id 0
    assert ids_with("no eos", [40], {"eos_token": None}) == {"eos": 40}
    with pytest.raises(FormatError, match=r"an answer ends at more tokens than llama\.cpp can be told"):
        ids_with("five", [2, 40, 50, 60])
    with pytest.raises(FormatError, match=r"an answer ends at id 640, which is no token"):
        ids_with("beyond", [2, 640])
    with pytest.raises(FormatError, match=r"it has no eos_token"):
        describe_words(edit_tokenizer(tmp_path / "none", {"eos_token": None}), 640)


def test_added_tokens_keep_their_kind(tmp_path: Path) -> None:
    tokenizer = edit_tokenizer(tmp_path / "it", added_tokens=[*SPECIALS, added(640, "<think>", special=False)]).with_tokens(["<tool>"])
    words = describe_words(tokenizer, 643)
    assert words.tokens[638:] == [tokenizer.decode([638]), tokenizer.decode([639]), "<think>", "<tool>", "[PAD642]"]
    assert words.types[639:] == [1, 4, 3, 5]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, r'pre-tokenizer is none of gpt-2, smollm, llama-bpe, qwen2: \[{"type": "Whitespace"}\]'),
        ({"pre_tokenizer": byte_level(False)}, "pre-tokenizer is none of"),
        ({"pre_tokenizer": byte_level(True, add_prefix_space=True)}, "pre-tokenizer is none of"),
        ({"pre_tokenizer": sequence(split(LLAMA3 + "|x"), byte_level(False))}, "pre-tokenizer is none of"),
        ({"pre_tokenizer": sequence(split(LLAMA3), byte_level(False))}, "ignore_merges = False, but llama.cpp does otherwise for 'llama-bpe'"),
        ({"normalizer": {"type": "NFC"}}, r"it normalizes text \(NFC\), and llama.cpp does not"),
        ({"model": {"merges": []}}, "it has no merges"),
        ({"model": {"dropout": 0.1}}, "its model has dropout = 0.1"),
        ({"added_tokens": [*SPECIALS, added(640, "<x>", lstrip=True)]}, "token '<x>' has lstrip"),
        ({"added_tokens": [*SPECIALS, added(640, "[PAD641]")]}, r"two ids have the text '\[PAD641\]'"),
    ],
)
def test_tokenizers_that_llama_cpp_does_not_have_are_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    tokenizer = edit_tokenizer(tmp_path / "it", **changes)
    with pytest.raises(FormatError, match=f"the tokenizer in .*it cannot be written as GGUF: .*{says}"):
        describe_words(tokenizer, 648)


def test_tokenizer_larger_than_the_embedding_is_refused() -> None:
    with pytest.raises(FormatError, match="it has 640 tokens, but the model only 639 rows"):
        describe_words(Tokenizer(DEBUG_TOKENIZER), 639)


PIECES = [*ENDS, *BYTES, *LETTERS, ("ab", -1.5, NORMAL), ("▁ab", -2.5, NORMAL)]


def test_sentencepiece_keeps_scores_and_types(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_model(tmp_path / "it", PIECES, byte_fallback=True)).with_tokens(["<tool>"])
    words = describe_words(tokenizer, 266)
    assert (words.model, words.pre, words.merges) == ("llama", "default", [])
    assert words.tokens == [*(text for text, _, _ in PIECES), "<tool>", "[PAD265]"]
    assert words.types == [*(kind for _, _, kind in PIECES), 3, 5]
    assert words.scores == [*(score for _, score, _ in PIECES), -1000.0, -1000.0]
    assert words.ids == {"bos": 1, "eos": 2, "unk": 0}
    assert (words.adds_bos, words.adds_eos, words.adds_space) == (True, False, True)
    assert not describe_words(Tokenizer(write_model(tmp_path / "bare", PIECES, byte_fallback=True, dummy_prefix=False)), 264).adds_space


def test_sentencepiece_with_both_files_is_that_of_both(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", PIECES, byte_fallback=True)
    both = tmp_path / "both"
    both.mkdir()
    for name, content in Tokenizer(model).files_to_write().items():
        (both / name).write_bytes(content)
    with pytest.raises(FormatError, match=r"whose scores only its tokenizer\.model has: put that file into the folder"):
        describe_words(Tokenizer(both), 264)
    shutil.copy(model / "tokenizer.model", both)
    assert describe_words(Tokenizer(both), 264) == describe_words(Tokenizer(model), 264)
    write_model(both, [*PIECES[:-2], ("ab", -2.5, NORMAL), ("▁ab", -1.5, NORMAL)], byte_fallback=True)
    with pytest.raises(FormatError, match=r"the merges in tokenizer\.json do not follow the scores in tokenizer\.model"):
        describe_words(Tokenizer(both), 264)
    write_model(both, [*PIECES[:-2], ("▁ab", -2.5, NORMAL), ("ab", -1.5, NORMAL)], byte_fallback=True)
    with pytest.raises(FormatError, match=r"tokenizer\.model gives '▁ab' the id 262, tokenizer\.json 263"):
        describe_words(Tokenizer(both), 264)


def test_sentencepiece_that_llama_cpp_reads_otherwise_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"llama\.cpp does not normalize text as its normalizer does"):
        describe_words(Tokenizer(write_model(tmp_path / "extra", PIECES, byte_fallback=True, removes_extra=True)), 264)
    with pytest.raises(FormatError, match="pre-tokenizer is none of"):  # without bytes, what is no piece is <unk>
        describe_words(Tokenizer(write_model(tmp_path / "unk", [*ENDS, *LETTERS, ("ab", -1.5, NORMAL)])), 264)
