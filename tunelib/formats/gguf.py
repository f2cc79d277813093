"""GGUF files, llama.cpp's format: a Llama with its tokenizer in one file, in 32, 16 or about 8.5 bits a weight.

What differs from Hugging Face's layout: llama.cpp turns neighbouring rows of q and k together, where Hugging Face turns row i with
row i + D/2 of a head; and Llama 3.1's scaling of the rotary frequencies is a tensor of their divisors. Writing one holds one
tensor of the source and one block of it in the type of the file. Reading GGUF is left out.

H heads, D head dim.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from tunelib import files
from tunelib.data.tokenizer import Tokenizer
from tunelib.errors import FormatError
from tunelib.formats.gguf_words import Words, describe_words
from tunelib.formats.tensors import to_pairs
from tunelib.model.config import ModelConfig
from tunelib.model.families.llama import ARCHITECTURE, EMBEDDING, HEAD, rotary_head_dim
from tunelib.model.rope import rope_frequencies

GGUF_TYPES = ("float32", "float16", "bfloat16", "q8_0")
Q8_0_VALUES, Q8_0_BYTES = 32, 34  # a block: 32 whole numbers of 8 bits and the float16 that they are multiplied with
LARGEST = {
    "float32": torch.finfo(torch.float32).max,
    "float16": torch.finfo(torch.float16).max,
    "bfloat16": torch.finfo(torch.bfloat16).max,
    "q8_0": 127 * torch.finfo(torch.float16).max,
}
"""The largest magnitude that each type holds."""
ALIGNMENT = 32  # bytes; where tensors may begin
BLOCK_VALUES = 1 << 24  # as many are converted at once: 64 MiB of float32
# Parts of a model's name at which llama.cpp changes how special tokens are parsed (the end of llama_vocab::impl::load).
NAMES_WITH_EFFECT = ("phi-3", "phi3", "modern-bert")
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file.

    Attributes:
        name: in the file.
        source: the Hugging Face name of the weight, or "" for the rotary frequencies' divisors.
        shape: as torch has it; the file lists dims the other way round.
        kind: one of `GGUF_TYPES`.
        head_dim: D where the rows of each head are put in pairs, else 0.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    kind: str
    head_dim: int

    @property
    def num_bytes(self) -> int:
        """Bytes of its data."""
        count = torch.Size(self.shape).numel()
        return count // Q8_0_VALUES * Q8_0_BYTES if self.kind == "q8_0" else count * getattr(torch, self.kind).itemsize


@dataclass(frozen=True)
class GgufPlan:
    """Everything about a GGUF file but the weights.

    Attributes:
        kind: the type of matrices, one of `GGUF_TYPES`; vectors stay float32.
        name: what the model calls itself.
        tensors: in their order in the file.
    """

    config: ModelConfig
    kind: str
    name: str
    words: Words
    chat_template: str | None
    tensors: list[GgufTensor]

    @property
    def num_bytes(self) -> int:
        """About the size of the file: exact for tensors and vocabulary, 2 KiB for what describes the model."""
        tensors = sum(_padded(tensor.num_bytes) + len(tensor.name) + 24 + 8 * len(tensor.shape) for tensor in self.tensors)
        return tensors + self.words.num_bytes + len((self.chat_template or "").encode()) + 2048


def plan_gguf(
    config: ModelConfig,
    tensors: dict[str, tuple[int, ...]],
    tokenizer: Tokenizer | None,
    chat_template: str | None,
    kind: str,
    name: str,
) -> GgufPlan:
    """Plan a GGUF file, and prove that llama.cpp can run it.

    Args:
        tensors: Hugging Face name → shape of every weight, a tied head left out.
        chat_template: Jinja source that is written down, or None for none.
        kind: the type of matrices, one of `GGUF_TYPES`.
        name: what the model calls itself.

    Raises:
        FormatError: the package gguf is missing, or GGUF or llama.cpp cannot hold the model or its tokenizer exactly.
    """
    gguf = _import_gguf()
    if kind not in GGUF_TYPES:
        raise FormatError(f"{kind!r} is not a type that GGUF files are written in; {', '.join(GGUF_TYPES)} are")
    if config.architecture != ARCHITECTURE:
        raise FormatError(f"{config.architecture} cannot be written as GGUF; {ARCHITECTURE} can")
    if marked := [part for part in NAMES_WITH_EFFECT if part in name.lower()]:
        raise FormatError(f"{name!r} cannot be the model's name in a GGUF file: llama.cpp reads texts otherwise for names with {marked[0]!r}")
    if config.head_dim % 2:
        raise FormatError(f"head_dim = {config.head_dim} is odd; llama.cpp turns neighbouring rows in pairs")
    if tokenizer is None:
        raise FormatError(
            "a GGUF file holds the tokenizer too, and there is none: put its files beside the weights, or name a folder that has them (--like)"
        )
    tied = config.tie_word_embeddings
    if (HEAD in tensors) == tied:  # without a head of its own, llama.cpp takes the embedding
        raise FormatError(f"tie_word_embeddings is {str(tied).lower()}, but {HEAD} is {'there' if tied else 'missing'}")
    if tensors.get(EMBEDDING) != (config.vocab_size, config.hidden_size):
        raise FormatError(f"{EMBEDDING} has shape {tensors.get(EMBEDDING)} instead of {(config.vocab_size, config.hidden_size)}")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    planned = [_plan_tensor(config, source, shape, kind, names) for source, shape in tensors.items()]
    if config.rope_scaling is not None:
        planned.insert(0, GgufTensor(ROPE_FACTORS, "", (config.head_dim // 2,), "float32", 0))
    return GgufPlan(config, kind, name, describe_words(tokenizer, config.vocab_size), chat_template, planned)


def write_gguf(
    plan: GgufPlan,
    path: Path,
    read: Callable[[str, tuple[slice, ...]], Tensor],
    wrote: Callable[[int], None] = lambda _: None,
) -> None:
    """Write a GGUF file, tensor after tensor; it has its name once it is whole and on disk.

    Args:
        read: gives a weight by its Hugging Face name, in Hugging Face's layout; an empty tuple means the whole.
        wrote: is told the number of bytes after the header and after each tensor, in all about ``plan.num_bytes``.

    Raises:
        FormatError: a weight is not a number, or larger than the type of the file can hold.
    """
    staging = files.staging_of(path)
    try:
        _write_header(plan, staging)
        with open(staging, "ab") as file:
            _pad(file)
            wrote(max(0, plan.num_bytes - sum(_padded(tensor.num_bytes) for tensor in plan.tensors)))
            for tensor in plan.tensors:
                whole = read(tensor.source, ()) if tensor.source else rope_factors(plan.config)
                assert tuple(whole.shape) == tensor.shape, f"{tensor.source} has shape {tuple(whole.shape)}, not {tensor.shape}"
                written = sum(file.write(block) for block in _encode(whole, tensor))
                assert written == tensor.num_bytes, f"{tensor.name} took {written} bytes, not {tensor.num_bytes}"
                wrote(written + _pad(file))
                del whole  # or it would be held while the next is read
            file.flush()
            os.fsync(file.fileno())
        os.replace(staging, path)
    finally:
        staging.unlink(missing_ok=True)
    files.sync_path(path.parent)


def rope_factors(config: ModelConfig) -> Tensor:
    """What Llama 3.1's scaling divides each rotary frequency by, (D/2,) float32."""
    return rope_frequencies(replace(config, rope_scaling=None), torch.device("cpu")) / rope_frequencies(config, torch.device("cpu"))


def _import_gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise FormatError("GGUF files need the package gguf: pip install gguf") from None
    return gguf


def _plan_tensor(config: ModelConfig, source: str, shape: tuple[int, ...], kind: str, names: Any) -> GgufTensor:
    name = names.get_name(source, try_suffixes=(".weight", ".bias"))
    if name is None:
        raise FormatError(f"{source} has no place in a GGUF file of a Llama")
    if kind == "q8_0" and len(shape) > 1 and shape[-1] % Q8_0_VALUES:
        raise FormatError(f"{source} has rows of {shape[-1]}, which q8_0 cannot hold: it takes {Q8_0_VALUES} values at a time; choose another type")
    return GgufTensor(name, source, tuple(shape), kind if len(shape) > 1 else "float32", rotary_head_dim(source, config))


def _encode(whole: Tensor, tensor: GgufTensor) -> Iterator[memoryview]:
    """The bytes of a weight, a block of rows at a time."""
    whole = whole.detach().cpu()
    rows = to_pairs(whole, tensor.head_dim) if tensor.head_dim else whole
    for block in rows.split(max(1, BLOCK_VALUES // torch.Size(tensor.shape[1:]).numel())):
        largest = block.abs().amax().item()
        if not largest <= LARGEST[tensor.kind]:
            raise FormatError(f"{tensor.source} holds {largest}; {tensor.kind} holds numbers up to {LARGEST[tensor.kind]:.6g}: choose another type")
        if tensor.kind == "q8_0":
            gguf = _import_gguf()
            yield gguf.quantize(block.float().numpy(), gguf.GGMLQuantizationType.Q8_0).data
        else:
            yield block.to(getattr(torch, tensor.kind)).contiguous().view(torch.uint8).numpy().data


def _write_header(plan: GgufPlan, path: Path) -> None:
    """Everything but the tensors' data."""
    gguf = _import_gguf()
    file_types = {
        "float32": gguf.LlamaFileType.ALL_F32,
        "float16": gguf.LlamaFileType.MOSTLY_F16,
        "bfloat16": gguf.LlamaFileType.MOSTLY_BF16,
        "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    }
    types = gguf.GGMLQuantizationType
    stored = {"float32": types.F32, "float16": types.F16, "bfloat16": types.BF16, "q8_0": types.Q8_0}
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA])
    writer.add_type("model")
    writer.add_name(plan.name)
    writer.add_file_type(file_types[plan.kind])
    if plan.kind == "q8_0":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_shape(writer, plan.config)
    _add_words(writer, plan.words)
    if plan.chat_template is not None:
        writer.add_chat_template(plan.chat_template)
    for tensor in plan.tensors:
        # The type given in numpy's words is not looked at where there is one in GGUF's.
        writer.add_tensor_info(tensor.name, tensor.shape, None, tensor.num_bytes, raw_dtype=stored[tensor.kind])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()


def _add_shape(writer: Any, config: ModelConfig) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _add_words(writer: Any, words: Words) -> None:
    writer.add_tokenizer_model(words.model)
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    writer.add_token_merges(words.merges)  # an empty list is left out
    writer.add_token_scores(words.scores)
    add_id = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "eot": writer.add_eot_token_id,
        "eom": writer.add_eom_token_id,
        "unk": writer.add_unk_token_id,
        "pad": writer.add_pad_token_id,
    }
    for name, number in words.ids.items():
        add_id[name](number)
    writer.add_add_bos_token(words.adds_bos)
    writer.add_add_eos_token(words.adds_eos)
    writer.add_add_space_prefix(words.adds_space)


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _pad(file: BinaryIO) -> int:
    """Fill up to where the next tensor may begin."""
    place = file.tell()
    return file.write(bytes(_padded(place) - place))
