"""Files that somebody wrote to harm: nothing in them is run, nothing outside their folder is touched, and refusing takes little time and memory."""

import contextlib
import copy
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hub_server
import pytest
import torch
from conftest import ROOT, TOKENIZER, write_chats, write_toml
from foreign import hf_to_meta, legacy_bin, make_hf
from hub_server import hub_environment, serve_hub
from safetensors import safe_open
from safetensors.torch import save_file

from scripts.convert_checkpoint import run as convert
from tunelib import files
from tunelib.checkpoint.dcp_reader import load_tensors
from tunelib.checkpoint.dcp_writer import save_tensors
from tunelib.checkpoint.state import read_run_state
from tunelib.config import load_config
from tunelib.config.schema import Columns, Model
from tunelib.data.chat import ChatTemplate
from tunelib.data.encode import Encoder, Reading
from tunelib.data.sources import parse_row
from tunelib.data.tokenizer import Tokenizer
from tunelib.errors import TunelibError
from tunelib.formats.load import check_weights, find_weights
from tunelib.formats.peft import open_adapter
from tunelib.formats.safetensors_file import read_safetensors
from tunelib.formats.source import open_checkpoint
from tunelib.formats.torch_file import read_torch_file

pytestmark = [pytest.mark.crash, pytest.mark.timeout(120)]

SECONDS, GIB = 20, 3
DEEP = "[" * 100_000
MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
Tensors = dict[str, torch.Tensor]


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """So much memory and time is allowed; more memory is a MemoryError, which our message would not name."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if sys.platform == "linux" else soft
    resource.setrlimit(resource.RLIMIT_AS, (size + GIB * 2**30 if sys.platform == "linux" else soft, hard))
    begun = time.monotonic()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert time.monotonic() - begun < SECONDS


def refusal(act: Callable[[], Any]) -> str:
    """Our own message for what is refused; any other error fails the test."""
    with bounded(), pytest.raises(TunelibError) as caught:
        act()
    assert "MemoryError" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder between others that must stay as they are."""
    folder, precious = tmp_path / "here", tmp_path / "precious"
    folder.mkdir()
    precious.mkdir()
    (precious / "file").write_text("precious")
    monkeypatch.chdir(folder)
    yield folder
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "precious"]
    assert [path.name for path in precious.iterdir()] == ["file"]
    assert (precious / "file").read_text() == "precious"
    assert not list(tmp_path.rglob("MARK"))


class Program:
    """Unpickled carelessly, it makes a folder."""

    def __reduce__(self) -> Any:
        return os.mkdir, (os.path.abspath("MARK"),)


def loads(path: Path) -> None:
    """What a start of train.py does with checkpoint.initial_load_path."""
    check_weights(find_weights(Model(), str(path), 96, 128))


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def repack(path: Path, edit: Callable[[bytes], bytes] = bytes, compression: int = zipfile.ZIP_STORED) -> None:
    """Write a file of torch.save once more with another data.pkl, or compressed."""
    with zipfile.ZipFile(path) as archive:
        records = [(record.filename, archive.read(record)) for record in archive.infolist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records:
            archive.writestr(name, edit(content) if name.endswith("data.pkl") else content)


# Pickles


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "weights.pth", "consolidated.00.pth"])
def test_program_in_a_file_of_weights_is_not_run(here: Path, capsys: pytest.CaptureFixture[str], name: str, legacy: bool) -> None:
    state = make_hf(here / "hf")
    (here / "hf/model.safetensors").unlink()
    held: Any = {**(hf_to_meta(state, 4, 2, 8) if name.startswith("consolidated") else state), "more": Program()}
    legacy_bin(here / "hf" / name, held) if legacy else torch.save(held, here / "hf" / name)
    assert name in refusal(lambda: loads(here / "hf"))
    assert convert(here / "hf", here / "out", "hf") == 2
    assert name in capsys.readouterr().err
    assert not (here / "out").exists()


def test_program_in_an_adapter_is_not_run(here: Path) -> None:
    (here / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    torch.save({"a": torch.zeros(2), "b": Program()}, here / "adapter_model.bin")
    assert "adapter_model.bin" in refusal(lambda: open_adapter(here))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_program_in_a_value_of_dcp_that_is_no_tensor_is_not_run(here: Path) -> None:
    torch.distributed.checkpoint.save({"a": torch.zeros(2), "b": Program()}, checkpoint_id=here / "dcp", no_dist=True)
    metadata = pickle.loads((here / "dcp/.metadata").read_bytes())
    assert "b" in metadata.state_dict_metadata
    refusal(lambda: load_tensors({"b": torch.zeros(2)}, here / "dcp"))
    refusal(lambda: loads(here / "dcp"))


METADATA = {
    "program": pickle.dumps(Program()),
    "place in the memo": b"\x80\x04Nr\xff\xff\xff\x3f.",
    "old place in the memo": b"Np1000000000\n.",
    "long text": b"\x80\x05\x8e" + b"\xff" * 7 + b"\x7f.",
    "depth": b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b".",
    "digits": b"L" + b"9" * 5000 + b"L\n.",
    "persistent id": b"Px\n.",
}


@pytest.mark.parametrize("what", METADATA)
def test_metadata_of_dcp_that_harms_is_refused(here: Path, what: str) -> None:
    save_tensors({"a": torch.zeros(2, 3)}, here / "dcp")
    (here / "dcp/.metadata").write_bytes(METADATA[what])
    assert ".metadata" in refusal(lambda: open_checkpoint(here / "dcp"))
    assert ".metadata" in refusal(lambda: load_tensors({"a": torch.zeros(2, 3)}, here / "dcp"))


PLACES = {
    "parent": {"relative_path": "../precious/file"},
    "absolute": {"relative_path": "/etc/passwd"},
    "nul": {"relative_path": "a\0"},
    "half of a character": {"relative_path": "\ud800"},
    "number": {"relative_path": 5},
    "too long": {"relative_path": "a" * 5000},
    "far": {"offset": 2**70},
    "before": {"offset": -5},
}


@pytest.mark.parametrize("what", PLACES)
def test_place_outside_of_a_dcp_folder_is_refused(here: Path, what: str) -> None:
    save_tensors({"a": torch.zeros(2, 3)}, here / "dcp")
    metadata = pickle.loads((here / "dcp/.metadata").read_bytes())
    for place in metadata.storage_data.values():
        for name, value in PLACES[what].items():
            object.__setattr__(place, name, value)
    (here / "dcp/.metadata").write_bytes(pickle.dumps(metadata))
    assert str(here / "dcp") in refusal(lambda: open_checkpoint(here / "dcp"))
    assert str(here / "dcp") in refusal(lambda: load_tensors({"a": torch.zeros(2, 3)}, here / "dcp"))


def test_tensor_of_dcp_that_lies_nowhere_is_not_left_as_it_was(here: Path) -> None:
    save_tensors({"a": torch.zeros(2, 3)}, here / "dcp")
    metadata = pickle.loads((here / "dcp/.metadata").read_bytes())
    metadata.state_dict_metadata["a"].chunks = []
    (here / "dcp/.metadata").write_bytes(pickle.dumps(metadata))
    assert "all of a lies" in refusal(lambda: load_tensors({"a": torch.zeros(2, 3)}, here / "dcp"))


# Bombs


def _hold_itself(held: dict[str, Any]) -> dict[str, Any]:
    held["self"] = held
    return held


def _laugh(held: dict[str, Any]) -> dict[str, Any]:
    inner: dict[str, Any] = {}
    for _ in range(60):
        inner = {"a": inner, "b": inner}
    return held | {"more": inner}


BOMBS: dict[str, tuple[Callable[[dict[str, Any]], Any], Callable[[Path], Any]]] = {
    "compressed": (lambda held: {"w": torch.zeros(1 << 24)}, lambda path: repack(path, compression=zipfile.ZIP_DEFLATED)),
    "a storage larger than its record": (dict, lambda path: repack(path, lambda content: content.replace(b"KM", b"J\xff\xff\xff\x7f"))),
    "a tensor larger than its storage": (lambda held: {"w": torch.zeros(1).expand(10**12)}, lambda path: None),
    "a record larger than the file": (dict, lambda path: _declare(path, 0xFFFFFFF0)),
}


def _declare(path: Path, size: int) -> None:
    """Have the archive's list say that its first record has so many bytes."""
    content = bytearray(path.read_bytes())
    place = content.index(b"PK\x01\x02") + 20
    content[place : place + 8] = size.to_bytes(4, "little") * 2
    path.write_bytes(content)


@pytest.mark.parametrize("what", BOMBS)
def test_bomb_is_refused_by_what_it_says(here: Path, what: str) -> None:
    make, harm = BOMBS[what]
    torch.save(make({"w": torch.zeros(77)}), here / "x.pt")
    harm(here / "x.pt")
    assert "x.pt" in refusal(lambda: read_torch_file(here / "x.pt"))


@pytest.mark.parametrize("make", [_hold_itself, _laugh])
def test_mappings_within_mappings_without_end_are_passed_over(here: Path, make: Callable[[dict[str, Any]], Any]) -> None:
    torch.save(make({"w": torch.zeros(77)}), here / "x.pt")
    with bounded():
        assert [*read_torch_file(here / "x.pt")] == ["w"]


def test_compressed_tensor_of_dcp_is_refused(here: Path) -> None:
    save_tensors({"a": torch.zeros(1 << 20)}, here / "dcp")
    (path,) = (here / "dcp").glob("*.distcp")
    repack(path, compression=zipfile.ZIP_DEFLATED)
    metadata = pickle.loads((here / "dcp/.metadata").read_bytes())
    for place in metadata.storage_data.values():
        object.__setattr__(place, "length", path.stat().st_size)
    (here / "dcp/.metadata").write_bytes(pickle.dumps(metadata))
    assert f"{path} holds a compressed tensor" in refusal(lambda: load_tensors({"a": torch.zeros(1 << 20)}, here / "dcp"))


def test_gguf_file_is_refused_by_its_name(here: Path) -> None:
    (here / "x.gguf").write_bytes(b"GGUF" + (3).to_bytes(4, "little") + b"\xff" * 64)
    assert "x.gguf" in refusal(lambda: loads(here / "x.gguf"))


@pytest.mark.parametrize("name", ["num_hidden_layers", "hidden_size", "vocab_size", "intermediate_size", "head_dim", "num_attention_heads"])
@pytest.mark.parametrize("size", [10**9, 2**62, 2**70])
def test_config_of_a_model_that_nobody_has_is_refused(here: Path, name: str, size: int) -> None:
    make_hf(here / "hf")
    change(here / "hf/config.json", **{name: size})
    assert str(here / "hf") in refusal(lambda: loads(here / "hf"))


@pytest.mark.parametrize("size", [2**62, 10**400])
def test_params_of_a_model_that_nobody_has_are_refused(here: Path, size: int) -> None:
    state = make_hf(here / "hf")
    torch.save(hf_to_meta(state, 4, 2, 8), here / "consolidated.00.pth")
    (here / "params.json").write_text(json.dumps({"dim": 32, "multiple_of": 8, "n_heads": 4, "n_kv_heads": 2, "n_layers": size, "norm_eps": 1e-5}))
    assert "params.json" in refusal(lambda: loads(here))


# Names and links


NAMES = ["../outside", "/etc/passwd", "a/../../b", "nul\0", "\ud800", "a" * 5000]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("as_bin", [False, True])
def test_name_in_an_index_does_not_leave_the_folder(here: Path, name: str, as_bin: bool) -> None:
    make_hf(here / "hf", shards=2, as_bin=as_bin)
    (path,) = (here / "hf").glob("*.index.json")
    weight_map = json.loads(path.read_text())["weight_map"]
    change(path, weight_map=weight_map | {next(iter(weight_map)): name + (".bin" if as_bin else ".safetensors")})
    assert str(here / "hf") in refusal(lambda: loads(here / "hf"))


@pytest.mark.parametrize("name", NAMES[:-1])
def test_name_in_a_manifest_does_not_leave_the_folder(here: Path, name: str) -> None:
    (here / "manifest.json").write_text(json.dumps({"format": 1, "files": {name: {"size": 8, "crc32": 1}}}))
    assert "lies outside the folder" in refusal(lambda: files.read_manifest(here))


def test_linked_shards_are_read_and_never_written(here: Path) -> None:
    """The Hub's cache keeps files apart and links to them."""
    make_hf(here / "hf", shards=2)
    (here / "blobs").mkdir()
    for path in (here / "hf").glob("*.safetensors"):
        path.rename(here / "blobs" / path.name)
        path.symlink_to(here / "blobs" / path.name)
    before = {path.name: path.read_bytes() for path in (here / "blobs").iterdir()}
    assert convert(here / "hf", here / "out", "hf") == 0
    assert {path.name: path.read_bytes() for path in (here / "blobs").iterdir()} == before
    assert not any(path.is_symlink() for path in (here / "out").rglob("*"))


@pytest.mark.parametrize("name", ["step-3", ".step-3.tunelib-removed", ".step-3.tunelib-staging", "export"])
@pytest.mark.parametrize("target", ["../precious", "../nothing", "../precious/file"])
def test_removing_takes_a_link_away_and_nothing_behind_it(here: Path, name: str, target: str) -> None:
    (here / name).symlink_to(target)
    if name == ".step-3.tunelib-removed":
        (here / "step-3").mkdir()
        files.remove_folder(here / "step-3")
    else:
        files.remove_folder(here / name)
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("ending", [".tunelib-staging", ".tunelib-removed", ".tunelib-old"])
@pytest.mark.parametrize("target", ["../precious", "../precious/file"])
def test_debris_that_is_a_link_goes_alone(here: Path, ending: str, target: str) -> None:
    (here / "step-3").mkdir()
    (here / f".step-3{ending}").symlink_to(target)
    files.remove_debris(here)
    assert not [path for path in here.iterdir() if path.is_symlink() and path.is_dir()]


def test_commit_over_links_writes_nothing_behind_them(here: Path) -> None:
    (here / ".export.tunelib-staging").symlink_to("../precious")
    (here / "export").symlink_to("../precious")
    staging = files.make_staging(here / "export")
    assert not staging.is_symlink()
    (staging / "a").write_text("a")
    refusal(lambda: files.commit_folder(staging, here / "export", files.describe_files(staging, ["a"]), kind="export"))
    (here / "export").unlink()
    (here / "real").mkdir()
    (here / "export").symlink_to("real")
    files.commit_folder(staging, here / "export", files.describe_files(staging, ["a"]), kind="export")
    assert (here / "export/a").read_text() == "a"
    assert list((here / "real").iterdir()) == []


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/dev/zero", path), os.mkdir])
def test_manifest_without_end_is_not_read(here: Path, make: Callable[[Path], Any]) -> None:
    make(here / "manifest.json")
    assert files.has_manifest(here)
    assert "manifest.json cannot be read" in refusal(lambda: files.read_manifest(here))


# JSON, TOML, safetensors


JSON_READERS: dict[str, Callable[[Path], Any]] = {
    "config.json": loads,
    "manifest.json": loads,
    "model.safetensors.index.json": loads,
    "state.json": read_run_state,
    "adapter_config.json": open_adapter,
    "tokenizer.json": Tokenizer,
    "tokenizer_config.json": Tokenizer,
    "special_tokens_map.json": Tokenizer,
    "generation_config.json": Tokenizer,
}


@pytest.mark.parametrize("content", [DEEP, '{"a":' * 100_000, '{"a": ' + "9" * 5000 + "}", "\udcff"], ids=["lists", "objects", "digits", "bytes"])
@pytest.mark.parametrize("name", JSON_READERS)
def test_json_that_cannot_be_read_is_named(here: Path, name: str, content: str) -> None:
    make_hf(here / "hf")
    shutil.copytree(TOKENIZER, here / "hf", dirs_exist_ok=True)
    (here / "hf" / name).write_bytes(content.encode(errors="surrogateescape"))
    assert name in refusal(lambda: JSON_READERS[name](here / "hf"))


TOML = {
    "lists": "a = " + "[" * 10_000 + "]" * 10_000,
    "tables": "a = " + "{a = " * 10_000 + "1" + "}" * 10_000,
    "key": ".".join(["a"] * 20_000) + " = 1",
    "header": "[" + ".".join(["a"] * 20_000) + "]",
    "digits": "training.steps = " + "9" * 5000,
    "hexadecimal digits": "training.steps = 0x" + "f" * 1_000_000,
    "names of Python's": "[training.__class__]\n__mro__ = 1\n[model]\n__class__ = 2\n__dict__.x = 1\n__init__ = 'x'",
    "a text": 'a = """' + "x" * 1_000_000,
    "not UTF-8": "base = '\udcff'",
    "a long base": "base = '" + "a" * 5000 + "'",
}


@pytest.mark.parametrize("what", TOML)
def test_toml_that_harms_is_refused(here: Path, what: str) -> None:
    (here / "x.toml").write_bytes(TOML[what].encode(errors="surrogateescape"))
    assert "x.toml" in refusal(lambda: load_config([str(here / "x.toml")]))


def entry(begin: int, end: int, *shape: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


HEADERS: dict[str, Any] = {
    "overlap": {"a": entry(0, 8, 2), "b": entry(4, 12, 2)},
    "beyond the file": {"a": entry(0, 800, 200)},
    "gap": {"a": entry(4, 12, 2)},
    "backwards": {"a": entry(8, 0, 2)},
    "negative shape": {"a": entry(0, 12, -3)},
    "negative place": {"a": entry(-12, 0, 3)},
    "too many numbers": {"a": entry(0, 0, 2**33, 2**33)},
    "depth": DEEP,
    "half of a character": '{"\\ud800": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}',
}


@pytest.mark.parametrize("what", HEADERS)
def test_header_of_safetensors_that_lies_is_refused(here: Path, what: str) -> None:
    header = HEADERS[what] if isinstance(HEADERS[what], str) else json.dumps(HEADERS[what])
    (here / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(12))
    assert "x.safetensors" in refusal(lambda: read_safetensors(here / "x.safetensors"))


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**9, 10**8, 3])
def test_length_of_a_header_is_not_believed(here: Path, length: int) -> None:
    (here / "x.safetensors").write_bytes(length.to_bytes(8, "little") + b"{}")
    assert "x.safetensors" in refusal(lambda: read_safetensors(here / "x.safetensors"))


def test_name_that_stands_twice_means_what_the_library_says(here: Path) -> None:
    path = here / "x.safetensors"
    header = b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0\x80\x3f\0\0\0\x40")
    with safe_open(path, framework="pt") as library:
        assert torch.equal(read_safetensors(path)["a"].read(), library.get_tensor("a"))


def test_tensor_without_numbers_takes_no_time(here: Path) -> None:
    (here / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    save_file({"base_model.model.x.weight": torch.zeros(2**60, 0)}, here / "adapter_model.safetensors")
    with bounded():
        assert open_adapter(here).tensors["x.weight"].shape == (2**60, 0)


@pytest.mark.parametrize("alpha", [10**400, [1]])
def test_alpha_that_is_no_number_is_refused(here: Path, alpha: Any) -> None:
    (here / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": alpha}))
    assert "adapter_config.json" in refusal(lambda: open_adapter(here))


# Tokenizers, templates, rows


def change_tokenizer(here: Path, edit: Callable[[dict[str, Any]], Any], settings: dict[str, Any] | None = None) -> Path:
    shutil.copytree(TOKENIZER, here / "tokenizer")
    content = json.loads((TOKENIZER / "tokenizer.json").read_text())
    edit(content)
    (here / "tokenizer/tokenizer.json").write_text(json.dumps(content))
    change(here / "tokenizer/tokenizer_config.json", **(settings or {}))
    return here / "tokenizer"


def use(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    tokenizer.encode("é", add_special_tokens=True)
    tokenizer.encode("</s>", add_special_tokens=False, special=())
    assert tokenizer.special_ids
    tokenizer.with_tokens(["<new>"]).files_to_write()


BROKEN_TOKENIZERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a panic of the library": lambda content: content.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAAAAAA"}),
    "a panic in use": lambda content: content.update(normalizer={"type": "Replace", "pattern": {"String": ""}, "content": "xxxxxxxx"}),
    "an error in use": lambda content: content.update(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}),
    "no tokens": lambda content: (content["model"].update(vocab={}, merges=[]), content.update(added_tokens=[])),
    "the largest id": lambda content: content["model"]["vocab"].update({"zz": 2**32 - 1}),
    "an id that is none": lambda content: content["model"]["vocab"].update({"zz": -1}),
    "a pattern": lambda content: content.update(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}),
}


@pytest.mark.parametrize("what", BROKEN_TOKENIZERS)
def test_tokenizer_that_its_library_cannot_use_is_refused(here: Path, what: str) -> None:
    folder = change_tokenizer(here, BROKEN_TOKENIZERS[what])
    assert str(folder) in refusal(lambda: use(folder))


@pytest.mark.parametrize(
    "settings",
    [
        {"eos_token": "\ud800"},
        {"added_tokens_decoder": 5},
        {"added_tokens_decoder": {"0": []}},
        {"chat_template": [{"name": ["a"], "template": "x"}]},
    ],
)
def test_settings_of_a_tokenizer_that_mean_nothing_are_refused(here: Path, settings: dict[str, Any]) -> None:
    folder = change_tokenizer(here, dict, settings)
    assert "tokenizer_config.json" in refusal(lambda: use(folder))


def test_code_beside_a_tokenizer_or_a_model_is_never_imported(here: Path) -> None:
    code = f"import os\nos.mkdir({str(here / 'MARK')!r})\n"
    classes = {"AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    folder = change_tokenizer(here, dict, {"auto_map": classes, "trust_remote_code": True, "tokenizer_class": "Evil"})
    (folder / "evil.py").write_text(code)
    use(folder)
    make_hf(here / "hf")
    (here / "hf/evil.py").write_text(code)
    change(here / "hf/config.json", auto_map=classes)
    assert "auto_map" in refusal(lambda: loads(here / "hf"))


@pytest.mark.parametrize("content", [b"", bytes(1000), b"\xff" * 100_000, b"\x0b" * 100_000, b"YQ== 0\n", b"YQ== " + b"9" * 5000 + b"\n"])
def test_garbage_is_no_tokenizer_model(here: Path, content: bytes) -> None:
    (here / "tokenizer.model").write_bytes(content)
    assert "tokenizer.model" in refusal(lambda: Tokenizer(here))


TEMPLATES = {
    "long range": ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
    "loops in loops": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "without an end"),
    "macros": ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}", "without an end"),
    "recursive loop": ("{% for i in [1, 1] recursive %}{{ loop([1, 1]) }}{% endfor %}", "recursion"),
    "product": ("{{ messages[0].content * 10**10 }}", "repeats something"),
    "constant product": ("{{ 'a' * 10**10 }}", "repeats something"),
    "product of a list": ("{% for i in [0] * 10**9 %}x{% endfor %}", "repeats something"),
    "power": ("{{ 9**(9**9) }}", "power of"),
    "much text": ("{{ lipsum(n=10**7) }}", "'lipsum' is undefined"),
    "classes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    "attribute by name": ("{{ (''|attr('__class__')).mro() }}", "unsafe"),
    "globals": ("{{ cycler.__init__.__globals__.os.mkdir('MARK') }}", "unsafe"),
    "our functions": ("{{ raise_exception.__globals__.json.codecs.open('MARK', 'w') }}", ""),
    "including a file": ("{% include '/etc/passwd' %}", "no loader"),
    "extending a file": ("{% extends '/etc/passwd' %}", "no loader"),
    "importing": ("{% import 'os' as os %}{{ os.mkdir('MARK') }}", "no loader"),
    "changing messages": ("{{ messages.append(1) }}", "unsafe"),
    "blocks in blocks": ("{% for a in [1] %}" * 30 + "{% endfor %}" * 30, "too many statically nested"),
    "brackets": ("{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}", "not valid Jinja"),
    "digits": ("{{ " + "1" * 5000 + " }}", "not valid Jinja"),
    "half of a character": ("{{ '\\ud800' }}{% for m in messages %}{{ m.content }}{% endfor %}", "surrogates"),
}


@pytest.mark.parametrize("what", TEMPLATES)
def test_template_that_harms_is_refused(what: str) -> None:
    source, said = TEMPLATES[what]
    tokenizer = Tokenizer(TOKENIZER)
    message = refusal(lambda: ChatTemplate(tokenizer, "t.jinja", source).encode(MESSAGES))
    assert message.startswith("t.jinja")
    assert said in message


def test_template_that_makes_long_numbers_of_marks_is_read_all_the_same() -> None:
    source = "{% for m in messages %}{{ m.content | replace('1', '1' * 5000) }}{% endfor %}"
    assert ChatTemplate(Tokenizer(TOKENIZER), "t.jinja", source).encode(MESSAGES).ids


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


ROWS = {
    "from": '{"messages": [{"role": "user", "from": [1], "content": "a", "train": 1}, {"role": "assistant", "content": "b"}]}',
    "not UTF-8": "\udcff",
    "half of a character": '{"messages": [{"role": "user", "content": "\\ud800"}]}',
    **{f"{depth} lists": '{"messages": ' + nested(depth) + "}" for depth in (970, 980, 990, 100_000)},
    **{
        f"{depth} lists in a call": '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": '
        + nested(depth)
        + "}]}"
        for depth in (700, 800, 900, 960, 100_000)
    },
    **{f"{depth} lists in tools": f'{{"messages": {json.dumps(MESSAGES)}, "tools": [{{"a": {nested(depth)}}}]}}' for depth in (700, 900, 100_000)},
}


@pytest.mark.parametrize("what", ROWS)
def test_row_that_harms_is_refused(what: str) -> None:
    tokenizer = Tokenizer(TOKENIZER)
    encoder = Encoder(Reading(tokenizer, ("chatml", CHATML), "chat", Columns(), "assistant", False, tokenizer.vocab_size))
    content = ROWS[what].encode(errors="surrogateescape")
    assert refusal(lambda: encoder.encode(parse_row(content, "x.jsonl:7"), "x.jsonl:7")).startswith("x.jsonl:7")


CHATML = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"


# Whole programs: downloads, and secrets

SECRET = "hf_secretXyZ0123456789"


def call(words: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=110)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    repositories = copy.deepcopy(hub_server.REPOSITORIES)
    repositories["someone/outside"] = dict.fromkeys(("config.json", "model.safetensors", "../outside.json", "a/../../b.json"), b"x")
    repositories["someone/program"] = {"README.md": b"#", "program.py": b"import os\nos.mkdir('MARK')\n"}
    monkeypatch.setattr(hub_server, "REPOSITORIES", repositories)
    with serve_hub() as endpoint:
        yield endpoint


def test_download_lands_where_it_was_asked_and_nowhere_else(hub: str, here: Path) -> None:
    words = [str(ROOT / "scripts/download.py"), "someone/outside", "--output_dir", "out"]
    environment = hub_environment(hub, here / "home")
    done = call([*words, "--include", "*"], environment)
    assert done.returncode == 2, done.stderr
    assert "someone/outside has '../outside.json', which would lie outside of out" in done.stderr
    assert not (here / "out").exists()
    assert call(words, environment).returncode == 0
    assert {path.name for path in (here / "out").iterdir()} == {".cache", "config.json", "model.safetensors"}


@pytest.mark.parametrize("token", [SECRET + " x", SECRET + "\tx", SECRET + "é"])
def test_token_that_no_header_holds_is_not_shown(hub: str, here: Path, token: str) -> None:
    environment = hub_environment(hub, here / "home")
    for more, words in (({"HF_TOKEN": token}, []), ({}, ["--hf_token", token])):
        done = call([str(ROOT / "scripts/download.py"), "someone/outside", "--output_dir", "out", *words], environment | more)
        assert done.returncode == 2, done.stderr
        assert "copy it again" in done.stderr
        assert SECRET not in done.stdout + done.stderr


@pytest.mark.parametrize("source", ["someone/chats", "someone/gated", "someone/program"])
def test_secrets_are_nowhere_in_a_run(hub: str, here: Path, source: str) -> None:
    """Neither in what it prints nor in what it writes, with a data set that is fetched and with those that cannot be."""
    toml = write_toml(here / "x.toml", write_chats(here / "chat.jsonl", 4))
    toml.write_text(toml.read_text().replace(f'path = "{here / "chat.jsonl"}"', f'hub = "{source}"'))
    secrets = dict.fromkeys(("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"), SECRET)
    environment = hub_environment(hub, here / "home", XDG_CACHE_HOME=str(here / "cache"), **secrets)
    run = ["--training.steps", "2", "--training.global_batch_size", "2", "--checkpoint.enable_checkpoint"]
    done = call([str(ROOT / "train.py"), str(toml), "--job.dump_folder", "run", *run], environment)
    assert done.returncode == (0 if source == "someone/chats" else 2), done.stderr
    assert "Traceback" not in done.stderr
    assert any(SECRET in headers.get("authorization", "") for _, headers in hub_server.Hub.headers_of)  # it was in use
    assert SECRET not in done.stdout + done.stderr
    written = [path for path in here.rglob("*") if path.is_file()]
    assert (here / "run/checkpoint/step-2/config.toml" in written) == (source == "someone/chats")
    assert not [path for path in written if SECRET.encode() in path.read_bytes()]
