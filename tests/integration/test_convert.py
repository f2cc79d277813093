"""Every form to every other and back gives the same bytes, and the same logits; what is wrong is one sentence and leaves nothing.

The sentences are in tests/golden/bad_checkpoints.txt, for people to read. UPDATE_GOLDEN=1 writes the file anew.
"""

import fcntl
import filecmp
import importlib
import json
import os
import pty
import shutil
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import sentencepiece
import tiktoken
import torch
from assets.fetch_tokenizers import fetch_tokenizer
from conftest import ROOT, TOKENIZER, run_script
from foreign import (
    COLUMN_SPLIT,
    DAMAGE,
    DAMAGE_META,
    ROW_SPLIT,
    State,
    legacy_bin,
    logits,
    make_hf,
    make_meta,
    make_single,
    make_torchtitan_dcp,
    malicious_dcp,
    malicious_pickle,
    meta_params,
)
from parity.meta_reference import make_meta_folder, meta_logits, random_meta_state
from safetensors.torch import load_file, save_file
from tiktoken.load import load_tiktoken_bpe
from tokenizers import Tokenizer as Library

import tunelib.formats.tensors as tensors_module
import tunelib.formats.write as write_module
from tunelib import files
from tunelib.data.tokenizer_model import LLAMA3_SPLIT
from tunelib.formats.compare import find_difference, find_faults
from tunelib.formats.convert import convert, plan_conversion
from tunelib.formats.source import open_checkpoint
from tunelib.model.streamed import streamed_logits

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
GOLDEN = ROOT / "tests/golden/bad_checkpoints.txt"
TOKENS = torch.randint(0, 96, (1, 60), generator=torch.Generator().manual_seed(1))
BF16 = {"dtype": torch.bfloat16}


def change(source: Path, target: Path, kind: str, **wishes: Any) -> tuple[str, ...]:
    """Convert; the notes."""
    conversion = plan_conversion(source, target, kind, **wishes)
    counts: list[int] = []
    convert(conversion, counts.append)
    assert kind == "gguf" or sum(counts) == conversion.num_bytes
    return conversion.notes


def read_file(path: Path) -> State:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def check_same_tensors(found: State, expected: State, in_order: bool = True) -> None:
    assert (list(found) if in_order else sorted(found)) == (list(expected) if in_order else sorted(expected))
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def check_same_folder(found: Path, expected: Path) -> None:
    """The same files with the same tensors in the same order, the same JSON, and all else byte for byte; besides there is a manifest."""
    names = {path.name for path in expected.iterdir()}
    assert {path.name for path in found.iterdir()} == names | {files.MANIFEST}
    for name in names - {files.MANIFEST}:
        if name.endswith((".pth", ".bin")):
            check_same_tensors(read_file(found / name), read_file(expected / name))
        elif name.endswith(".json") and not name.startswith("tokenizer"):
            assert json.loads((found / name).read_text()) == json.loads((expected / name).read_text()), name
        else:
            assert filecmp.cmp(found / name, expected / name, shallow=False), name
    manifest = files.read_manifest(found)
    assert files.find_damage(found, manifest["files"], manifest["files"]) == []


# There and back

MODELS: dict[str, dict[str, Any]] = {
    "GQA, 3 files, bfloat16": {"shards": 3, **BF16},
    "MHA, tied": {"kv_heads": 4, "tied": True},
    "GQA, tied, 3 files": {"tied": True, "shards": 3},
    "MHA, bfloat16, old config": {"kv_heads": 4, "old_config": True, **BF16},
    "GQA, scaled, with tokenizer": {"scaling": True, "tokenizer": TOKENIZER},
    "GQA, tied, 3 files of torch": {"tied": True, "shards": 3, "as_bin": True},
    "MHA, one file of torch, bfloat16": {"kv_heads": 4, "as_bin": True, **BF16},
}
MIDDLES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "DCP": ("middle", "dcp", {}),
    "DCP with Meta's names": ("middle", "dcp", {"names": "meta", "max_shard_size": "20KB"}),
    "Meta": ("middle", "meta", {}),
    "Meta, 2 files": ("middle", "meta", {"model_parallel": 2}),
    "torch folder": ("middle", "torch", {}),
    "torch file": ("middle.pt", "torch", {}),
    "safetensors": ("middle", "hf", {"max_shard_size": "20KB"}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a model of MODELS, made once."""
    base = tmp_path_factory.mktemp("models")

    def find(name: str) -> Path:
        if not (base / name).exists():
            make_hf(base / name, **MODELS[name])
        return base / name

    return find


@pytest.mark.parametrize("middle", MIDDLES)
@pytest.mark.parametrize("model", MODELS)
def test_hf_folder_comes_back_as_it_was(tmp_path: Path, models: Callable[[str], Path], model: str, middle: str) -> None:
    source, (name, kind, wishes) = models(model), MIDDLES[middle]
    change(source, tmp_path / name, kind, **wishes)
    change(tmp_path / name, tmp_path / "back", "hf", like_path=source)
    check_same_folder(tmp_path / "back", source)


@pytest.mark.parametrize("middle", ["DCP", "DCP with Meta's names", "torch folder"])
@pytest.mark.parametrize("model", ["MHA, tied", "MHA, bfloat16, old config", "GQA, scaled, with tokenizer"])
def test_form_that_carries_names_and_config_needs_no_likeness_but_for_the_order(
    tmp_path: Path, models: Callable[[str], Path], model: str, middle: str
) -> None:
    name, kind, wishes = MIDDLES[middle]
    change(models(model), tmp_path / name, kind, **wishes)
    change(tmp_path / name, tmp_path / "back", "hf")
    assert {path.name for path in (tmp_path / "back").iterdir()} == {path.name for path in models(model).iterdir()} | {files.MANIFEST}
    check_same_tensors(load_file(tmp_path / "back/model.safetensors"), load_file(models(model) / "model.safetensors"), in_order=False)
    for config in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "back" / config).read_text()) == json.loads((models(model) / config).read_text())


@pytest.mark.parametrize("model", MODELS)
def test_weights_come_back_from_metas_form_without_likeness(tmp_path: Path, models: Callable[[str], Path], model: str) -> None:
    source = models(model)
    change(source, tmp_path / "meta", "meta")
    change(tmp_path / "meta", tmp_path / "back", "hf")
    one, other = open_checkpoint(source), open_checkpoint(tmp_path / "back")
    assert (find_difference(one, other), find_faults(other)) == ("", [])
    assert other.config.tie_word_embeddings == one.config.tie_word_embeddings


def test_bin_becomes_safetensors_where_files_are_divided_anew_and_stays_bin_where_not(tmp_path: Path, models: Callable[[str], Path]) -> None:
    source = models("MHA, one file of torch, bfloat16")
    change(source, tmp_path / "stays", "hf")
    check_same_folder(tmp_path / "stays", source)
    change(source, tmp_path / "safetensors", "hf", max_shard_size="5GB")
    check_same_tensors(load_file(tmp_path / "safetensors/model.safetensors"), read_file(source / "pytorch_model.bin"), in_order=False)


@pytest.mark.parametrize("middle", ["hf", "dcp", "torch"])
@pytest.mark.parametrize(("model_parallel", "embedding_split"), [(1, "columns"), (4, "columns"), (4, "rows")])
@pytest.mark.parametrize("options", [{"kv_heads": 4}, {"kv_heads": 4, "scaling": True, **BF16}], ids=["Llama 2", "Llama 3"])
def test_meta_folder_comes_back_as_it_was(tmp_path: Path, middle: str, model_parallel: int, embedding_split: str, options: dict[str, Any]) -> None:
    state = make_hf(tmp_path / "hf", **options)
    params = meta_params(state, 4, 4, scaling=bool(options.get("scaling")))
    make_meta(tmp_path / "meta", state, 4, 4, params, model_parallel=model_parallel, embedding_split=embedding_split)
    change(tmp_path / "meta", tmp_path / "middle", middle)
    change(tmp_path / "middle", tmp_path / "back", "meta", like_path=tmp_path / "meta")
    check_same_folder(tmp_path / "back", tmp_path / "meta")


@pytest.mark.parametrize(("scaling", "embedding_split"), [(False, "columns"), (True, "rows")], ids=["Llama 2", "Llama 3"])
def test_files_of_metas_form_are_divided_as_the_generation_does_it(tmp_path: Path, scaling: bool, embedding_split: str) -> None:
    state = make_hf(tmp_path / "hf", kv_heads=4, scaling=scaling)
    make_meta(tmp_path / "meta", state, 4, 4, meta_params(state, 4, 4, scaling=scaling), model_parallel=4, embedding_split=embedding_split)
    change(tmp_path / "hf", tmp_path / "found", "meta", model_parallel=4)
    for path in (tmp_path / "meta").glob("*.pth"):
        check_same_tensors(read_file(tmp_path / "found" / path.name), read_file(path), in_order=False)


@pytest.mark.parametrize(
    ("full", "nested", "processes", "tied"),
    [(False, False, 1, False), (False, True, 1, True), (True, False, 1, True), (True, True, 1, False), (True, False, 2, False)],
)
def test_checkpoint_of_torchtitan_becomes_the_hf_folder(tmp_path: Path, full: bool, nested: bool, processes: int, tied: bool) -> None:
    state = make_hf(tmp_path / "hf", shards=2, tied=tied, **BF16)
    make_torchtitan_dcp(tmp_path / "step-10", state, 4, 2, full=full, nested=nested, processes=processes)
    notes = change(tmp_path / "step-10", tmp_path / "back", "hf", like_path=tmp_path / "hf")
    check_same_folder(tmp_path / "back", tmp_path / "hf")
    assert any("left out, being no weights" in note for note in notes)


def test_torchtitan_and_hf_names_of_dcp_are_what_their_names_say(tmp_path: Path, models: Callable[[str], Path]) -> None:
    source = models("GQA, 3 files, bfloat16")
    expected = make_torchtitan_dcp(tmp_path / "theirs", open_state(source), 4, 2)
    change(source, tmp_path / "ours", "dcp", names="meta")
    loaded = {name: torch.zeros_like(tensor) for name, tensor in expected.items() if name != "freqs_cis"}
    torch.distributed.checkpoint.load(loaded, checkpoint_id=tmp_path / "ours", no_dist=True)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.items())


def open_state(folder: Path) -> State:
    stored = open_checkpoint(folder)
    return {name: stored.read(name) for name in stored.weights}


def test_types_change_by_rounding_and_the_config_follows(tmp_path: Path, models: Callable[[str], Path]) -> None:
    source = models("GQA, tied, 3 files")
    for kind in ("hf", "dcp", "torch", "meta"):
        change(source, tmp_path / kind, kind, dtype="bfloat16")
        stored = open_checkpoint(tmp_path / kind)
        assert all(torch.equal(stored.read(name), tensor.bfloat16()) for name, tensor in open_state(source).items())
        assert kind == "meta" or stored.fields["dtype"] == "bfloat16"


@pytest.mark.parametrize("middle", MIDDLES)
def test_every_tensor_keeps_its_own_type(tmp_path: Path, middle: str) -> None:
    state = make_hf(tmp_path / "source", **BF16)
    mixed = {key: tensor.float() if "norm" in key else tensor for key, tensor in state.items()}
    save_file(mixed, tmp_path / "source/model.safetensors", metadata={"format": "pt"})
    name, kind, wishes = MIDDLES[middle]
    change(tmp_path / "source", tmp_path / name, kind, **wishes)
    change(tmp_path / name, tmp_path / "back", "hf", like_path=tmp_path / "source")
    check_same_folder(tmp_path / "back", tmp_path / "source")


def test_real_smollm2_comes_back_byte_for_byte(tmp_path: Path, smollm2: Path) -> None:
    for kind in ("dcp", "meta", "torch"):
        notes = change(smollm2, tmp_path / "middle", kind)
        named = [name for name in ("initializer_range", "max_position_embeddings") if any(name in note for note in notes)]
        assert (named != []) == (kind == "meta"), notes
        assert kind != "meta" or any("tokenizer.model" in note for note in notes)
        change(tmp_path / "middle", tmp_path / "back", "hf", like_path=smollm2)
        check_same_folder(tmp_path / "back", smollm2)
        shutil.rmtree(tmp_path / "middle")
        shutil.rmtree(tmp_path / "back")


# Logits


def join_meta(folder: Path) -> State:
    """The whole tensors of a Meta folder."""
    parts = [read_file(path) for path in sorted(folder.glob("consolidated.*.pth"))]
    has_whole_rows = parts[0]["tok_embeddings.weight"].shape[1] == len(parts[0]["norm.weight"])
    dims = dict.fromkeys(ROW_SPLIT, 0) | dict.fromkeys(COLUMN_SPLIT, 1) | {"tok_embeddings": 0 if has_whole_rows else 1}
    return {
        name: tensor if tensor.ndim == 1 or len(parts) == 1 else torch.cat([part[name] for part in parts], dims[name.split(".")[-2]])
        for name, tensor in parts[0].items()
    }


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()


@pytest.mark.parametrize("options", [{}, {"kv_heads": 4, "tied": True}, {"scaling": True}], ids=["GQA", "MHA, tied", "scaled"])
def test_logits_of_every_form_are_those_of_transformers(tmp_path: Path, options: dict[str, Any]) -> None:
    make_hf(tmp_path / "source", shards=2, **options)
    expected = logits(tmp_path / "source", TOKENS)
    assert expected.std() > 1  # a difference would show
    for name, kind, wishes in MIDDLES.values():
        target = tmp_path / f"{kind}-{len(list(tmp_path.iterdir()))}" / name
        change(tmp_path / "source", target, kind, **wishes)
        stored = open_checkpoint(target, open_checkpoint(tmp_path / "source").fields)
        assert distance(streamed_logits(stored.config, stored.read, TOKENS[0].tolist()), expected[0]) <= 1e-4
        if kind == "meta":
            params = json.loads((target / "params.json").read_text())
            assert distance(meta_logits(params, join_meta(target), TOKENS), expected) <= 1e-4


@pytest.mark.parametrize("model_parallel", [1, 2])
def test_logits_of_a_meta_folder_are_those_of_metas_equations(tmp_path: Path, model_parallel: int) -> None:
    params = {"dim": 64, "n_layers": 3, "n_heads": 8, "n_kv_heads": 2, "multiple_of": 32, "ffn_dim_multiplier": 1.3, "rope_theta": 500_000.0}
    state = random_meta_state(params, 96, seed=3)
    make_meta_folder(tmp_path / "meta", params, state, model_parallel=model_parallel, embedding_split="rows", extras=True)
    change(tmp_path / "meta", tmp_path / "hf", "hf")
    expected = meta_logits(params, state, TOKENS)
    assert distance(logits(tmp_path / "hf", TOKENS), expected) <= 1e-4 * max(1.0, expected.abs().max().item())


def test_rows_that_are_left_where_they_are_show_in_the_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = make_hf(tmp_path / "hf")
    expected = logits(tmp_path / "hf", TOKENS)
    make_meta(tmp_path / "meta", state, 4, 2)
    for module, function in ((write_module, "to_pairs"), (tensors_module, "to_halves")):
        monkeypatch.setattr(module, function, lambda rows, _: rows)
    change(tmp_path / "hf", tmp_path / "wrong-meta", "meta")
    params = json.loads((tmp_path / "wrong-meta/params.json").read_text())
    assert distance(meta_logits(params, join_meta(tmp_path / "wrong-meta"), TOKENS), expected) > 0.1
    change(tmp_path / "meta", tmp_path / "wrong-hf", "hf")
    assert distance(logits(tmp_path / "wrong-hf", TOKENS), expected) > 0.1


# Tokenizers

TEXTS = ["Hello, world!", "  two spaces\n\nand  lines\t", "naïve Zürich 東京 🙂", "def f(x):\n    return x**2 + 1234567", "don't I'LL"]


def sentencepiece_ids(path: Path) -> Callable[[str], list[int]]:
    return sentencepiece.SentencePieceProcessor(model_file=str(path)).encode


def tiktoken_ids(path: Path) -> Callable[[str], list[int]]:
    return tiktoken.Encoding("llama3", pat_str=LLAMA3_SPLIT, mergeable_ranks=load_tiktoken_bpe(str(path)), special_tokens={}).encode


@pytest.mark.parametrize(
    ("name", "reference", "vocab_size", "ends"),
    [("mistral-v1", sentencepiece_ids, 32_000, (1, 2)), ("llama3", tiktoken_ids, 128_256, (128_000, 128_001))],
)
def test_tokenizer_model_becomes_a_tokenizer_json_with_equal_ids_and_comes_back(
    tmp_path: Path, name: str, reference: Any, vocab_size: int, ends: tuple[int, int]
) -> None:
    params = {"dim": 16, "n_layers": 1, "n_heads": 2, "multiple_of": 8}
    make_meta_folder(tmp_path / "meta", params, random_meta_state(params, vocab_size, seed=0, dtype=torch.bfloat16))
    shutil.copyfile(fetch_tokenizer(name) / "tokenizer.model", tmp_path / "meta/tokenizer.model")
    notes = change(tmp_path / "meta", tmp_path / "hf", "hf")
    assert not any("tokenizer" in note for note in notes)
    library, encode = Library.from_file(str(tmp_path / "hf/tokenizer.json")), reference(tmp_path / "meta/tokenizer.model")
    for text in TEXTS:
        assert library.encode(text, add_special_tokens=False).ids == encode(text), text
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["vocab_size"]) == (*ends, vocab_size)
    for back, like in (("like", tmp_path / "meta"), ("alone", None)):
        change(tmp_path / "hf", tmp_path / back, "meta", like_path=like)
        assert filecmp.cmp(tmp_path / back / "tokenizer.model", tmp_path / "meta/tokenizer.model", shallow=False)
    check_same_tensors(read_file(tmp_path / "like/consolidated.00.pth"), read_file(tmp_path / "meta/consolidated.00.pth"))
    assert json.loads((tmp_path / "like/params.json").read_text()) == params


def test_tokenizer_json_without_a_tokenizer_model_is_a_note_for_meta(tmp_path: Path, models: Callable[[str], Path]) -> None:
    notes = change(models("GQA, scaled, with tokenizer"), tmp_path / "meta", "meta")
    assert any("no tokenizer.model" in note for note in notes)
    assert not (tmp_path / "meta/tokenizer.model").exists()


# What is wrong


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a script's main in this process: exit code, output, error output."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))

    def run(name: str, *words: object) -> tuple[int, str, str]:
        module: ModuleType = importlib.import_module(name)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
        capsys.readouterr()
        code = module.main()
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sound folders, to be copied and damaged."""
    base = tmp_path_factory.mktemp("sound")
    state = make_hf(base / "hf", shards=3)
    make_meta(base / "meta", state, 4, 2, model_parallel=2)
    make_torchtitan_dcp(base / "titan", state, 4, 2)
    make_hf(base / "bin", as_bin=True)
    make_hf(base / "chat", shards=2, tokenizer=TOKENIZER)
    make_hf(base / "other", rope_parameters={"rope_theta": 5e5, "rope_type": "default"})
    make_hf(base / "tied", tied=True)
    return base


def copy(sound: Path, name: str) -> Callable[[], None]:
    return lambda: (shutil.copytree(sound / name, name), None)[1]


Case = tuple[str, Callable[[], object], str]


def nothing() -> None:
    """A case in which the folder is sound and the command is wrong."""


def _cut(path: str, count: int = 100) -> Callable[[], object]:
    return lambda: Path(path).write_bytes(Path(path).read_bytes()[:-count])


def _int_weight() -> None:
    held = torch.load("bin/pytorch_model.bin", weights_only=True)
    torch.save(held | {"model.norm.weight": torch.ones(32, dtype=torch.int8)}, "bin/pytorch_model.bin")


def _lone_file() -> None:
    make_single(Path("a.pt"), load_file("tied/model.safetensors"))


def _wide_heads() -> None:
    make_hf(Path("wide"), head_dim=16)


def _fill(folder: str) -> None:
    Path(folder).mkdir()
    Path(folder, "thesis.tex").write_text("mine")


CASES: dict[str, Case] = {
    **{name: ("hf", lambda damage=damage: damage(Path("hf")), "hf OUT --to dcp") for name, damage in DAMAGE.items()},
    **{f"Meta: {name}": ("meta", lambda damage=damage: damage(Path("meta")), "meta OUT --to hf") for name, damage in DAMAGE_META.items()},
    "Meta: no params": ("meta", lambda: Path("meta/params.json").unlink(), "meta OUT --to hf"),
    "a malicious .bin": ("bin", lambda: malicious_pickle(Path("bin/pytorch_model.bin")), "bin OUT --to hf"),
    "a malicious .pth": ("meta", lambda: malicious_pickle(Path("meta/consolidated.00.pth")), "meta OUT --to hf"),
    "a malicious DCP folder": ("titan", lambda: malicious_dcp(Path("titan")), "titan OUT --to hf --like hf"),
    "a .bin from before torch 1.6": ("bin", lambda: legacy_bin(Path("bin/pytorch_model.bin"), {"a": torch.ones(1)}), "bin OUT --to hf"),
    "a truncated .bin": ("bin", _cut("bin/pytorch_model.bin"), "bin OUT --to hf"),
    "a .bin with integers": ("bin", _int_weight, "bin OUT --to hf --max_shard_size 1GB"),
    "a truncated .distcp": ("titan", _cut("titan/__0_0.distcp", 5000), "titan OUT --to hf --like hf"),
    "a missing .distcp": ("titan", lambda: Path("titan/__0_0.distcp").unlink(), "titan OUT --to hf --like hf"),
    "a DCP folder that does not say what model it is": ("titan", nothing, "titan OUT --to hf"),
    "a torch file that does not say what model it is": (
        "tied",
        lambda: make_single(Path("a.pt"), load_file("tied/model.safetensors")),
        "a.pt OUT --to hf",
    ),
    "nothing there": ("hf", nothing, "hff OUT --to dcp"),
    "a folder without weights": ("hf", lambda: _fill("empty"), "empty OUT --to dcp"),
    "a GGUF file": ("hf", lambda: Path("model.gguf").touch(), "model.gguf OUT --to hf"),
    "an output folder that is not empty": ("hf", lambda: _fill("OUT"), "hf OUT --to dcp"),
    "output over the input": ("hf", nothing, "hf hf --to hf"),
    "an output file that exists": ("hf", lambda: Path("OUT.pt").touch(), "hf OUT.pt --to torch"),
    "an output folder where a file is": ("hf", lambda: Path("OUT").touch(), "hf OUT --to dcp"),
    "an output file for a form of folders": ("hf", nothing, "hf OUT.safetensors --to hf"),
    "an output folder without a name": ("hf", nothing, "hf . --to dcp"),
    "an output below a file": ("hf", lambda: Path("file").touch(), "hf file/OUT --to dcp"),
    "--like of another model": ("hf", nothing, "hf OUT --to dcp --like other"),
    "--like of a tied model": ("hf", nothing, "hf OUT --to hf --like tied"),
    "--like of nothing": ("hf", nothing, "hf OUT --to dcp --like nothing"),
    "--model_parallel for another form": ("hf", nothing, "hf OUT --to hf --model_parallel 2"),
    "--model_parallel that does not divide": ("hf", nothing, "hf OUT --to meta --model_parallel 4"),
    "--model_parallel below one": ("hf", nothing, "hf OUT --to meta --model_parallel -1"),
    "--max_shard_size for another form": ("hf", nothing, "hf OUT --to torch --max_shard_size 1GB"),
    "--max_shard_size that is no size": ("hf", nothing, "hf OUT --to hf --max_shard_size huge"),
    "--dcp_names for another form": ("hf", nothing, "hf OUT --to meta --dcp_names meta"),
    "--dtype of another form": ("hf", nothing, "hf OUT --to hf --dtype q8_0"),
    "a shape that params.json cannot express": ("hf", _wide_heads, "wide OUT --to meta"),
}


def everything_below(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:You are using a model of type")
def test_what_is_wrong_is_said_in_a_sentence_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: Callable[..., tuple[int, str, str]], sound: Path, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    folder, damage, words = CASES[name]
    copy(sound, folder)()
    for further in ("hf", "other", "tied"):
        if f"--like {further}" in words and not Path(further).exists():
            copy(sound, further)()
    damage()
    before = everything_below(tmp_path)
    code, output, errors = script("convert_checkpoint", *words.split())
    assert everything_below(tmp_path) == before
    (problem,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert (code, output) == (1 if "cannot be written" in problem else 2, "")
    assert "Traceback" not in errors
    check_golden(name, problem.removeprefix("error: ").replace(str(tmp_path), "."))


def check_golden(name: str, problem: str) -> None:
    golden = dict(block.split("\n", 1) for block in GOLDEN.read_text().removesuffix("\n").split("\n\n")) if GOLDEN.exists() else {}
    if os.environ.get("UPDATE_GOLDEN"):
        golden[f"# {name}"] = problem
        GOLDEN.write_text("\n\n".join(f"# {known}\n{golden[f'# {known}']}" for known in CASES if f"# {known}" in golden) + "\n")
    assert golden.get(f"# {name}") == problem


@pytest.mark.parametrize("kind", ["hf", "meta", "dcp", "torch", "gguf"])
def test_disk_with_too_little_room_is_refused_before_a_byte_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: Callable[..., tuple[int, str, str]], sound: Path, kind: str
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 10_000, 10_000))
    code, _, errors = script("convert_checkpoint", sound / "chat", tmp_path / "out", "--to", kind)
    assert code == 1
    assert f"error: {tmp_path / 'out'} needs 0 MiB, but 0 MiB are free there" in errors
    assert list(tmp_path.iterdir()) == []


FULL_DISK = """
import resource, sys
sys.path[:0] = [{root!r}, {root!r} + "/scripts"]
import convert_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
for kind in {kinds!r}:
    sys.argv = ["convert_checkpoint.py", {source!r}, {target!r} + kind, "--to", kind]
    print(kind, convert_checkpoint.main(), flush=True)
"""


def test_disk_that_fills_up_midway_is_an_error_and_leaves_nothing(tmp_path: Path, sound: Path) -> None:
    kinds = ["hf", "meta", "dcp", "torch", "gguf"]
    program = FULL_DISK.format(root=str(ROOT), kinds=kinds, source=str(sound / "chat"), target=f"{tmp_path}/out-")
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.splitlines() == [f"{kind} 1" for kind in kinds], done.stderr
    problems = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert all(f"out-{kind} cannot be written: " in problem and "File too large" in problem for kind, problem in zip(kinds, problems, strict=True))
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("is_there", [False, True])
def test_output_through_a_link_lies_where_the_link_points_to(tmp_path: Path, sound: Path, is_there: bool) -> None:
    real, link = tmp_path / "disk/real", tmp_path / "link"
    real.parent.mkdir()
    link.symlink_to(real)
    if is_there:
        real.mkdir()
    change(sound / "hf", link, "dcp")
    assert link.is_symlink()
    assert find_difference(open_checkpoint(sound / "hf"), open_checkpoint(link)) == ""
    assert ([path.name for path in real.parent.iterdir()], {path.name for path in tmp_path.iterdir()}) == (["real"], {"disk", "link"})


# Killed

KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from tunelib.formats.convert import convert, plan_conversion

def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

for kind, moment in {moments!r}:
    pid = os.fork()
    if pid == 0:
        conversion = plan_conversion(Path({source!r}), Path({target!r}, f"{{kind}}-{{moment}}"), kind)
        counts = []
        def wrote(count):
            counts.append(count)
            if len(counts) == {{"begin": 1, "middle": 10}}.get(moment):
                kill()
        if moment == "rename":
            os.rename = kill
        convert(conversion, wrote)
        os._exit(0)
    print(kind, moment, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
MOMENTS = [("hf", "begin"), *((kind, moment) for kind in ("hf", "meta", "dcp", "torch", "gguf") for moment in ("middle", "rename"))]


def test_killed_conversion_leaves_nothing_that_looks_finished_and_the_same_command_then_works(tmp_path: Path, sound: Path) -> None:
    program = KILLED.format(root=str(ROOT), moments=MOMENTS, source=str(sound / "chat"), target=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.splitlines() == [f"{kind} {moment} {-signal.SIGKILL}" for kind, moment in MOMENTS], done.stderr
    names = [f"{kind}-{moment}" for kind, moment in MOMENTS]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f".{name}{ending}" for name in names for ending in (files.STAGING, files.LOCK))
    for (kind, _), name in zip(MOMENTS, names, strict=True):
        change(sound / "chat", tmp_path / name, kind)
        if kind != "gguf":
            assert find_difference(open_checkpoint(sound / "chat"), open_checkpoint(tmp_path / name)) == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


# The scripts


def test_scripts_convert_and_verify_from_the_command_line(tmp_path: Path, sound: Path) -> None:
    done = run_script("convert_checkpoint.py", sound / "hf", tmp_path / "meta", "--to", "meta", "--model_parallel", "2")
    assert (done.returncode, done.stdout) == (0, f"Hugging Face folder {sound / 'hf'} is now {tmp_path / 'meta'}\n"), done.stderr
    assert "note: params.json has no key for max_position_embeddings: it is 256 here" in done.stderr
    assert "100%" not in done.stderr  # a bar is for people at a terminal
    command = [sys.executable, str(ROOT / "scripts/convert_checkpoint.py"), str(sound / "hf"), str(tmp_path / "seen"), "--to", "dcp"]
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    with subprocess.Popen(command, stdout=follower, stderr=follower) as shown:
        assert shown.wait(timeout=120) == 0
    assert b"100%" in os.read(leader, 1 << 16)
    for descriptor in (leader, follower):
        os.close(descriptor)
    done = run_script("convert_llama_to_dcp.py", tmp_path / "meta", tmp_path / "dcp")
    assert (done.returncode, done.stdout) == (0, f"Meta folder {tmp_path / 'meta'} is now {tmp_path / 'dcp'}\n"), done.stderr
    done = run_script("verify_checkpoint.py", sound / "hf", tmp_path / "dcp")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"Hugging Face folder {sound / 'hf'}: 21 weights; whole (there are no checksums to hold its bytes against)",
        f"DCP folder {tmp_path / 'dcp'}: 21 weights; whole",
        "the same weights, bit for bit",
    ]


def with_value(folder: Path, name: str, value: float) -> None:
    path = next(path for path in sorted(folder.glob("*.safetensors")) if name in load_file(path))
    tensors = load_file(path)
    tensors[name].view(-1)[5] = value
    save_file(tensors, path, metadata={"format": "pt"})


def test_verify_names_what_is_wrong_and_says_so_by_its_exit_code(tmp_path: Path, sound: Path, script: Callable[..., tuple[int, str, str]]) -> None:
    name, good = "model.layers.1.mlp.up_proj.weight", sound / "hf"
    assert script("verify_checkpoint", good)[:2] == (
        0,
        f"Hugging Face folder {good}: 21 weights; whole (there are no checksums to hold its bytes against)\n",
    )
    shutil.copytree(good, tmp_path / "nan")
    with_value(tmp_path / "nan", name, float("nan"))
    code, output, _ = script("verify_checkpoint", tmp_path / "nan")
    assert (code, output.splitlines()[1:]) == (1, [f"  {tmp_path / 'nan'}: {name}: 1 of 2816 numbers are not finite"])
    shutil.copytree(good, tmp_path / "moved")
    with_value(tmp_path / "moved", name, 7.0)
    code, output, _ = script("verify_checkpoint", good, tmp_path / "moved")
    assert code == 1
    assert output.splitlines()[-1].startswith(f"NOT the same weights: {name} differs, first at [0, 5], near there by up to ")
    change(good, tmp_path / "half", "dcp", dtype="bfloat16")
    code, output, _ = script("verify_checkpoint", good, tmp_path / "half")
    assert code == 1
    assert output.splitlines()[-1].endswith("every value is the same once rounded")


def test_verify_names_files_that_are_not_what_the_manifest_says(tmp_path: Path, sound: Path, script: Callable[..., tuple[int, str, str]]) -> None:
    change(sound / "hf", tmp_path / "dcp", "dcp")
    path = tmp_path / "dcp/config.json"
    path.write_text(path.read_text() + " ")
    code, output, _ = script("verify_checkpoint", tmp_path / "dcp")
    assert code == 1
    assert output.splitlines()[0].endswith("NOT whole")
    assert any(str(path) in line and "bytes instead of" in line for line in output.splitlines()[1:])


@pytest.mark.parametrize("words", ["nothing", "hf nothing", "titan", "titan hf", "titan --like nothing"])
def test_verify_of_what_cannot_be_read_is_its_third_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sound: Path, script: Callable[..., tuple[int, str, str]], words: str
) -> None:
    monkeypatch.chdir(sound)
    code, _, errors = script("verify_checkpoint", *words.split())
    assert code == 2
    assert errors.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in errors


def test_verify_takes_the_model_from_another_checkpoint(sound: Path, script: Callable[..., tuple[int, str, str]]) -> None:
    code, output, _ = script("verify_checkpoint", sound / "hf", sound / "titan", "--like", sound / "hf")
    assert (code, output.splitlines()[-1]) == (0, "the same weights, bit for bit")
