"""Any checkpoint to any form: open, plan, prove, and only then write, tensor by tensor."""

import ctypes
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from tunelib import files
from tunelib.data.tokenizer import Tokenizer
from tunelib.errors import DataError, FormatError, SaveError
from tunelib.formats.compare import NOT_COMPUTED, different_fields
from tunelib.formats.export import ORIGINAL, TOKENIZER_MODEL, plan_checkpoint
from tunelib.formats.form import Form
from tunelib.formats.found import CONFIG_FILE, TORCH_SUFFIXES, find_kind
from tunelib.formats.gguf import GGUF_TYPES, GgufPlan, plan_gguf, write_gguf
from tunelib.formats.plan import GGUF_FILE, KINDS, MAX_SHARD_BYTES, Plan, Wish, parse_size
from tunelib.formats.source import StoredModel, check_files, check_model, open_checkpoint, read_fields
from tunelib.formats.tensors import Untouched, Where, bounds_of, name_of
from tunelib.formats.write import commit, write_checkpoint
from tunelib.model.families import parse_config
from tunelib.parallel.runtime import DTYPES

SUFFIXES = {"torch": TORCH_SUFFIXES, "gguf": (".gguf",)}
"""Forms that may be a file of such a name, instead of a folder that holds one."""
UNREADABLE = "the tokenizer cannot be read here; its files come along as they are"
FILE_SUFFIXES = (*TORCH_SUFFIXES, ".gguf", ".safetensors")


@dataclass(frozen=True)
class Conversion:
    """A conversion that was proven, before a byte is written.

    Attributes:
        gguf: the plan of a GGUF file, in place of ``plan``.
        single_file: the name of the only file that is kept, where OUT is a file.
        notes: what the target cannot hold, and what was left out.
        read: gives a weight that is written, or its part.
    """

    source: StoredModel
    target: Path
    plan: Plan | None
    gguf: GgufPlan | None
    single_file: str
    notes: tuple[str, ...]
    read: Callable[[str, Where], Tensor | Untouched]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors to be written."""
        plan = self.plan or self.gguf
        assert plan is not None
        return plan.num_bytes


def plan_conversion(
    source_path: Path,
    target: Path,
    kind: str,
    dtype: str = "",
    like_path: Path | None = None,
    max_shard_size: str = "",
    model_parallel: int = 0,
    names: str = "",
    chat_template: str | None = None,
) -> Conversion:
    """Look at both ends and prove that the conversion is complete.

    Args:
        dtype: of all tensors; empty for those that they have (GGUF: also "q8_0").
        like_path: a checkpoint whose config and tokenizer to take, and, where it has the same form, files and names.
        max_shard_size: of one file, such as "5GB".
        model_parallel: files of Meta's form.
        names: "meta" for a DCP folder with Meta's names, as torchtitan has it, or "hf"; empty for those of a DCP folder that it comes from or
            is like, else Hugging Face's.
        chat_template: in place of the tokenizer's own.

    Raises:
        FormatError: what cannot be read, does not fit together, or cannot be written as asked.
    """
    _check_wishes(kind, dtype, max_shard_size, model_parallel, names)
    target = target.resolve() if target.is_symlink() else target  # what is exchanged is a folder, not the link to it
    check_target(target, SUFFIXES.get(kind, ()))
    if source_path.is_dir() and target.resolve().is_relative_to(source_path.resolve()):
        raise FormatError(f"{target} lies in {source_path}, which is only read; name a folder outside of it")
    like = _open_like(like_path) if like_path is not None else None
    source = open_checkpoint(source_path, like.fields if like is not None else None)
    if like is not None:
        source = _take_config(source, like)
    check_files(source)
    check_model(source)
    home = like.folder if like is not None else source.folder
    tokenizer, notes = _find_tokenizer(home)
    notes += _describe_skipped(source)
    if kind == "gguf" and tokenizer is None and notes[0].startswith(UNREADABLE):
        raise FormatError(f"a GGUF file holds the tokenizer too; {notes[0]}")
    if kind == "gguf":
        shapes = {name: info.shape for name, info in source.weights.items()}
        own_dtype = name_of(next(iter(source.weights.values())).dtype)
        template = tokenizer.chat_template if tokenizer else None
        gguf = plan_gguf(source.config, shapes, tokenizer, template, dtype or own_dtype, home.absolute().name)
        return Conversion(source, target, None, gguf, GGUF_FILE if target.suffix.lower() in SUFFIXES["gguf"] else "", tuple(notes), source.read)
    weights = {name: replace(info, dtype=DTYPES[dtype]) if dtype else info for name, info in source.weights.items()}
    form = like.form if like is not None and like.form is not None else source.form
    is_same_form = form.kind == kind and not max_shard_size and not model_parallel and kind != "dcp"
    is_dcp_like = kind == "dcp" and form.kind == "dcp" and not names
    meta_names, prefix = (form.is_meta, form.prefix) if is_dcp_like else (names == "meta", "")
    wish = Wish(kind, parse_size(max_shard_size) if max_shard_size else MAX_SHARD_BYTES, model_parallel or 1, meta_names, prefix)
    fields = source.fields
    if source.form.kind == "meta" and kind != "meta" and like is None and tokenizer is not None:
        fields = tokenizer.special_ids | fields
    stop_ids = tokenizer.stop_ids if tokenizer else frozenset()
    planned = plan_checkpoint(wish, form if is_same_form else None, weights, fields, home, tokenizer, chat_template, stop_ids)
    single_file = next(iter(planned.form.files)) if kind == "torch" and target.suffix.lower() in TORCH_SUFFIXES else ""
    return Conversion(source, target, planned, None, single_file, (*notes, *planned.notes), _pass_on(planned, source))


def convert(conversion: Conversion, wrote: Callable[[int], None] = lambda _: None) -> None:
    """Do what was planned; an interruption leaves nothing that looks finished.

    Args:
        wrote: called with the number of bytes after each tensor.

    Raises:
        SaveError: no room on the disk, or it cannot be written.
    """
    target = conversion.target
    parent = next(folder for folder in target.absolute().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < conversion.num_bytes:
        raise SaveError(f"{target} needs {conversion.num_bytes / 2**20:,.0f} MiB, but {free / 2**20:,.0f} MiB are free there")
    try:
        with files.hold_name(target):
            if conversion.plan is not None:
                write_checkpoint(conversion.plan, conversion.read, target, wrote=wrote, single_file=conversion.single_file, replace=False)
            else:
                _write_gguf_file(conversion, wrote)
    except OSError as error:
        raise SaveError(f"{target} cannot be written: {error}") from None


def _pass_on(plan: Plan, source: StoredModel) -> Callable[[str, Where], Tensor | Untouched]:
    """Reads what is written: a weight whose bytes stay as they are is not made a tensor of."""
    dtypes = plan.dtypes
    changed = {entry.source for entries in plan.form.files.values() for entry in entries if entry.head_dim}

    @lru_cache(maxsize=1)
    def read_whole(name: str) -> Tensor:
        return source.read(name)

    def read(name: str, where: Where) -> Tensor | Untouched:
        stored = source.find(name)
        if bounds_of(where, stored.info.shape)[1:] != bounds_of((), stored.info.shape)[1:]:
            return read_whole(name)[where]  # columns: the other files' come next
        is_same = not stored.head_dim and name not in changed and stored.info.dtype == dtypes[name]
        return Untouched(stored, where) if is_same and stored.info.shape else stored.read(where)

    return read


def _write_gguf_file(conversion: Conversion, wrote: Callable[[int], None]) -> None:
    assert conversion.gguf is not None
    staging = files.make_staging(conversion.target)
    try:
        write_gguf(conversion.gguf, staging / GGUF_FILE, conversion.source.read, wrote)
        commit(staging, conversion.target, files.describe_files(staging, [GGUF_FILE]), conversion.single_file, replace=False)
    finally:
        files.remove_folder(staging)


def keep_freed_memory() -> None:
    """Have the C library keep what is freed for the next tensor, in this process from now on: else each is mapped and cleared anew."""
    if sys.platform == "linux":
        trim_threshold, mmap_threshold = -1, -3
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(mmap_threshold, 1 << 30)
            libc.mallopt(trim_threshold, 1 << 30)


def check_target(target: Path, suffixes: tuple[str, ...] = ()) -> None:
    """Make sure that nothing is overwritten.

    Args:
        suffixes: with which the target is a file.

    Raises:
        FormatError: it exists and is not an empty folder, or is named like a file of another form.
    """
    if target.name in ("", ".."):
        raise FormatError(f"{target} cannot be exchanged as a whole: give the folder that is to be written a name")
    if target.is_dir() and any(target.iterdir()):
        raise FormatError(f"{target} is not empty: nothing is overwritten; name another folder, or remove it first")
    if target.exists() and (not target.is_dir() or target.suffix.lower() in suffixes):
        raise FormatError(f"{target} exists: nothing is overwritten; name another, or remove it first")
    if target.suffix.lower() in FILE_SUFFIXES and target.suffix.lower() not in suffixes:
        others = f", or a file that ends in {' or '.join(suffixes)}" if suffixes else ""
        raise FormatError(f"{target} is named like a file of another form; name a folder{others}")


def _check_wishes(kind: str, dtype: str, max_shard_size: str, model_parallel: int, names: str) -> None:
    """Refuse what has no effect on this form."""
    if kind not in KINDS:
        raise FormatError(f"--to {kind}: the forms are {', '.join(KINDS)}")
    dtypes = GGUF_TYPES if kind == "gguf" else tuple(DTYPES)
    if dtype and dtype not in dtypes:
        raise FormatError(f"--dtype {dtype}: {kind} takes {', '.join(dtypes)}")
    given = {
        "--max_shard_size": (bool(max_shard_size), ("hf", "dcp")),
        "--model_parallel": (model_parallel != 0, ("meta",)),
        f"--dcp_names {names}": (bool(names), ("dcp",)),
    }
    for name, (is_given, kinds) in given.items():
        if is_given and kind not in kinds:
            raise FormatError(f"{name} has no effect with --to {kind}; it is for {' and '.join(kinds)}")
    if model_parallel < 0:
        raise FormatError(f"--model_parallel {model_parallel}: a number of files from 1 up")


@dataclass(frozen=True)
class _Likeness:
    """What is taken from another checkpoint; without weights it has no form."""

    folder: Path
    fields: dict[str, Any]
    form: Form | None


def _open_like(path: Path) -> _Likeness:
    """Look at what the target is to be like: a checkpoint, or a folder with a config.json alone."""
    try:
        find_kind(path)
    except FormatError:
        if not (path / CONFIG_FILE).is_file():
            raise
        return _Likeness(path, read_fields(path), None)
    opened = open_checkpoint(path)
    return _Likeness(opened.folder, opened.fields, opened.form)


def _take_config(source: StoredModel, like: _Likeness) -> StoredModel:
    """The source with the config of another checkpoint, which must be one of the same model."""
    config = parse_config(like.fields, str(like.folder))
    exempt = (*NOT_COMPUTED, "tie_word_embeddings")
    if fields := different_fields(source.config, config, exempt):
        raise FormatError(f"{source.path} and --like {like.folder} are not the same model: {'; '.join(fields)}")
    return replace(source, config=config, fields=like.fields, says=f"the config of --like {like.folder}")


def _find_tokenizer(home: Path) -> tuple[Tokenizer | None, list[str]]:
    """The tokenizer that lies in a folder, or in its ``original``; and a note where it cannot come along as it should."""
    for folder in (home, home / ORIGINAL):
        if any((folder / name).is_file() for name in ("tokenizer.json", TOKENIZER_MODEL)):
            try:
                return Tokenizer(folder), []
            except DataError as error:
                return None, [f"{UNREADABLE}: {error}"]
    return None, [f"{home} has no tokenizer, so none comes along"]


def _describe_skipped(source: StoredModel) -> list[str]:
    if not source.skipped:
        return []
    more = f" and {len(source.skipped) - 1} more" if len(source.skipped) > 1 else ""
    return [f"left out, being no weights: {source.skipped[0]}{more}"]
