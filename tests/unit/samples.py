"""Small real things that the unit tests are made with: tokenizers, documents, models."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

from tunelib.config.schema import Columns
from tunelib.data.build import Facts
from tunelib.data.index import FoundSource, Index, IndexedSource
from tunelib.data.sources import OpenedSource
from tunelib.data.tokenizer import Tokenizer
from tunelib.model.config import ModelConfig
from tunelib.model.decoder import Decoder, build_on_meta, draw_weight

REPOSITORY = Path(__file__).parents[2]
DEBUG_TOKENIZER = REPOSITORY / "train_configs/assets/debug/tokenizer"
SMOLLM2 = REPOSITORY / "assets/SmolLM2-135M-Instruct"


def write_tokenizer(folder: Path, specials: list[str], template: str | None = None, **settings: Any) -> Path:
    """A tokenizer folder: one token per byte after the special ones, which have the ids 0, 1, …"""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Library(models.BPE(vocab={token: number for number, token in enumerate([*specials, *alphabet])}, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(specials)
    library.save(str(folder / "tokenizer.json"))
    if template is not None:
        settings["chat_template"] = template
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def open_tokenizer(folder: Path, specials: list[str], template: str | None = None, **settings: Any) -> Tokenizer:
    """The tokenizer of `write_tokenizer`."""
    return Tokenizer(write_tokenizer(folder, specials, template, **settings))


def make_index(lengths: list[int], trained: list[list[bool]] | None = None) -> Index:
    """Documents of the given numbers of positions; document d has the tokens 1000·d, 1000·d + 1, …

    Args:
        trained: for each document, which of its labels (as many as positions) are trained; all where left out.
    """
    flags = trained if trained is not None else [[True] * length for length in lengths]
    documents = [1000 * number + np.arange(length + 1, dtype=np.int32) for number, length in enumerate(lengths)]
    marked = [np.where([True, *of_document], document, ~document) for document, of_document in zip(documents, flags, strict=True)]
    opened = OpenedSource("made here", ("made here",), digest="made here", size_bytes=0, notes=())
    found = FoundSource(opened, "text", "", Columns())
    fingerprint = {"data": "made here", "dataset.too_long": "split", "training.seq_len": max(lengths)}
    source = IndexedSource(found, np.concatenate(marked), Facts("text"), fingerprint)
    return Index(
        (source,),
        source=np.zeros(len(lengths), dtype=np.int16),
        starts=np.cumsum([0, *(length + 1 for length in lengths)])[:-1].astype(np.int64),
        lengths=np.array(lengths, dtype=np.int64),
        num_trained=np.array([sum(of_document) for of_document in flags], dtype=np.int64),
        files=np.zeros(len(lengths), dtype=np.int64),
        lines=np.arange(1, len(lengths) + 1),
        digests=np.array([hash(document.tobytes()) for document in documents], dtype=np.int64),
    )


TINY_FIELDS: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
"""A config.json of the smallest model with everything in it."""


def tiny_config(**changes: Any) -> ModelConfig:
    """The model of TINY_FIELDS, with some fields changed."""
    from tunelib.model.families import parse_config

    return parse_config({**TINY_FIELDS, **changes}, "tiny")


def tiny_model(dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> Decoder:
    """A drawn model of `tiny_config`, its weights large enough for differences to show."""
    config = tiny_config(initializer_range=0.3, **changes)
    model = build_on_meta(config, dtype).to_empty(device="cpu")
    model.tie_weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(draw_weight(config, name, parameter.shape, seed))
    return model


def write_model(folder: Path, model: Decoder, tokenizer: Path | None = None) -> Path:
    """A Hugging Face folder of a model, with a copy of a tokenizer folder's files."""
    from tunelib.model.families import hf_config

    folder.mkdir(parents=True)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in tied}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(hf_config(model.config)))
    for file in tokenizer.iterdir() if tokenizer else ():
        shutil.copy(file, folder)
    return folder
