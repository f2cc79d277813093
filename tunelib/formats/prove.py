"""The export proves itself: it is read back and compared with the live weights before it gets its name."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunelib import files
from tunelib.data.tokenizer import Tokenizer
from tunelib.errors import CheckpointError, FormatError, SaveError
from tunelib.formats.compare import NOT_COMPUTED, different_fields
from tunelib.formats.live import LiveWeights
from tunelib.formats.load import own_part
from tunelib.formats.plan import Plan
from tunelib.formats.source import StoredModel, check_model, open_checkpoint
from tunelib.formats.tensors import Where, blocks_of, name_of, same_bits
from tunelib.formats.write import write_checkpoint
from tunelib.model.config import ModelConfig
from tunelib.model.decoder import Decoder
from tunelib.model.streamed import streamed_logits
from tunelib.parallel.fsdp import forward_only
from tunelib.parallel.reduce import agree, agreed, gather_objects, local

CHECK_FILE = "export_check.json"
PROBES = ("The quick brown fox jumps over the lazy dog.", "def add(a, b):\n    return a + b", "1, 1, 2, 3, 5, 8, 13,")
MAX_PROBE_TOKENS = 64
LOGITS_TOLERANCE = 1e-3  # of the largest logit, for another order of summation in float32


def export_model(plan: Plan, model: Decoder, target: Path, is_main: bool, tokenizer: Tokenizer | None, check: bool, sharded: bool) -> dict[str, Any]:
    """Write a spread model as a folder, and what reading it back showed as export_check.json beside it. Collective.

    Args:
        check: read it back and compare, before it gets its name.
        sharded: whether each process holds but a part of the model: then no logits are compared.

    Raises:
        SaveError: on every rank: it cannot be written, or is not what was trained. An older folder of that name stays as it was.
    """
    live = LiveWeights(model)
    place = target.with_name(CHECK_FILE)
    with agreed(f"{place} cannot be removed"):
        if is_main:
            place.unlink(missing_ok=True)  # it speaks of an older export

    def look_back(staging: Path) -> dict[str, Any]:
        return check_export(staging, plan, model, [] if sharded else find_probe(tokenizer, model.config))

    facts = write_checkpoint(plan, live.read, target, is_main, check=look_back if check else None)
    with agreed(f"{target} cannot be written"):
        if is_main and facts:
            files.replace_file(place, json.dumps(facts, indent=1) + "\n")
    return facts


def describe_export(plan: Plan, facts: dict[str, Any]) -> str:
    """The export in a few words, for the end of a run."""
    what = {"hf": "a Hugging Face folder", "meta": "a Meta folder", "dcp": "a DCP folder", "torch": "a folder with a torch file"}[plan.form.kind]
    if not facts:
        return what
    if not facts["largest_rounding"]["value"]:
        return f"{what}, read back and equal to the trained weights"
    logits = facts.get("logits")
    moved = f", which moves logits by up to {logits['largest_difference_from_trained_model']:.2g}" if logits else ""
    return f"{what}, read back and equal to the trained weights, rounded to {' and '.join(facts['dtypes'])}{moved} ({CHECK_FILE})"


def find_probe(tokenizer: Tokenizer | None, config: ModelConfig) -> list[int]:
    """Token ids whose logits are compared: fixed texts, or without a tokenizer the first ids."""
    ids = [number for text in PROBES for number in tokenizer.encode(text, add_special_tokens=False).ids] if tokenizer else range(MAX_PROBE_TOKENS)
    return [number % config.vocab_size for number in ids][: min(MAX_PROBE_TOKENS, config.max_position_embeddings)]


def check_export(folder: Path, plan: Plan, model: Decoder, probe: list[int]) -> dict[str, Any]:
    """Read an export back, every rank its own shards, and compare it with the live weights. Collective.

    With a probe also its logits: those of the folder, read layer by layer by what its own config says, against those of the live
    weights rounded to the export's type.

    Args:
        folder: the export, before it has its name.
        model: the live one.
        probe: token ids; empty where no process holds the model alone.

    Returns:
        The numbers, to be written down.

    Raises:
        SaveError: on every rank: a weight or a logit is not the live one rounded to the type of the export.
    """
    config = model.config
    live = LiveWeights(model)
    worst, worst_name, error, stored = 0.0, "", None, None
    try:
        stored = open_checkpoint(folder, plan.fields)
        if fields := different_fields(stored.config, config, exempt=NOT_COMPUTED):
            raise FormatError(f"its config differs from the model's: {'; '.join(fields)}")
        check_model(stored)
    except (FormatError, CheckpointError, OSError) as problem:
        error = SaveError(f"the export was read back, and {problem}")
    agree(error)
    assert stored is not None
    for name in live.own:
        tensor = live.get(name)  # by all ranks that have it together
        try:
            for inner, part in _own_blocks(tensor):
                back, mine = stored.read(name, part), local(tensor)[inner].cpu()
                if back.dtype != plan.dtypes[name]:
                    raise FormatError(f"{name} is {name_of(back.dtype)} instead of {name_of(plan.dtypes[name])}")
                if not same_bits(back, mine.to(back.dtype)):
                    raise FormatError(f"{name} is not what was trained, by up to {(back.double() - mine.double()).abs().max().item():.3g}")
                if mine.numel() and (distance := (back.double() - mine.double()).abs().max().item()) > worst:
                    worst, worst_name = distance, name
        except (FormatError, OSError) as problem:
            error = error or SaveError(f"the export was read back, and {problem}")
    agree(error)
    distance, name = max(gather_objects((worst, worst_name)))
    facts: dict[str, Any] = {
        "format": plan.form.kind,
        "dtypes": sorted({name_of(dtype) for dtype in plan.dtypes.values()}),
        "tensors_compared": len(live.names),
        "largest_rounding": {"value": distance, "tensor": name},
    }
    with agreed("the export cannot be checked"):
        if probe:
            facts["logits"] = _compare_logits(stored, config, plan, model, probe)
    return facts


def _compare_logits(stored: StoredModel, config: ModelConfig, plan: Plan, model: Decoder, probe: list[int]) -> dict[str, Any]:
    live, device = LiveWeights(model), model.model.embed_tokens.weight.device
    with forward_only(model):
        own_logits = model(torch.tensor([probe], device=device), torch.arange(len(probe), device=device)[None], (len(probe),))[0].float().cpu()

    def read_rounded(name: str, where: Where) -> Tensor:
        return live.read(name, where).to(plan.dtypes[name]).cpu()

    exported, expected = streamed_logits(stored.config, stored.read, probe), streamed_logits(config, read_rounded, probe)
    distance, largest = (exported - own_logits).abs().max().item(), own_logits.abs().max().item()
    beyond_rounding = (exported - expected).abs().max().item()
    own_dtype = model.model.embed_tokens.weight.dtype
    is_rounded = own_dtype.itemsize < 4 or any(plan.dtypes[name] != own_dtype for name in live.names)
    if not same_bits(exported, expected) or (not is_rounded and distance > LOGITS_TOLERANCE * largest):
        what = f"by {beyond_rounding:.3g} beyond the rounding of its type, by {distance:.3g} in all"
        raise SaveError(f"the export was read back, and its logits differ from the trained model's {what}")
    return {"tokens": len(probe), "largest_difference_from_trained_model": distance, "largest_logit": largest}


def _own_blocks(parameter: Tensor) -> Iterator[tuple[Where, Where]]:
    """Blocks of this rank's part of a tensor: where each lies in the part, and where in the whole."""
    begins = [part.start or 0 for part in own_part(parameter)]
    for block in blocks_of(tuple(local(parameter).shape)):
        yield block, tuple(slice(begin + part.start, begin + part.stop) for begin, part in zip(begins, block, strict=True))
