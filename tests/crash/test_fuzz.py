"""Any bytes, and files that are nearly right: every parser of a stranger's file either reads them or says in our words why not.

`parses` lets nothing else pass: no other error, and no file that was not there before. Times are hypothesis's deadlines.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TOKENIZER
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from tunelib.config import load_config
from tunelib.config.schema import Columns
from tunelib.data.chat import NAMED_TEMPLATES
from tunelib.data.encode import Encoder, Reading
from tunelib.data.json_rows import Row
from tunelib.data.readers import RawRow, read_file
from tunelib.data.shapes import detect_format
from tunelib.data.sources import parse_row
from tunelib.data.tokenizer import Tokenizer
from tunelib.errors import TunelibError
from tunelib.files import find_damage, has_manifest, read_manifest
from tunelib.formats.found import look_into
from tunelib.formats.safetensors_file import read_safetensors

pytestmark = [pytest.mark.crash, pytest.mark.timeout(120)]

DEADLINE_MILLISECONDS = 5000
fuzz = settings(derandomize=True, deadline=DEADLINE_MILLISECONDS, max_examples=150, database=None, suppress_health_check=list(HealthCheck))

TOML = b"""
base = "other.toml"
[model]
tokenizer_path = "TOKENIZER"
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
rope_scaling = {rope_type = "llama3", factor = 8.0, low_freq_factor = 1.0, high_freq_factor = 4.0, original_max_position_embeddings = 8192}
[dataset]
[[dataset.mix]]
path = 'a'
weight = 0.5
columns.text = "x"
[training]
steps = 0x10
seq_len = 1_024
[optimizer]
lr = 1e-3 # fast
""".replace(b"TOKENIZER", os.fsencode(TOKENIZER))
MANIFEST = {"format": 1, "kind": "full", "step": 3, "files": {"a": {"size": 4, "crc32": 5}, "deep/b": {"size": 0, "crc32": 0}}}
TENSORS = save({"a": torch.arange(6.0).reshape(2, 3), "b.c": torch.ones(2, dtype=torch.bfloat16)}, {"format": "pt"})
INDEX = {"metadata": {"total_size": 28}, "weight_map": {"a": "model-1.safetensors", "b.c": "model-1.safetensors"}}
ROWS: list[Row] = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "train": True, "tool_calls": [{"function": {}}]}]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 1}], "tools": "[{}]", "system": "s"},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "assistant", "content": "b"}]},
    {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
    {"prompt": "a", "completion": "b"},
    {"instruction": "a", "input": "b", "output": "c"},
    {"text": "a"},
    {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
]

odd_texts = st.one_of(
    st.text(st.characters(), max_size=12),
    st.sampled_from(["../x", "/etc/passwd", "a\0b", "\ud800", "__class__", "", ".", "a" * 300, "user"]),
)
odd_numbers = st.one_of(st.integers(), st.sampled_from([2**63, -(2**64), 10**30]), st.floats())
odd_leaves = st.one_of(st.none(), st.booleans(), odd_numbers, odd_texts)
odd_values: st.SearchStrategy[Any] = st.recursive(
    odd_leaves, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(odd_texts, inner, max_size=3)), max_leaves=6
)


@st.composite
def damaged(draw: st.DrawFn, valid: bytes) -> bytes:
    """Valid bytes with some cut out, put in or changed."""
    content = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        first = draw(st.integers(0, len(content)))
        last = draw(st.integers(first, min(first + 12, len(content))))
        content[first:last] = draw(st.one_of(st.binary(max_size=8), st.sampled_from([b"", b"[" * 2000, b'{"a":' * 2000, b"\xff", b'"', b"9" * 5000])))
    return bytes(content)


@st.composite
def altered(draw: st.DrawFn, valid: Any) -> Any:
    """Valid JSON in which some value, wherever it stands, is another, or a key more or less is there."""
    if isinstance(valid, dict) and valid and draw(st.integers(0, 5)):
        key = draw(st.sampled_from(sorted(valid)))
        kind = draw(st.integers(0, 5))
        if kind == 0:
            return {name: value for name, value in valid.items() if name != key}
        if kind == 1:
            return valid | {draw(odd_texts): draw(odd_values)}
        return valid | {key: draw(altered(valid[key]))}
    if isinstance(valid, list) and valid and draw(st.integers(0, 5)):
        place = draw(st.integers(0, len(valid) - 1))
        return [*valid[:place], draw(altered(valid[place])), *valid[place + 1 :]]
    return draw(odd_values)


def to_bytes(value: Any) -> bytes:
    return json.dumps(value).encode()


def mixed(valid: Any) -> st.SearchStrategy[bytes]:
    """Any bytes, JSON with other values, and JSON with other bytes."""
    return st.one_of(st.binary(max_size=200), damaged(to_bytes(valid)), altered(valid).map(to_bytes))


@pytest.fixture(scope="module", autouse=True)
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder; nothing appears beside it, nor in the checkout."""
    folder = tmp_path_factory.mktemp("fuzz") / "here"
    folder.mkdir()
    before = os.getcwd()
    held = {place: set(os.listdir(place)) for place in (folder.parent, Path(__file__).parents[2])}
    os.chdir(folder)
    yield folder
    os.chdir(before)
    assert {place: set(os.listdir(place)) for place in held} == held


def parses(folder: Path, contents: dict[str, bytes], parse: Callable[[Path], Any]) -> None:
    """Parse files in a fresh folder: success or our own error, and no other file afterwards."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    with contextlib.suppress(TunelibError):
        parse(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == contents


@settings(fuzz, max_examples=40)
@given(st.one_of(st.binary(max_size=200), st.text().map(lambda text: text.encode(errors="replace")), damaged(TOML)))
def test_any_toml_is_read_or_refused(content: bytes) -> None:
    contents = {"x.toml": content, "other.toml": b"training.steps = 3\n"}
    parses(Path("config"), contents, lambda folder: load_config([str(folder / "x.toml")]))


@st.composite
def toml_lines(draw: st.DrawFn) -> bytes:
    """Lines of TOML with known and unknown names, and values of every type."""
    names = st.sampled_from(["training", "steps", "dataset", "mix", "model", "__class__", "a", '"a.b"', "'\\'", "lr", "rope_scaling", '""'])
    values = st.sampled_from(
        [
            "1",
            "1e999",
            "-0",
            "0x" + "f" * 50,
            "inf",
            "nan",
            '"x"',
            "'''\n'''",
            "[1, [2]]",
            "{a = 1}",
            "[{}]",
            "true",
            "1979-05-27",
            "07:32:00",
            '"\\uD7FF"',
        ]
    )
    key = st.lists(names, min_size=1, max_size=3).map(".".join)
    line = st.one_of(
        st.builds("{} = {}".format, key, values), st.builds("[{}]".format, key), st.builds("[[{}]]".format, key), st.just("base = 'other.toml'")
    )
    return "\n".join(draw(st.lists(line, max_size=6))).encode()


@settings(fuzz, max_examples=40)
@given(toml_lines())
def test_any_lines_of_toml_are_read_or_refused(content: bytes) -> None:
    contents = {"x.toml": content, "other.toml": b"base = 'x.toml'\n"}
    parses(Path("config"), contents, lambda folder: load_config([str(folder / "x.toml")]))


def test_the_config_that_the_fuzz_begins_with_is_right(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_bytes(TOML)
    (tmp_path / "other.toml").write_text("training.steps = 3\n")
    assert load_config([str(tmp_path / "x.toml")]).config.training.steps == 16


@fuzz
@given(mixed(MANIFEST))
def test_any_manifest_is_read_or_refused(content: bytes) -> None:
    def parse(folder: Path) -> None:
        has_manifest(folder)
        listed = read_manifest(folder)["files"]
        find_damage(folder, listed, listed)

    parses(Path("manifest"), {"manifest.json": content}, parse)


@fuzz
@given(mixed(INDEX))
def test_any_index_is_read_or_refused(content: bytes) -> None:
    parses(Path("index"), {"model.safetensors.index.json": content, "model-1.safetensors": TENSORS}, look_into)


HEADER_BYTES = int.from_bytes(TENSORS[:8], "little")


def with_header(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + TENSORS[8 + HEADER_BYTES :]


@fuzz
@given(st.one_of(st.binary(max_size=64), damaged(TENSORS), mixed(json.loads(TENSORS[8 : 8 + HEADER_BYTES])).map(with_header)))
def test_any_safetensors_file_is_read_or_refused(content: bytes) -> None:
    def parse(folder: Path) -> None:
        for region in read_safetensors(folder / "x.safetensors").values():
            region.read()

    parses(Path("safetensors"), {"x.safetensors": content}, parse)


@cache
def encoder(format: str, has_template: bool) -> Encoder:
    tokenizer = Tokenizer(TOKENIZER)
    template = ("chatml", NAMED_TEMPLATES["chatml"]) if has_template else None
    return Encoder(Reading(tokenizer, template, format, Columns(), "assistant", False, tokenizer.vocab_size))


def encode(row: Row) -> None:
    format, _ = detect_format(row, Columns(), "x.jsonl:1")
    encoder(format, True).encode(row, "x.jsonl:1")
    if row.get("prompt") == "a":
        encoder(format, False).encode(row, "x.jsonl:1")


@fuzz
@given(st.sampled_from(ROWS).flatmap(mixed))
def test_any_row_is_read_or_refused(content: bytes) -> None:
    parses(Path("row"), {}, lambda folder: encode(parse_row(content, "x.jsonl:1")))


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.csv", "x.jsonl.gz", "x.jsonl.zst", "x.parquet", "x.txt"])
def test_any_data_file_is_read_or_refused(name: str) -> None:
    def parse(folder: Path) -> None:
        for row in read_file(folder / name, 0, frozenset(["messages"])):
            if isinstance(row, RawRow):
                encode(parse_row(row.content, name))

    @settings(fuzz, max_examples=60)
    @given(mixed(ROWS))
    def read(content: bytes) -> None:
        parses(Path("data"), {name: content}, parse)

    read()


@pytest.mark.parametrize("row", ROWS)
def test_the_rows_that_the_fuzz_begins_with_are_right(row: Row) -> None:
    encode(row)
