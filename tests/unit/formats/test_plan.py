"""A plan holds every element of every weight once, or is refused before a byte is written."""

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import make_meta
from hypothesis import given
from hypothesis import strategies as st
from unit.samples import tiny_config, tiny_model

from tunelib.checkpoint.state import model_tensors
from tunelib.errors import FormatError
from tunelib.formats.plan import Wish, check_form, form_like, index_name, index_of, parse_size, plan_form
from tunelib.formats.source import Entry, Form, expected_shapes, open_checkpoint
from tunelib.formats.tensors import TensorInfo
from tunelib.model.config import ModelConfig

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


def weights_of(config: ModelConfig, dtype: torch.dtype = torch.float32) -> dict[str, TensorInfo]:
    return {name: TensorInfo(name, dtype, tuple(shape)) for name, shape in expected_shapes(config).items()}


CONFIG = tiny_config(intermediate_size=88)
WEIGHTS = weights_of(CONFIG)
TIED = tiny_config(intermediate_size=88, tie_word_embeddings=True)


def bytes_by_file(form: Form) -> list[int]:
    return [sum(entry.info.nbytes for entry in entries) for entries in form.files.values()]


# Laying out


@pytest.mark.parametrize("kind", ["hf", "dcp"])
@pytest.mark.parametrize("most", [1, 9_000, 20_000])
def test_no_file_is_larger_than_asked_unless_one_tensor_is(kind: str, most: int) -> None:
    form = plan_form(Wish(kind, max_shard_bytes=most), WEIGHTS, CONFIG)
    check_form(form, WEIGHTS, CONFIG, "the target")
    assert [entry.info.name for entries in form.files.values() for entry in entries] == list(WEIGHTS)
    assert all(size <= most or len(entries) == 1 for size, entries in zip(bytes_by_file(form), form.files.values(), strict=True))
    assert all(size + entries[0].info.nbytes > most for size, entries in zip(bytes_by_file(form), list(form.files.values())[1:], strict=False))


def test_files_and_index_are_named_as_transformers_names_them() -> None:
    form = plan_form(Wish("hf", max_shard_bytes=20_000), WEIGHTS, CONFIG)
    count = len(form.files)
    assert list(form.files) == [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    index = index_of(form)
    assert index is not None
    assert index["weight_map"] == {entry.info.name: file for file, entries in form.files.items() for entry in entries}
    assert index["metadata"]["total_size"] == sum(info.nbytes for info in WEIGHTS.values())
    assert index_name(form) == "model.safetensors.index.json"
    single = plan_form(Wish("hf"), WEIGHTS, CONFIG)
    assert (list(single.files), index_of(single)) == (["model.safetensors"], None)


@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("wish", [Wish("meta"), Wish("meta", model_parallel=2), Wish("dcp", meta_names=True)])
def test_metas_names_always_have_a_head(config: ModelConfig, wish: Wish) -> None:
    form = plan_form(wish, weights_of(config), config)
    check_form(form, weights_of(config), config, "the target")
    for entries in form.files.values():
        names = [entry.info.name for entry in entries]
        assert {"tok_embeddings.weight", "output.weight", "norm.weight"} <= set(names)
        assert {entry.source: entry.head_dim for entry in entries if entry.head_dim} == {
            f"model.layers.{layer}.self_attn.{part}_proj.weight": 8 for layer in range(2) for part in "qk"
        }


@pytest.mark.parametrize(("rope_theta", "split"), [(10_000.0, "columns"), (500_000.0, "rows")])
@pytest.mark.parametrize("count", [1, 2])
def test_model_parallel_files_are_divided_as_meta_divides_them(tmp_path: Path, rope_theta: float, split: str, count: int) -> None:
    config = tiny_config(intermediate_size=88, rope_theta=rope_theta)
    tensors = model_tensors(tiny_model(torch.float32, intermediate_size=88, rope_theta=rope_theta))
    make_meta(tmp_path, tensors, 4, 2, model_parallel=count, embedding_split=split)
    form = plan_form(Wish("meta", model_parallel=count), weights_of(config), config)
    check_form(form, weights_of(config), config, "the target")
    for file, entries in form.files.items():
        reference = torch.load(tmp_path / file, weights_only=True)
        assert {entry.info.name: entry.info.shape for entry in entries} == {name: tuple(tensor.shape) for name, tensor in reference.items()}
    fields = json.loads((tmp_path / "params.json").read_text()) | {"rope_theta": rope_theta}
    (tmp_path / "params.json").write_text(json.dumps(fields))
    published = open_checkpoint(tmp_path).form  # the same parts of the same weights
    for file, entries in form.files.items():
        known = {entry.info.name: (entry.where, entry.source, entry.head_dim) for entry in published.files[file]}
        assert {entry.info.name: (entry.where, entry.source, entry.head_dim) for entry in entries} == known


@pytest.mark.parametrize(
    ("count", "words"), [(3, r"tok_embeddings\.weight has size 32 along dimension 1"), (4, r"wk\.weight has 2 heads"), (64, "divide by 64")]
)
def test_model_parallel_files_that_do_not_divide_are_refused(count: int, words: str) -> None:
    with pytest.raises(FormatError, match=rf"--model_parallel {count}: .*{words}"):
        plan_form(Wish("meta", model_parallel=count), WEIGHTS, CONFIG)


def test_weight_without_a_name_in_metas_form_is_refused() -> None:
    odd = WEIGHTS | {"model.layers.0.self_attn.q_norm.weight": TensorInfo("x", torch.float32, (8,))}
    with pytest.raises(FormatError, match=r"q_norm\.weight has no name in Meta's form"):
        plan_form(Wish("meta"), odd, CONFIG)


# Proof


def _without(form: Form, source: str) -> Form:
    return replace(form, files={file: [entry for entry in entries if entry.source != source] for file, entries in form.files.items()})


def _in_first(form: Form, *more: Entry) -> Form:
    first, *others = form.files
    return replace(form, files={first: [*form.files[first], *more], **{file: form.files[file] for file in others}})


def _rows(source: str, begin: int, end: int, name: str = "") -> Entry:
    columns = WEIGHTS[source].shape[1]
    return Entry(TensorInfo(name or source, torch.float32, (end - begin, columns)), source, (slice(begin, end), slice(0, columns)))


def _part_by_part(*parts: tuple[int, int]) -> Form:
    """Meta files that hold the head in these rows, and everything else in the first."""
    files = {f"consolidated.{number:02d}.pth": [_rows(HEAD, *part)] for number, part in enumerate(parts)}
    files["consolidated.00.pth"] += [Entry(info, name) for name, info in WEIGHTS.items() if name != HEAD]
    return Form("meta", files)


WHOLE = plan_form(Wish("hf"), WEIGHTS, CONFIG)
TWO_FILES = plan_form(Wish("hf", max_shard_bytes=30_000), WEIGHTS, CONFIG)


@pytest.mark.parametrize(
    ("form", "words"),
    [
        (_without(WHOLE, NORM), rf"{NORM} would be written with 0 of its 32 elements"),
        (_in_first(WHOLE, Entry(WEIGHTS[NORM], NORM)), rf"{NORM} would lie in model\.safetensors twice"),
        (_in_first(TWO_FILES, Entry(WEIGHTS[HEAD], HEAD)), rf"{HEAD} would lie in .* and .*"),
        (_part_by_part((0, 24)), rf"{HEAD} would be written with 768 of its 1536 elements"),
        (_part_by_part((0, 24), (0, 24)), rf"{HEAD} would be written with 768 of its 1536 elements"),
        (_part_by_part((0, 24), (16, 48)), rf"{HEAD} would be written"),
        (_part_by_part((0, 24), (12, 36)), rf"{HEAD} would be written"),
    ],
    ids=["lost", "twice in a file", "in two files", "half", "the same half twice", "too much", "overlapping, with a hole of the same size"],
)
def test_form_that_loses_or_doubles_a_part_is_refused(form: Form, words: str) -> None:
    with pytest.raises(FormatError, match=rf"the target: .*{words}"):
        check_form(form, WEIGHTS, CONFIG, "the target")


def test_form_that_holds_all_passes() -> None:
    for form in (WHOLE, TWO_FILES, _part_by_part((0, 24), (24, 48)), _part_by_part((0, 48))):
        check_form(form, WEIGHTS, CONFIG, "the target")


# Like another


def test_form_like_another_keeps_files_names_and_order_with_new_types() -> None:
    names = list(WEIGHTS)
    old = Form(
        "hf", {"b.safetensors": [Entry(WEIGHTS[n], n) for n in names[1::2]], "a.safetensors": [Entry(WEIGHTS[n], n) for n in names[::2]]}, index={}
    )
    new = form_like(old, weights_of(CONFIG, torch.bfloat16), CONFIG)
    assert {file: [entry.info.name for entry in entries] for file, entries in new.files.items()} == {
        "b.safetensors": names[1::2],
        "a.safetensors": names[::2],
    }
    assert {entry.info.dtype for entries in new.files.values() for entry in entries} == {torch.bfloat16}
    check_form(new, WEIGHTS, CONFIG, "the target")


def test_stored_copy_of_a_tied_head_is_the_embedding() -> None:
    weights = weights_of(TIED)
    old = Form("hf", {"model.safetensors": [*(Entry(info, name) for name, info in weights.items()), Entry(WEIGHTS[HEAD], HEAD)]})
    new = form_like(old, weights, TIED)
    check_form(new, weights, TIED, "the target")
    assert new.files["model.safetensors"][-1].info == WEIGHTS[HEAD]


def test_form_that_names_what_the_model_lacks_is_refused() -> None:
    fewer = tiny_config(intermediate_size=88, num_hidden_layers=1)
    with pytest.raises(FormatError, match=r"layers\.1\..* is not part of this model"):
        form_like(WHOLE, weights_of(fewer), fewer)


@pytest.mark.parametrize(("rows", "is_divided"), [(48, True), (64, True), (49, False)])
def test_grown_vocabulary_is_divided_as_the_old_one_was(rows: int, is_divided: bool) -> None:
    old = plan_form(Wish("meta", model_parallel=2), WEIGHTS, CONFIG)
    grown = tiny_config(intermediate_size=88, vocab_size=rows)
    if not is_divided:
        with pytest.raises(FormatError, match="with 49 rows cannot be divided as it was with 48"):
            form_like(old, weights_of(grown), grown)
        return
    new = form_like(old, weights_of(grown), grown)
    check_form(new, weights_of(grown), grown, "the target")
    shapes = [{entry.info.name: entry.info.shape for entry in entries} for entries in new.files.values()]
    assert [held["output.weight"] for held in shapes] == [(rows // 2, 32)] * 2
    assert [held["tok_embeddings.weight"] for held in shapes] == [(rows, 16)] * 2


@pytest.mark.parametrize("metadata", [None, [], "x", 3, {"total_size": 1, "made_by": "others"}])
def test_index_stays_as_it_came_but_for_the_size(metadata: Any) -> None:
    names = list(WEIGHTS)
    weight_map = dict.fromkeys(reversed(names), "one.safetensors")
    old = Form(
        "hf", {"one.safetensors": [Entry(info, name) for name, info in WEIGHTS.items()]}, index={"metadata": metadata, "weight_map": weight_map}
    )
    index = index_of(form_like(old, WEIGHTS, CONFIG))
    assert index is not None
    assert list(index["weight_map"].items()) == list(weight_map.items())
    others = {name: value for name, value in metadata.items() if name != "total_size"} if isinstance(metadata, dict) else {}
    assert index["metadata"] == others | {"total_size": sum(info.nbytes for info in WEIGHTS.values())}


# Sizes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5GB", 5 * 10**9),
        ("200mb", 2 * 10**8),
        ("1GiB", 2**30),
        ("500 MiB", 500 * 2**20),
        ("1.5K", 1500),
        ("7", 7),
        ("2TB", 2 * 10**12),
        ("3KiB", 3072),
    ],
)
def test_size_is_read_in_the_units_that_people_write(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "5 X", "five", "0", "0.0GB", "1e9", "5GBB", "5I", "5IB", "0.5"])
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(FormatError, match="is not a size; write one such as 5GB"):
        parse_size(text)


@given(st.text(max_size=8))
def test_any_text_is_a_size_or_refused(text: str) -> None:
    with contextlib.suppress(FormatError):
        assert parse_size(text) >= 1
