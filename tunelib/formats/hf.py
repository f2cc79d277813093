"""Hugging Face folders: which tensor lies in which file, and writing a folder of the same form."""

import contextlib
import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tunelib import files
from tunelib.errors import FormatError
from tunelib.formats.tensors import SafetensorsWriter, TensorInfo, nbytes, read_header, read_slice
from tunelib.parallel.reduce import agreed

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
MAX_FILE_BYTES = 5 * 10**9
GENERATION_CONFIG, CHAT_TEMPLATE = "generation_config.json", "chat_template.jinja"
# What an exported folder takes along from the tokenizer's folder, all of it from there.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "added_tokens.json", "vocab.json", "merges.txt"),
    *(CHAT_TEMPLATE, "chat_template.json"),
)
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# Derived tensors that old exports contain.
DERIVED_SUFFIX = "rotary_emb.inv_freq"


@dataclass(frozen=True)
class HfFolder:
    """A Hugging Face folder with safetensors weights.

    Attributes:
        partition: file name → its tensors, in their order there.
        index: the JSON that says which file holds which tensor, where there is one.
    """

    folder: Path
    config: dict[str, Any]
    partition: dict[str, list[TensorInfo]]
    index: dict[str, Any] | None

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """All tensors by name."""
        return {info.name: info for infos in self.partition.values() for info in infos}

    @cached_property
    def _file_of(self) -> dict[str, str]:
        return {info.name: file for file, infos in self.partition.items() for info in infos}

    def read(self, name: str, where: tuple[slice, ...] = ()) -> Tensor:
        """A tensor, or the part of it at ``where``."""
        return read_slice(self.folder / self._file_of[name], name, where)


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a folder; raises FormatError."""
    return files.read_json(folder / "config.json", FormatError, f"does not exist: is {folder} a model folder?")


def open_hf_folder(folder: Path) -> HfFolder:
    """Read the headers of a folder's weights; the index decides which files count.

    Raises:
        FormatError: no weights, a file that the index names is missing or damaged, or file and index disagree.
    """
    config, index = read_config(folder), None
    if (folder / INDEX_FILE).is_file():
        index = _read_index(folder / INDEX_FILE)
        partition, weight_map = {}, index["weight_map"]
        for file in dict.fromkeys(weight_map.values()):
            wanted = {name for name, where in weight_map.items() if where == file}
            partition[file] = [info for info in read_header(folder / file) if info.name in wanted]
            if lacking := sorted(wanted - {info.name for info in partition[file]}):
                raise FormatError(f"{folder / file} lacks {lacking[0]}, which {INDEX_FILE} says it holds")
    elif (folder / SINGLE_FILE).is_file():
        partition = {SINGLE_FILE: read_header(folder / SINGLE_FILE)}
    else:
        raise FormatError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}: no weights to start from")
    return HfFolder(folder, config, partition, index)


def check_names(source: HfFolder, expected: dict[str, torch.Size], tied: bool) -> None:
    """Prove that a folder holds exactly the weights of a model.

    Args:
        expected: the model's parameters, a tied head left out.

    Raises:
        FormatError: missing or unexpected tensors or wrong shapes, all of them; or a tied head that differs from the embedding.
    """
    found = {name: info for name, info in source.tensors.items() if not name.endswith(DERIVED_SUFFIX)}
    if tied and HEAD in found and EMBEDDING in found:
        if not torch.equal(source.read(HEAD), source.read(EMBEDDING)):
            raise FormatError(f"{source.folder}: config.json says tie_word_embeddings, but {HEAD} differs from {EMBEDDING}")
        del found[HEAD]
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not part of the model" for name in found if name not in expected]
    problems += [
        f"{name} has shape {list(found[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name].shape != tuple(shape)
    ]
    if problems:
        more = f" (and {len(problems) - 8} more)" if len(problems) > 8 else ""
        raise FormatError(f"{source.folder} does not fit its config.json: {'; '.join(problems[:8])}{more}")


@dataclass(frozen=True)
class ExportPlan:
    """Everything about an export but the weights.

    Attributes:
        partition: file name → tensors, in order.
        index: the JSON index, where there is more than one file or there was one.
        config: the config.json.
        companions: further files: name → what is copied, or the content of a text.
    """

    partition: dict[str, list[TensorInfo]]
    index: dict[str, Any] | None
    config: dict[str, Any]
    companions: dict[str, Path | str | bytes]

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """The type that each tensor leaves in."""
        return {info.name: info.dtype for infos in self.partition.values() for info in infos}


def plan_export(
    parameters: dict[str, tuple[torch.Size, torch.dtype]],
    config: dict[str, Any],
    source: HfFolder | None,
    dtype: torch.dtype | None,
    companions: dict[str, Path | str | bytes],
) -> ExportPlan:
    """Plan a folder in the form that the weights came in, or in files of at most MAX_FILE_BYTES.

    Args:
        parameters: shape and type of the model's parameters.
        source: the folder that the weights came from.
        dtype: the type asked for, or None for the one that each came in.
    """
    if source is not None:
        partition = {
            file: [
                TensorInfo(info.name, dtype or info.dtype, tuple(parameters[EMBEDDING if info.name not in parameters else info.name][0]))
                for info in infos
                if not info.name.endswith(DERIVED_SUFFIX)
            ]
            for file, infos in source.partition.items()
        }
    else:
        partition = _partition([TensorInfo(name, dtype or own, tuple(shape)) for name, (shape, own) in parameters.items()])
    stored = next(iter(partition.values()))[0].dtype
    name = "torch_dtype" if "torch_dtype" in config else "dtype"
    if source is None or dtype is not None:
        config = {**config, name: str(stored).removeprefix("torch.")}
    return ExportPlan(partition, _index_of(partition, source.index if source else None), config, companions)


def export_hf(plan: ExportPlan, tensors: dict[str, Tensor], target: Path, is_main: bool) -> None:
    """Write a Hugging Face folder; one tensor at a time is gathered, by all ranks, and written by one. Collective.

    Args:
        tensors: the model's parameters by name; a tied head is taken from the embedding.

    Raises:
        SaveError: on every rank; an older export stays as it was.
    """
    staging = files.staging_of(target)
    failed = f"{target} cannot be written"
    with agreed(failed):
        if is_main:
            files.make_staging(target)
    for file, infos in plan.partition.items():
        with contextlib.ExitStack() as stack:
            writer = None
            with agreed(failed):
                if is_main:
                    writer = SafetensorsWriter(stack.enter_context(open(staging / file, "wb")), infos)
            for info in infos:
                tensor = tensors[EMBEDDING if info.name == HEAD and HEAD not in tensors else info.name]
                whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                with agreed(failed):
                    if writer is not None:
                        writer.write(whole.to(info.dtype))
            with agreed(failed):
                if writer is not None:
                    writer.finish()
    with agreed(failed):
        if is_main:
            _write_companions(plan, staging)
            files.commit_folder(staging, target, files.describe_files(staging, files.list_files(staging)), kind="export")


def _write_companions(plan: ExportPlan, staging: Path) -> None:
    files.write_file(staging / "config.json", json.dumps(plan.config, indent=2) + "\n")
    for name, source in plan.companions.items():
        if isinstance(source, Path):
            shutil.copyfile(source, staging / name)
        else:
            files.write_file(staging / name, source)
    if plan.index is not None:
        files.write_file(staging / INDEX_FILE, json.dumps(plan.index, indent=2) + "\n")


def find_companions(
    source: Path | None, tokenizer_folder: Path | None, config: dict[str, Any], chat_template: str | None, stop_ids: frozenset[int]
) -> dict[str, Path | str | bytes]:
    """The files that make weights a folder for others: the tokenizer that was used, and how to generate.

    Args:
        source: the folder that the weights came from; its generation_config.json stays, but for further stop ids.
        chat_template: the template that was trained with, where it is not the tokenizer's own.
        stop_ids: ids that end an answer.
    """
    folder = tokenizer_folder or source
    found: dict[str, Path | str | bytes] = {name: folder / name for name in TOKENIZER_FILES if folder is not None and (folder / name).is_file()}
    if chat_template is not None:
        found[CHAT_TEMPLATE] = chat_template
    path = source / GENERATION_CONFIG if source is not None else None
    if path is not None and path.is_file():
        settings = files.read_json(path, FormatError)
        found[GENERATION_CONFIG] = path
    else:
        ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(name) is not None}
        settings = {"_from_model_config": True, **ids}
    listed = settings.get("eos_token_id")
    known = listed if isinstance(listed, list) else [] if listed is None else [listed]
    if further := sorted(stop_ids - set(known)):
        settings["eos_token_id"] = [*known, *further] if known or len(further) > 1 else further[0]
        settings.pop("_from_model_config", None)
    if path is None or not path.is_file() or further:
        found[GENERATION_CONFIG] = json.dumps(settings, indent=2) + "\n"
    return found


def _index_of(partition: dict[str, list[TensorInfo]], old: dict[str, Any] | None) -> dict[str, Any] | None:
    """The index of these files: as it came but for the sizes, or a new one where there are several files."""
    if old is None and list(partition) == [SINGLE_FILE]:
        return None
    weight_map = {info.name: file for file, infos in partition.items() for info in infos}
    order = [name for name in (old["weight_map"] if old else sorted(weight_map)) if name in weight_map]
    total = sum(nbytes(info) for infos in partition.values() for info in infos)
    metadata = (old or {}).get("metadata")
    return {
        "metadata": {**(metadata if isinstance(metadata, dict) else {}), "total_size": total},
        "weight_map": {name: weight_map[name] for name in order},
    }


def _partition(infos: list[TensorInfo]) -> dict[str, list[TensorInfo]]:
    groups: list[list[TensorInfo]] = [[]]
    size = 0
    for info in infos:
        if groups[-1] and size + nbytes(info) > MAX_FILE_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(info)
        size += nbytes(info)
    if len(groups) == 1:
        return {SINGLE_FILE: groups[0]}
    return {f"model-{number:05d}-of-{len(groups):05d}.safetensors": group for number, group in enumerate(groups, start=1)}


def _read_index(path: Path) -> dict[str, Any]:
    index = files.read_json(path, FormatError)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise FormatError(f"{path}: weight_map does not give a file for each tensor")
    for file in weight_map.values():
        if Path(file).name != file:
            raise FormatError(f"{path} names {file!r}, which lies outside the folder")
    return index
