"""What lies at a path: which form it has, by its files alone, and which tensors are stored there under which names."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunelib import files
from tunelib.errors import FormatError
from tunelib.formats.dcp import open_chunks
from tunelib.formats.safetensors_file import read_safetensors
from tunelib.formats.tensors import Piece, Stored
from tunelib.formats.torch_file import read_torch_file

CONFIG_FILE, PARAMS_FILE = "config.json", "params.json"
SAFETENSORS, BIN = "model.safetensors", "pytorch_model.bin"
META_PATTERN, DCP_METADATA = "consolidated.*.pth", ".metadata"
TORCH_SUFFIXES = (".pt", ".pth", ".bin")


@dataclass(frozen=True)
class Found:
    """The tensors that lie at a path.

    Attributes:
        kind: the form: "hf", "meta", "dcp" or "torch".
        partition: file → stored name → the tensor, in order; a form that divides tensors has parts of one in several files.
        chunks: for a DCP folder instead: stored name → its chunks.
        index: the JSON that says which file holds which tensor, where there is one.
    """

    kind: str
    partition: dict[str, dict[str, Stored]] = field(default_factory=dict)
    chunks: dict[str, list[Piece]] = field(default_factory=dict)
    index: dict[str, Any] | None = None


def says_what_model(path: Path) -> bool:
    """Whether a config.json or params.json lies with a checkpoint."""
    folder = path if path.is_dir() else path.parent
    return any((folder / name).is_file() for name in (CONFIG_FILE, PARAMS_FILE))


def find_kind(path: Path) -> str:
    """The form of what lies at a path, by its files alone.

    Raises:
        FormatError: nothing lies there, or no checkpoint; the text says what does.
    """
    if path.is_file():
        if path.suffix in TORCH_SUFFIXES:
            return "torch"
        hints = {".gguf": "GGUF is written, not read: convert what it was made from", ".safetensors": "name the folder that it lies in"}
        hint = hints.get(path.suffix, "name a checkpoint's folder")
        raise FormatError(f"{path} is not a checkpoint of a form that is read from a single file ({', '.join(TORCH_SUFFIXES)}): {hint}")
    if not path.is_dir():
        raise FormatError(f"{path} does not exist; scripts/download.py fetches a model from the Hub")
    if (path / DCP_METADATA).is_file():
        return "dcp"
    if any((path / f"{name}{ending}").is_file() for name in (SAFETENSORS, BIN) for ending in ("", ".index.json")):
        return "hf"
    if any(path.glob(META_PATTERN)):
        return "meta"
    if len(list(_torch_files(path))) == 1:
        return "torch"
    for inside in ("export", "original", "checkpoint"):
        if (path / inside).is_dir():
            below = "one of its step folders" if inside == "checkpoint" else "the folder"
            raise FormatError(f"{path} holds no weights itself; name {below} {path / inside}")
    if (steps := sorted(path.glob("step-*"))) and any((step / DCP_METADATA).is_file() for step in steps):
        raise FormatError(f"{path} holds no weights itself, but step folders: name one, such as {steps[-1]}")
    wanted = f"{SAFETENSORS}, {BIN}, one of them with .index.json, {META_PATTERN}, {DCP_METADATA} (DCP), or one .pt file"
    raise FormatError(f"{path} holds no weights that are known: {wanted}")


def look_into(path: Path) -> Found:
    """The tensors that are stored at a path. Only headers are read.

    Raises:
        FormatError: no weights, a missing or damaged file, or an index and files that disagree.
    """
    kind = find_kind(path)
    return {"hf": _open_hf, "meta": _open_meta, "dcp": _open_dcp, "torch": _open_torch}[kind](path)


def _open_hf(path: Path) -> Found:
    """Safetensors where there are any, else .bin; the index decides which files count."""
    for single in (SAFETENSORS, BIN):
        read = read_safetensors if single == SAFETENSORS else read_torch_file
        index_path = path / f"{single}.index.json"
        if index_path.is_file():
            index = _read_index(index_path)
            partition: dict[str, dict[str, Stored]] = {}
            weight_map = index["weight_map"]
            for file in dict.fromkeys(weight_map.values()):
                held = read(path / file)
                if lacking := sorted(name for name, where in weight_map.items() if where == file and name not in held):
                    raise FormatError(f"{path / file} lacks {lacking[0]}, which {index_path.name} says it holds")
                # A copy of what the index places elsewhere does not count; what it does not list at all is looked at.
                partition[file] = {name: region for name, region in held.items() if weight_map.get(name, file) == file}
            return Found("hf", partition, index=index)
        if (path / single).is_file():
            return Found("hf", {single: dict(read(path / single))})
    raise AssertionError("find_kind has seen one of them")


def _open_torch(path: Path) -> Found:
    file = path if path.is_file() else next(_torch_files(path))
    return Found("torch", {file.name: dict(read_torch_file(file))})


def _open_meta(path: Path) -> Found:
    names = sorted(file.name for file in path.glob(META_PATTERN))
    expected = [f"consolidated.{number:02d}.pth" for number in range(len(names))]
    if names != expected:
        raise FormatError(f"{path} holds {', '.join(names)}: {next(name for name in expected if name not in names)} is missing")
    partition: dict[str, dict[str, Stored]] = {name: dict(read_torch_file(path / name)) for name in names}
    first = partition[names[0]].keys()
    for name, held in partition.items():
        if different := sorted(first ^ held.keys()):
            raise FormatError(f"{path / name} and {names[0]} do not hold the same tensors: {different[0]} is in one of them only")
    return Found("meta", partition)


def _open_dcp(path: Path) -> Found:
    return Found("dcp", chunks=open_chunks(path))


def _torch_files(folder: Path) -> Iterator[Path]:
    return (file for file in sorted(folder.iterdir()) if file.suffix in TORCH_SUFFIXES and file.is_file())


def _read_index(path: Path) -> dict[str, Any]:
    index = files.read_json(path, FormatError)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise FormatError(f"{path}: weight_map does not give a file for each tensor")
    for file in weight_map.values():
        if Path(file).name != file or not files.lies_inside(file):
            raise FormatError(f"{path} names {file!r}, which lies outside the folder")
        if Path(file).suffix != Path(path.name.removesuffix(".index.json")).suffix:
            raise FormatError(f"{path} names {file!r}, which is not such a file as the index is for")
    return index
