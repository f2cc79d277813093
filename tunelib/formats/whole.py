"""A checkpoint of any form as a whole model in one process, with its tokenizer: to generate from, to measure, or to build on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from tunelib.config import read_written
from tunelib.data.chat import ChatTemplate, find_template
from tunelib.data.tokenizer import TOKENIZER_FILES, Tokenizer
from tunelib.errors import ConfigError, FormatError, SaveError
from tunelib.files import read_json
from tunelib.formats.convert import check_target
from tunelib.formats.export import find_companions
from tunelib.formats.load import RUN_CONFIG, find_tokenizer_folder
from tunelib.formats.merge import Merged, merge_stored
from tunelib.formats.peft import CONFIG_FILE as ADAPTER_CONFIG
from tunelib.formats.peft import open_adapter
from tunelib.formats.source import StoredModel, check_files, check_model, open_checkpoint
from tunelib.formats.weight_only import KINDS, is_quantized, quantize_weights, read_quantized, write_quantized
from tunelib.model.decoder import Decoder, build_on_meta
from tunelib.parallel.runtime import DTYPES


@dataclass(frozen=True)
class LoadedModel:
    """What `load_model` gives.

    Attributes:
        model: whole, on one device, its parameters without gradients; ``model.requires_grad_(True)`` for a training loop of your own.
        path: where the weights lie; an adapter's base.
        fields: the model as a config.json says it.
        tokenizer: None where none lies with the weights.
        template: of conversations; None where there is none.
        stop_ids: tokens that end an answer.
        sentence: what was loaded, in a line.
    """

    model: Decoder
    path: Path
    fields: dict[str, Any]
    tokenizer: Tokenizer | None
    template: ChatTemplate | None
    stop_ids: frozenset[int]
    sentence: str

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.model.embed_tokens.weight.device


def load_model(
    path: str | Path,
    *,
    adapter: str | Path = "",
    dtype: str = "auto",
    device: str | torch.device = "",
    quantize: str = "none",
    tokenizer_path: str | Path = "",
    chat_template: str = "",
) -> LoadedModel:
    """Load a model and its tokenizer from a Hugging Face, Meta or DCP folder, or a file of torch.save.

    Weights go tensor by tensor from the files into the model. An adapter is merged into them on the way. What scripts/quantize.py wrote is a form
    too.

    Args:
        path: the checkpoint; or an adapter folder alone, which names its base.
        adapter: a PEFT adapter folder, of these weights.
        dtype: "float32", "bfloat16", "float16", "float64", or "auto": as stored on a GPU, and float32 on a CPU.
        device: by default the first GPU, else the CPU.
        quantize: "int8" or "int4": round the weights of linear layers to so many bits; see `tunelib.formats.weight_only`.
        tokenizer_path: a folder with a tokenizer, where it is not the weights'.
        chat_template: as in dataset.chat_template; empty for the adapter's, else the tokenizer's own.

    Raises:
        ConfigError: an unknown dtype or quantize, or one of these or an adapter for weights that are quantised already.
        FormatError: no checkpoint, damaged or incomplete weights, or an adapter of other weights.
        DataError: a tokenizer or chat template that cannot be read.
    """
    folder, of_adapter = Path(path), Path(adapter) if adapter else None
    if of_adapter is None and (folder / ADAPTER_CONFIG).is_file():
        of_adapter, folder = folder, _base_of(folder)
    if dtype not in ("auto", *DTYPES) or quantize not in ("none", *KINDS):
        raise ConfigError(f"dtype {dtype!r}, quantize {quantize!r}: there are auto, {', '.join(DTYPES)}; and none, {', '.join(KINDS)}")
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    own_template = ""
    if is_quantized(folder):
        if of_adapter is not None or dtype != "auto" or quantize != "none":
            raise ConfigError(f"{folder} is quantised: it takes no adapter, no other type and no other bits; start from what it was made from")
        model, fields = read_quantized(folder)
        model, sentence = model.to(target).eval(), f"quantised folder {folder}"
    else:
        stored = open_checkpoint(folder)
        check_files(stored)
        check_model(stored)
        opened = open_adapter(of_adapter) if of_adapter is not None else None
        merged = merge_stored(stored, opened) if opened else None
        model, fields = _fill(stored, merged, dtype, target), stored.fields
        sentence = f"{stored.sentence}, in {str(model.lm_head.weight.dtype).removeprefix('torch.')}"
        if opened is not None and merged is not None:
            own_template = opened.chat_template or ""
            sentence = "; ".join([f"{sentence}, with the adapter {of_adapter}", *merged.notes])
        if quantize != "none":
            quantize_weights(model, quantize)
            sentence += f", linear layers in {quantize}"
    tokenizer, template = _find_words(folder, str(tokenizer_path), chat_template, own_template)
    stop_ids = (tokenizer.stop_ids if tokenizer else frozenset()) | (template.end_ids() if template else frozenset())
    return LoadedModel(model, folder, fields, tokenizer, template, stop_ids, sentence)


def _fill(stored: StoredModel, merged: Merged | None, dtype: str, device: torch.device) -> Decoder:
    """A whole model with stored weights, in a type by its name, and with what an adapter makes of them; one tensor is read at a time."""
    auto = next(iter(stored.weights.values())).dtype if device.type == "cuda" else torch.float32
    model = build_on_meta(stored.config, auto if dtype == "auto" else DTYPES[dtype]).requires_grad_(False).eval()
    model.to_empty(device=device)
    model.tie_weights()
    for name, parameter in model.named_parameters():
        own = merged.read(name, ()) if merged else None
        parameter.detach().copy_(stored.read(name) if own is None else own)
    return model


def _base_of(adapter: Path) -> Path:
    """Where an adapter says that its base is."""
    base = read_json(adapter / ADAPTER_CONFIG, FormatError).get("base_model_name_or_path")
    if not isinstance(base, str) or not Path(base).exists():
        raise FormatError(f"{adapter} is an adapter, of a base called {base!r}, which is not here: name the base first, and {adapter} as its adapter")
    return Path(base)


def _find_words(path: Path, tokenizer_path: str, chat_template: str, own_template: str) -> tuple[Tokenizer | None, ChatTemplate | None]:
    """The tokenizer as told or beside the weights, and the template as told, the adapter's own, that of the run that wrote a step folder, or the
    tokenizer's."""
    folder = find_tokenizer_folder(tokenizer_path, str(path))
    if folder is None or not (tokenizer_path or any((folder / name).is_file() for name in TOKENIZER_FILES)):
        return None, None
    tokenizer = Tokenizer(folder)
    if own_template and not chat_template:
        return tokenizer, ChatTemplate(tokenizer, str(path), own_template)
    if not chat_template and (path / RUN_CONFIG).is_file():
        chat_template = str(read_written(path / RUN_CONFIG).get("dataset.chat_template", ""))
    return tokenizer, find_template(tokenizer, chat_template, "chat_template")


def quantize_checkpoint(path: Path, target: Path, kind: str, adapter: str = "", dtype: str = "auto") -> str:
    """Load a model as `load_model` does, round its linear layers, and write the folder; what it is, in words.

    Raises:
        SaveError: it cannot be written; else what `load_model` raises.
    """
    check_target(target)
    loaded = load_model(path, adapter=adapter, dtype=dtype, device="cpu", quantize=kind)
    own = loaded.template.source if loaded.template is not None else None
    template = own if loaded.tokenizer is not None and own != loaded.tokenizer.chat_template else None
    folder = loaded.tokenizer.folder if loaded.tokenizer else None
    companions = find_companions(loaded.path if loaded.path.is_dir() else loaded.path.parent, folder, loaded.fields, template, loaded.stop_ids)
    companions |= loaded.tokenizer.files_to_write() if loaded.tokenizer else {}
    try:
        write_quantized(loaded.model, kind, loaded.fields, companions, target)
    except (OSError, SafetensorError) as error:
        raise SaveError(f"{target} cannot be written: {error}") from None
    return f"{loaded.sentence}, written to {target}"
