"""A Hugging Face folder counts for what its index says; it fits the model exactly; it leaves in the form it came in."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from unit.samples import TINY_FIELDS, tiny_model, write_tokenizer

import tunelib.formats.hf as hf
from tunelib.checkpoint.state import model_tensors
from tunelib.data.tokenizer import Tokenizer
from tunelib.errors import FormatError, SaveError
from tunelib.files import find_damage, read_manifest
from tunelib.formats.hf import INDEX_FILE, SINGLE_FILE, HfFolder, check_names, export_hf, open_hf_folder, read_config
from tunelib.formats.load import Weights, plan_export_of

TENSORS = {"a": torch.ones(2, 3), "b": torch.arange(4.0), "c": torch.zeros(5)}


def write_folder(folder: Path, shards: dict[str, dict[str, torch.Tensor]], index: Any = None, config: Any = TINY_FIELDS) -> Path:
    """A folder of the given files; several get an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
    if index is None and len(shards) > 1:
        index = {"metadata": {}, "weight_map": {name: file for file, tensors in shards.items() for name in tensors}}
    if index is not None:
        (folder / INDEX_FILE).write_text(index if isinstance(index, str) else json.dumps(index))
    return folder


def shapes_of(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def test_single_file_is_read_without_an_index(tmp_path: Path) -> None:
    source = open_hf_folder(write_folder(tmp_path, {SINGLE_FILE: TENSORS}))
    assert source.partition.keys() == {SINGLE_FILE}
    assert all(torch.equal(source.read(name), tensor) for name, tensor in TENSORS.items())
    assert torch.equal(source.read("b", (slice(1, 3),)), TENSORS["b"][1:3])


def test_index_decides_which_files_and_tensors_count(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, {"one.safetensors": {"a": TENSORS["a"]}, "two.safetensors": {"b": TENSORS["b"], "c": TENSORS["c"]}})
    for stray in (SINGLE_FILE, "adapter_model.safetensors", "three.safetensors"):
        save_file({name: tensor + 100 for name, tensor in TENSORS.items()}, folder / stray)
    save_file({"a": TENSORS["a"], "b": TENSORS["b"] + 100}, folder / "one.safetensors")  # a second copy where the index does not look
    source = open_hf_folder(folder)
    assert {file: [info.name for info in infos] for file, infos in source.partition.items()} == {
        "one.safetensors": ["a"],
        "two.safetensors": ["b", "c"],
    }
    assert all(torch.equal(source.read(name), tensor) for name, tensor in TENSORS.items())


def test_missing_shard_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, {"one.safetensors": {"a": TENSORS["a"]}, "two.safetensors": {"b": TENSORS["b"]}})
    (folder / "two.safetensors").unlink()
    with pytest.raises(FormatError, match=r"two\.safetensors does not exist"):
        open_hf_folder(folder)


def test_truncated_shard_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, {"one.safetensors": {"a": TENSORS["a"]}, "two.safetensors": {"b": TENSORS["b"]}})
    (folder / "two.safetensors").write_bytes((folder / "two.safetensors").read_bytes()[:-3])
    with pytest.raises(FormatError, match=r"two\.safetensors cannot be read"):
        open_hf_folder(folder)


def test_tensor_that_its_file_lacks_is_named(tmp_path: Path) -> None:
    folder = write_folder(
        tmp_path, {"one.safetensors": {"a": TENSORS["a"]}}, index={"weight_map": {"a": "one.safetensors", "lost": "one.safetensors"}}
    )
    with pytest.raises(FormatError, match=r"one\.safetensors lacks lost"):
        open_hf_folder(folder)


@pytest.mark.parametrize("file", ["../outside.safetensors", "/tmp/outside.safetensors", "deep/one.safetensors", "..", ".", "", "nul\0.safetensors"])
def test_index_that_leaves_the_folder_is_refused(tmp_path: Path, file: str) -> None:
    save_file({"a": TENSORS["a"]}, tmp_path / "outside.safetensors")
    folder = write_folder(tmp_path / "model", {SINGLE_FILE: TENSORS}, index={"weight_map": {"a": file}})
    with pytest.raises(FormatError):
        open_hf_folder(folder)


@pytest.mark.parametrize("index", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"weight_map": ["a"]}', "[" * 100_000])
def test_broken_index_is_named(tmp_path: Path, index: str) -> None:
    with pytest.raises(FormatError, match=r"index\.json"):
        open_hf_folder(write_folder(tmp_path, {SINGLE_FILE: TENSORS}, index=index))


@pytest.mark.parametrize("metadata", [None, [], "x", 3])
def test_odd_index_metadata_does_not_stop_the_export(tmp_path: Path, metadata: Any) -> None:
    tensors = model_tensors(tiny_model(torch.float32))
    weight_map = dict.fromkeys(tensors, "one.safetensors")
    write_folder(tmp_path / "in", {"one.safetensors": tensors}, index={"metadata": metadata, "weight_map": weight_map})
    export(tmp_path / "in", tmp_path / "out")
    assert json.loads((tmp_path / "out" / INDEX_FILE).read_text())["weight_map"] == weight_map


def test_empty_index_is_no_weights(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, {SINGLE_FILE: TENSORS}, index={"weight_map": {}})
    with pytest.raises(FormatError):
        check_names(open_hf_folder(folder), shapes_of(TENSORS), tied=False)


def test_folder_without_weights_or_config_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"config\.json does not exist"):
        open_hf_folder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FormatError, match="no weights"):
        open_hf_folder(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000], ids=["empty", "cut off", "list", "not UTF-8", "deep"])
def test_broken_config_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(FormatError, match=r"config\.json"):
        read_config(tmp_path)


def test_folder_that_fits_the_model_passes(tmp_path: Path) -> None:
    derived = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    check_names(open_hf_folder(write_folder(tmp_path, {SINGLE_FILE: TENSORS | derived})), shapes_of(TENSORS), tied=False)


def test_everything_that_does_not_fit_is_named_at_once(tmp_path: Path) -> None:
    source = open_hf_folder(write_folder(tmp_path, {SINGLE_FILE: {"a": TENSORS["a"], "b": TENSORS["a"].clone(), "extra": TENSORS["c"]}}))
    with pytest.raises(FormatError) as caught:
        check_names(source, shapes_of(TENSORS), tied=False)
    for problem in ("c is missing", "extra is not part of the model", "b has shape [2, 3] instead of [4]"):
        assert problem in str(caught.value)


def test_long_list_of_problems_is_cut_and_counted(tmp_path: Path) -> None:
    source = open_hf_folder(write_folder(tmp_path, {SINGLE_FILE: TENSORS}))
    with pytest.raises(FormatError, match=r"and 12 more"):
        check_names(source, shapes_of(TENSORS) | {f"w{number}": torch.Size((1,)) for number in range(20)}, tied=False)


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def open_tied(folder: Path, tensors: dict[str, torch.Tensor]) -> HfFolder:
    return open_hf_folder(write_folder(folder, {SINGLE_FILE: tensors}))


def test_tied_head_may_be_left_out_or_equal_but_not_differ(tmp_path: Path) -> None:
    weight = torch.randn(6, 2)
    expected = {EMBEDDING: weight.shape}
    check_names(open_tied(tmp_path / "left out", {EMBEDDING: weight}), expected, tied=True)
    check_names(open_tied(tmp_path / "equal", {EMBEDDING: weight, HEAD: weight.clone()}), expected, tied=True)
    for name, other in (("differs", weight + 1e-6), ("shape", torch.randn(5, 2))):
        with pytest.raises(FormatError, match=r"tie_word_embeddings.*lm_head\.weight differs"):
            check_names(open_tied(tmp_path / name, {EMBEDDING: weight, HEAD: other}), expected, tied=True)


def test_tied_head_of_another_type_is_compared_by_value(tmp_path: Path) -> None:
    weight = torch.randn(6, 2)
    with pytest.raises(FormatError, match=r"lm_head\.weight"):
        check_names(open_tied(tmp_path, {EMBEDDING: weight, HEAD: weight.bfloat16()}), {EMBEDDING: weight.shape}, tied=True)


def test_tied_folder_with_only_a_head_says_that_the_embedding_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=EMBEDDING):
        check_names(open_tied(tmp_path, {HEAD: torch.randn(6, 2)}), {EMBEDDING: torch.Size((6, 2))}, tied=True)


def test_untied_model_without_a_head_is_refused(tmp_path: Path) -> None:
    weight = torch.randn(6, 2)
    with pytest.raises(FormatError, match=r"lm_head\.weight is missing"):
        check_names(open_tied(tmp_path, {EMBEDDING: weight}), {EMBEDDING: weight.shape, HEAD: weight.shape}, tied=False)


# Export


def save_reference(folder: Path, shard_size: str = "5GB", dtype: torch.dtype = torch.float32, **changes: Any) -> LlamaForCausalLM:
    """A folder that transformers wrote."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(TINY_FIELDS | changes))).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard_size)
    write_tokenizer(folder, ["<s>", "</s>"], "{{ messages[0]['content'] }}", bos_token="<s>", eos_token="</s>")
    return model


def export(
    source: Path | None,
    target: Path,
    dtype: torch.dtype | None = None,
    tokenizer_folder: Path | None = None,
    chat_template: str | None = None,
    stop_ids: frozenset[int] = frozenset(),
    **changes: Any,
) -> dict[str, torch.Tensor]:
    """Export a drawn model as the run would that started from ``source``; returns its parameters."""
    model = tiny_model(torch.float32, **changes)
    weights = Weights(model.config, "", model.config.vocab_size, hf=open_hf_folder(source) if source else None)
    plan = plan_export_of(model, weights, Tokenizer(tokenizer_folder) if tokenizer_folder else None, chat_template, stop_ids, dtype)
    export_hf(plan, model_tensors(model), target, is_main=True)
    return model_tensors(model)


def test_sharded_folder_keeps_its_partition(tmp_path: Path) -> None:
    save_reference(tmp_path / "in", shard_size="20KB")
    shards = sorted(path.name for path in (tmp_path / "in").glob("*.safetensors"))
    assert len(shards) > 2
    parameters = export(tmp_path / "in", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == shards
    for shard in shards:
        before, after = load_file(tmp_path / "in" / shard), load_file(tmp_path / "out" / shard)
        assert after.keys() == before.keys()
        assert all(torch.equal(tensor, parameters[name]) for name, tensor in after.items())
    indices = [json.loads((tmp_path / name / INDEX_FILE).read_text()) for name in ("in", "out")]
    assert indices[0]["weight_map"] == indices[1]["weight_map"]
    assert indices[0]["metadata"]["total_size"] == indices[1]["metadata"]["total_size"]


@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}], ids=["untied", "tied"])
def test_export_of_untouched_weights_is_the_folder_that_came_in(tmp_path: Path, shard_size: str, changes: dict[str, Any]) -> None:
    reference = save_reference(tmp_path / "in", shard_size, torch.bfloat16, **changes)
    source = open_hf_folder(tmp_path / "in")
    model = tiny_model(torch.float32, **changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(source.read(name))
    plan = plan_export_of(model, Weights(model.config, "", model.config.vocab_size, hf=source), None, None, frozenset(), None)
    export_hf(plan, model_tensors(model), tmp_path / "out", is_main=True)
    for path in (tmp_path / "in").glob("*.safetensors"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text()) == json.loads((tmp_path / "in" / name).read_text())
    assert reference.config.tie_word_embeddings == bool(changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_export_has_the_type_asked_for_and_its_config_says_so(tmp_path: Path, dtype: torch.dtype) -> None:
    save_reference(tmp_path / "in", dtype=torch.bfloat16)
    parameters = export(tmp_path / "in", tmp_path / "out", dtype)
    tensors = load_file(tmp_path / "out" / SINGLE_FILE)
    assert all(torch.equal(tensor, parameters[name].to(dtype)) for name, tensor in tensors.items())
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == str(dtype).removeprefix("torch.")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == dtype


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}], ids=["untied", "tied"])
def test_model_drawn_here_opens_in_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer", ["<s>", "</s>"], bos_token="<s>", eos_token="</s>")
    parameters = export(None, tmp_path / "out", tokenizer_folder=tokenizer, **changes)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert opened.dtype == torch.float32
    assert all(torch.equal(tensor, parameters[name]) for name, tensor in opened.named_parameters())
    assert (opened.config.bos_token_id, opened.config.eos_token_id, opened.generation_config.eos_token_id) == (0, 1, 1)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a")["input_ids"] == Tokenizer(tokenizer).encode("a", add_special_tokens=False).ids


def test_large_model_drawn_here_is_split_over_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "MAX_FILE_BYTES", 20_000)
    parameters = export(None, tmp_path / "out")
    files = sorted(tmp_path.glob("out/*.safetensors"))
    assert len(files) > 1
    assert [path.name for path in files] == [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(tensor, parameters[name]) for name, tensor in opened.named_parameters())


def test_exported_tokenizer_is_the_one_that_the_run_used(tmp_path: Path) -> None:
    save_reference(tmp_path / "in")
    own = write_tokenizer(tmp_path / "own", ["<own>"], "own template", pad_token="<own>")
    export(tmp_path / "in", tmp_path / "out", tokenizer_folder=own)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_text() == (own / name).read_text()


def test_template_that_was_trained_with_leaves_with_the_weights(tmp_path: Path) -> None:
    own = write_tokenizer(tmp_path / "own", ["<own>"], "the tokenizer's own template")
    export(None, tmp_path / "out", tokenizer_folder=own, chat_template="{{ messages[0].content }}!")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a!"


def test_derived_tensors_of_old_exports_do_not_leave(tmp_path: Path) -> None:
    tensors = model_tensors(tiny_model(torch.float32))
    derived = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    write_folder(tmp_path / "in", {SINGLE_FILE: {**tensors, **derived}})
    export(tmp_path / "in", tmp_path / "out")
    assert load_file(tmp_path / "out" / SINGLE_FILE).keys() == tensors.keys()


def test_stored_copy_of_a_tied_head_leaves_as_the_embedding(tmp_path: Path) -> None:
    tensors = model_tensors(tiny_model(torch.float32, tie_word_embeddings=True))
    write_folder(tmp_path / "in", {SINGLE_FILE: {**tensors, HEAD: tensors[EMBEDDING].clone()}}, config={**TINY_FIELDS, "tie_word_embeddings": True})
    parameters = export(tmp_path / "in", tmp_path / "out", tie_word_embeddings=True)
    written = load_file(tmp_path / "out" / SINGLE_FILE)
    assert torch.equal(written[HEAD], parameters[EMBEDDING])


def test_export_carries_a_manifest_that_verifies(tmp_path: Path) -> None:
    export(None, tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    assert manifest["kind"] == "export"
    assert find_damage(tmp_path / "out", manifest["files"], manifest["files"]) == []
    assert SINGLE_FILE in manifest["files"]


def test_failed_export_leaves_the_older_one_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(None, tmp_path / "out")
    before = (tmp_path / "out" / SINGLE_FILE).read_bytes()
    monkeypatch.setattr(hf.SafetensorsWriter, "finish", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(SaveError, match=r"out cannot be written.*No space left"):
        export(None, tmp_path / "out", dtype=torch.bfloat16)
    assert (tmp_path / "out" / SINGLE_FILE).read_bytes() == before
    monkeypatch.undo()
    export(None, tmp_path / "out", dtype=torch.bfloat16)
    assert (tmp_path / "out" / SINGLE_FILE).stat().st_size < len(before)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
