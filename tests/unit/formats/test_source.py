"""A checkpoint is known by its files, counts for what its index says, and fits its model exactly."""

import contextlib
import json
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import make_meta, make_single, make_torchtitan_dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from unit.samples import TINY_FIELDS, tiny_model

from tunelib.checkpoint.state import model_tensors
from tunelib.errors import FormatError
from tunelib.formats.found import BIN, SAFETENSORS, find_kind
from tunelib.formats.source import StoredModel, check_model, open_checkpoint, read_fields

INDEX_FILE = f"{SAFETENSORS}.index.json"
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def tensors() -> State:
    """The weights of the smallest model; its ffn is as wide as a params.json can say."""
    return {name: tensor.clone() for name, tensor in model_tensors(tiny_model(torch.float32, intermediate_size=88)).items()}


@pytest.fixture(scope="module")
def tied() -> State:
    return {name: t.clone() for name, t in model_tensors(tiny_model(torch.float32, intermediate_size=88, tie_word_embeddings=True)).items()}


def write_folder(folder: Path, files: dict[str, State], index: Any = None, **changes: Any) -> Path:
    """A folder of the given files; several get an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(TINY_FIELDS | {"intermediate_size": 88} | changes))
    for file, held in files.items():
        save_file(held, folder / file)
    if index is None and len(files) > 1:
        index = {"metadata": {}, "weight_map": {name: file for file, held in files.items() for name in held}}
    if index is not None:
        (folder / INDEX_FILE).write_text(index if isinstance(index, str) else json.dumps(index))
    return folder


def split(tensors: State) -> dict[str, State]:
    names = list(tensors)
    return {f"part-{n}.safetensors": {name: tensors[name] for name in names[n::2]} for n in range(2)}


def check_holds(stored: StoredModel, tensors: State) -> None:
    check_model(stored)
    assert stored.weights.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(stored.read(name), tensor), name
        part = (slice(3, 17),)
        assert torch.equal(stored.read(name, part), tensor[part]), name


# What it is


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        ([SAFETENSORS, "config.json"], "hf"),
        ([INDEX_FILE], "hf"),
        ([BIN], "hf"),
        ([f"{BIN}.index.json", "tokenizer.json"], "hf"),
        (["consolidated.00.pth", "params.json"], "meta"),
        (["consolidated.00.pth", "consolidated.01.pth"], "meta"),
        ([".metadata", "__0_0.distcp", "config.json"], "dcp"),
        (["weights.pt", "config.json"], "torch"),
    ],
)
def test_folder_is_known_by_its_files(tmp_path: Path, files: list[str], kind: str) -> None:
    for name in files:
        (tmp_path / name).touch()
    assert find_kind(tmp_path) == kind


@pytest.mark.parametrize("name", ["a.pt", "a.pth", "a.bin"])
def test_single_file_is_known_by_its_ending(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    assert find_kind(tmp_path / name) == "torch"


@pytest.mark.parametrize(
    ("files", "path", "words"),
    [
        ([], "none", r"none does not exist; scripts/download\.py"),
        (["model.gguf"], "model.gguf", r"GGUF is written, not read"),
        (["model.safetensors"], "model.safetensors", r"name the folder that it lies in"),
        (["config.json"], ".", r"holds no weights that are known: .*model\.safetensors"),
        (["a.pt", "b.pt"], ".", r"holds no weights that are known"),
        (["export/model.safetensors"], ".", r"name the folder .*/export"),
        (["original/consolidated.00.pth"], ".", r"name the folder .*/original"),
        (["checkpoint/step-5/.metadata"], ".", r"name one of its step folders .*/checkpoint"),
        (["step-5/.metadata", "step-7/.metadata"], ".", r"step folders: name one, such as .*step-7"),
    ],
)
def test_what_is_no_checkpoint_says_what_to_name_instead(tmp_path: Path, files: list[str], path: str, words: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(FormatError, match=words):
        open_checkpoint(tmp_path / path)


# Hugging Face


@pytest.mark.parametrize("write", [save_file, torch.save], ids=["safetensors", "bin"])
@pytest.mark.parametrize("several", [False, True])
def test_every_kind_of_hf_folder_holds_the_model(tmp_path: Path, tensors: State, write: Any, several: bool) -> None:
    folder, single = write_folder(tmp_path, {}), SAFETENSORS if write is save_file else BIN
    groups = {file.replace(".safetensors", Path(single).suffix): held for file, held in split(tensors).items()} if several else {single: tensors}
    for file, held in groups.items():
        write(held, folder / file)
    if several:
        weight_map = {name: file for file, held in groups.items() for name in held}
        (folder / f"{single}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    stored = open_checkpoint(folder)
    check_holds(stored, tensors)
    assert list(stored.form.files) == list(groups)
    assert {file: {entry.info.name for entry in entries} for file, entries in stored.form.files.items()} == {
        file: set(held) for file, held in groups.items()
    }


def test_index_decides_which_files_and_tensors_count(tmp_path: Path, tensors: State) -> None:
    groups = split(tensors)
    folder = write_folder(tmp_path, groups)
    for stray in (SAFETENSORS, "adapter_model.safetensors", "part-9.safetensors"):
        save_file({name: tensor + 100 for name, tensor in tensors.items()}, folder / stray)
    first, second = groups
    name = next(iter(groups[second]))
    save_file(groups[first] | {name: tensors[name] + 100}, folder / first)  # a second copy where the index does not look
    check_holds(open_checkpoint(folder), tensors)


def test_tensor_that_the_index_does_not_list_is_not_passed_over(tmp_path: Path, tensors: State) -> None:
    groups = split(tensors)
    first = next(iter(groups))
    folder = write_folder(tmp_path, groups)
    save_file(groups[first] | {"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}, folder / first)
    with pytest.raises(FormatError, match=r"q_norm\.weight is not part of the model"):
        check_model(open_checkpoint(folder))


@pytest.mark.parametrize("name", ["manifest.json", "model-00001-of-00002.st", "weights.bin"])
def test_index_names_files_of_its_own_kind_only(tmp_path: Path, tensors: State, name: str) -> None:
    folder = write_folder(tmp_path, {"a.safetensors": tensors}, index={"weight_map": dict.fromkeys(tensors, name)})
    with pytest.raises(FormatError, match=r"is not such a file as the index is for"):
        open_checkpoint(folder)


def test_safetensors_are_taken_before_bin(tmp_path: Path, tensors: State) -> None:
    folder = write_folder(tmp_path, {SAFETENSORS: tensors})
    torch.save({name: tensor + 100 for name, tensor in tensors.items()}, folder / BIN)
    check_holds(open_checkpoint(folder), tensors)


def test_missing_truncated_or_lacking_shard_is_named(tmp_path: Path, tensors: State) -> None:
    for number, (damage, words) in enumerate(
        [
            (lambda path: path.unlink(), r"part-1\.safetensors does not exist"),
            (lambda path: path.write_bytes(path.read_bytes()[:-3]), r"part-1\.safetensors cannot be read"),
            (lambda path: save_file({}, path), r"part-1\.safetensors lacks .*, which model\.safetensors\.index\.json says it holds"),
        ]
    ):
        folder = write_folder(tmp_path / str(number), split(tensors))
        damage(folder / "part-1.safetensors")
        with pytest.raises(FormatError, match=words):
            open_checkpoint(folder)


@pytest.mark.parametrize("file", ["../outside.safetensors", "/tmp/outside.safetensors", "deep/one.safetensors", "..", ".", "", "nul\0.safetensors"])
def test_index_that_leaves_the_folder_is_refused(tmp_path: Path, tensors: State, file: str) -> None:
    save_file(tensors, tmp_path / "outside.safetensors")
    folder = write_folder(tmp_path / "model", {SAFETENSORS: tensors}, index={"weight_map": dict.fromkeys(tensors, file)})
    with pytest.raises(FormatError):
        open_checkpoint(folder)


@pytest.mark.parametrize("index", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"weight_map": ["a"]}', "[" * 100_000])
def test_broken_index_is_named(tmp_path: Path, tensors: State, index: str) -> None:
    with pytest.raises(FormatError, match=r"index\.json"):
        open_checkpoint(write_folder(tmp_path, {SAFETENSORS: tensors}, index=index))


def test_empty_index_is_no_weights(tmp_path: Path, tensors: State) -> None:
    with pytest.raises(FormatError, match=EMBEDDING):
        open_checkpoint(write_folder(tmp_path, {SAFETENSORS: tensors}, index={"weight_map": {}}))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000], ids=["empty", "cut off", "list", "not UTF-8", "deep"])
def test_broken_config_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(FormatError, match=r"config\.json"):
        read_fields(tmp_path)


def test_folder_without_config_asks_what_model_it_is(tmp_path: Path, tensors: State) -> None:
    folder = write_folder(tmp_path, {SAFETENSORS: tensors})
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    with pytest.raises(FormatError, match=r"has no config\.json: what model is it\?"):
        open_checkpoint(folder)
    check_holds(open_checkpoint(folder, fields), tensors)


def test_own_config_counts_before_the_given_one(tmp_path: Path, tensors: State) -> None:
    check_holds(open_checkpoint(write_folder(tmp_path, {SAFETENSORS: tensors}), TINY_FIELDS | {"num_hidden_layers": 7}), tensors)


# Meta


@pytest.mark.parametrize("model_parallel", [1, 2])
@pytest.mark.parametrize("embedding_split", ["columns", "rows"])
@pytest.mark.parametrize("extras", [False, True])
def test_meta_folder_holds_the_model_in_hugging_faces_names(tmp_path: Path, tensors: State, model_parallel: int, embedding_split: str, extras: bool):
    make_meta(tmp_path, tensors, 4, 2, model_parallel=model_parallel, embedding_split=embedding_split, extras=extras)
    stored = open_checkpoint(tmp_path)
    check_holds(stored, tensors)
    assert stored.form.is_meta
    assert stored.skipped == (("rope.freqs",) if extras else ())
    assert not stored.config.tie_word_embeddings


@pytest.mark.parametrize(("model_parallel", "embedding_split"), [(1, "rows"), (2, "rows")])
def test_meta_head_that_equals_the_embedding_is_a_tied_one(tmp_path: Path, tied: State, model_parallel: int, embedding_split: str) -> None:
    make_meta(tmp_path, tied, 4, 2, model_parallel=model_parallel, embedding_split=embedding_split)
    stored = open_checkpoint(tmp_path)
    check_holds(stored, tied)
    assert stored.config.tie_word_embeddings
    assert torch.equal(stored.read(HEAD), tied[EMBEDDING])


def test_params_count_before_a_config_in_a_meta_folder(tmp_path: Path, tensors: State) -> None:
    make_meta(tmp_path, tensors, 4, 2)
    (tmp_path / "config.json").write_text(json.dumps(TINY_FIELDS | {"num_hidden_layers": 7}))
    check_holds(open_checkpoint(tmp_path), tensors)


def _drop_first(folder: Path) -> None:
    (folder / "consolidated.00.pth").unlink()


def _change(file: str, name: str, change: Any) -> Any:
    def damage(folder: Path) -> None:
        held = torch.load(folder / file, weights_only=True)
        torch.save({key: change(tensor) if key == name else tensor for key, tensor in held.items()}, folder / file)

    return damage


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_drop_first, r"consolidated\.00\.pth is missing"),
        (_change("consolidated.01.pth", "norm.weight", lambda t: t + 1), r"01\.pth: norm\.weight differs from that of consolidated\.00\.pth"),
        (_change("consolidated.01.pth", "layers.0.attention.wo.weight", lambda t: t[:, 1:].clone()), r"layers\.0\.attention\.wo\.weight has shape"),
        (_change("consolidated.00.pth", "norm.weight", lambda t: t[None]), r"norm\.weight has shape"),
        (_change("consolidated.00.pth", "tok_embeddings.weight", lambda t: t[0]), r"tok_embeddings\.weight"),
        (_change("consolidated.00.pth", "output.weight", lambda t: t.sum()), r"output\.weight"),
        (lambda folder: (folder / "params.json").unlink(), r"has no params\.json: what model is it"),
        (lambda folder: (folder / "params.json").write_text("{"), r"params\.json cannot be read"),
    ],
    ids=[
        "no first file",
        "norms differ",
        "shapes differ",
        "a dimension more",
        "flat embedding",
        "a head of one number",
        "no params",
        "broken params",
    ],
)
def test_damaged_meta_folder_is_refused_by_file_or_tensor(tmp_path: Path, tensors: State, damage: Any, words: str) -> None:
    make_meta(tmp_path, tensors, 4, 2, model_parallel=2)
    damage(tmp_path)
    with pytest.raises(FormatError, match=words):
        check_model(open_checkpoint(tmp_path))


def test_missing_last_file_is_asked_for(tmp_path: Path, tensors: State) -> None:
    for split in ("columns", "rows"):
        folder = tmp_path / split
        make_meta(folder, tensors, 4, 2, model_parallel=2, embedding_split=split)
        (folder / "consolidated.01.pth").unlink()
        with pytest.raises(FormatError, match=r"is a file missing\?|tok_embeddings has 24 rows"):
            open_checkpoint(folder)


def test_tensor_that_is_not_part_of_the_model_is_said_to_be_so_in_several_files_too(tmp_path: Path, tensors: State) -> None:
    make_meta(tmp_path, tensors, 4, 2, model_parallel=2)
    params = json.loads((tmp_path / "params.json").read_text())
    (tmp_path / "params.json").write_text(json.dumps(params | {"n_layers": 1}))
    with pytest.raises(FormatError, match=r"model\.layers\.1\.self_attn\.q_proj\.weight is not part of the model"):
        check_model(open_checkpoint(tmp_path))


def test_files_that_cut_a_head_in_two_are_refused(tmp_path: Path, tensors: State) -> None:
    make_meta(tmp_path, tensors, 4, 2, model_parallel=4)
    with pytest.raises(FormatError, match=r"attention\.wk\.weight has shape \[4, 32\] in each of 4 files"):
        open_checkpoint(tmp_path)


# torch files and DCP


@pytest.mark.parametrize("as_folder", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_torch_file_holds_the_model_by_the_config_beside_it(tmp_path: Path, tensors: State, as_folder: bool, nested: bool) -> None:
    folder = write_folder(tmp_path, {})
    make_single(folder / "weights.pt", tensors, nested=nested)
    check_holds(open_checkpoint(folder if as_folder else folder / "weights.pt"), tensors)


@pytest.mark.parametrize("prefix", ["", "model.", "_orig_mod.module."])
def test_what_stands_before_every_name_is_left_off(tmp_path: Path, tensors: State, prefix: str) -> None:
    folder = write_folder(tmp_path, {})
    make_single(folder / "weights.pt", {f"{prefix}{name}": tensor for name, tensor in tensors.items()})
    check_holds(open_checkpoint(folder), tensors)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_dcp_of_torchtitan_holds_the_model_and_training_state_is_skipped(tmp_path: Path, tensors: State, full: bool, nested: bool) -> None:
    make_torchtitan_dcp(tmp_path / "step-10", tensors, 4, 2, full=full, nested=nested)
    stored = open_checkpoint(tmp_path / "step-10", TINY_FIELDS | {"intermediate_size": 88})
    check_holds(stored, tensors)
    assert stored.form.is_meta
    assert {name.split(".")[0] for name in stored.skipped if not name.endswith("freqs_cis")} == ({"optimizer", "train_state"} if full else set())
    assert any(name.endswith("freqs_cis") for name in stored.skipped)


def test_dcp_whose_chunks_do_not_make_up_a_tensor_is_refused(tmp_path: Path, tensors: State) -> None:
    make_torchtitan_dcp(tmp_path, tensors, 4, 2)
    metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    name, below = "layers.0.feed_forward.w1.weight", torch.Size((44, 0))
    metadata.state_dict_metadata[name].chunks = [ChunkStorageMetadata(below, torch.Size((44, 32)))]
    metadata.storage_data[MetadataIndex(name, below)] = metadata.storage_data[MetadataIndex(name, torch.Size((0, 0)))]
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(FormatError, match=r"mlp\.gate_proj\.weight is stored in pieces of 1408 elements in all instead of 2816"):
        check_model(open_checkpoint(tmp_path, TINY_FIELDS | {"intermediate_size": 88}))


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.float8_e4m3fn])
def test_weight_of_a_type_that_is_not_read_is_refused_by_name(tmp_path: Path, tensors: State, dtype: torch.dtype) -> None:
    folder = write_folder(tmp_path, {})
    make_single(folder / BIN, tensors | {NORM: tensors[NORM].to(dtype)})
    with pytest.raises(FormatError, match=rf"{NORM} has type {str(dtype).removeprefix('torch.')}"):
        check_model(open_checkpoint(folder))


# Damage of any kind


@pytest.mark.parametrize("file", [SAFETENSORS, BIN, "consolidated.01.pth", "params.json", ".metadata", "__0_0.distcp"])
def test_bytes_that_changed_anywhere_are_met_with_a_sentence_or_not_at_all(tmp_path: Path, tensors: State, file: str) -> None:
    if file in ("consolidated.01.pth", "params.json"):
        make_meta(tmp_path, tensors, 4, 2, model_parallel=2)
    elif file in (".metadata", "__0_0.distcp"):
        make_torchtitan_dcp(tmp_path, tensors, 4, 2)
    else:
        (torch.save if file == BIN else save_file)(tensors, tmp_path / file)
    sound, chance, fields = (tmp_path / file).read_bytes(), random.Random(file), TINY_FIELDS | {"intermediate_size": 88}
    for _ in range(60):
        content = bytearray(sound)
        place = chance.choice(
            (chance.randrange(min(len(sound), 4000)), chance.randrange(len(sound)), len(sound) - 1 - chance.randrange(min(len(sound), 2000)))
        )
        if chance.random() < 0.7:
            content[place] ^= 1 << chance.randrange(8)
        else:
            del content[place : place + chance.randrange(1, 20)]
        (tmp_path / file).write_bytes(content)
        with contextlib.suppress(FormatError):
            stored = open_checkpoint(tmp_path, fields)
            check_model(stored)
            assert all(stored.read(name).shape == tensor.shape for name, tensor in tensors.items())


# Whether it fits


def test_folder_with_derived_tensors_of_old_exports_fits(tmp_path: Path, tensors: State) -> None:
    derived = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    stored = open_checkpoint(write_folder(tmp_path, {SAFETENSORS: tensors | derived}))
    check_holds(stored, tensors)
    assert stored.skipped == tuple(derived)


def test_everything_that_does_not_fit_is_named_at_once(tmp_path: Path, tensors: State) -> None:
    wrong = {name: tensor for name, tensor in tensors.items() if name != HEAD} | {NORM: torch.ones(2, 3), "extra": torch.ones(1)}
    with pytest.raises(FormatError) as caught:
        check_model(open_checkpoint(write_folder(tmp_path, {SAFETENSORS: wrong})))
    for problem in (f"{HEAD} is missing", "extra is not part of the model", f"{NORM} has shape [2, 3] instead of [32]"):
        assert problem in str(caught.value)


def test_long_list_of_problems_is_cut_and_counted(tmp_path: Path, tensors: State) -> None:
    extra = {f"w{number}": torch.ones(1) for number in range(20)}
    with pytest.raises(FormatError, match=r"\(and 12 more\)$"):
        check_model(open_checkpoint(write_folder(tmp_path, {SAFETENSORS: tensors | extra})))


def test_tied_head_may_be_left_out_or_equal_but_not_differ(tmp_path: Path, tied: State) -> None:
    weight = tied[EMBEDDING]
    check_holds(open_checkpoint(write_folder(tmp_path / "left out", {SAFETENSORS: tied}, tie_word_embeddings=True)), tied)
    check_holds(open_checkpoint(write_folder(tmp_path / "equal", {SAFETENSORS: tied | {HEAD: weight.clone()}}, tie_word_embeddings=True)), tied)
    for name, other in (("differs", weight + 1e-6), ("shape", weight[1:].clone()), ("type", weight.bfloat16()), ("flat", weight[0].clone())):
        with pytest.raises(FormatError, match=r"tie_word_embeddings.*lm_head\.weight differs"):
            check_model(open_checkpoint(write_folder(tmp_path / name, {SAFETENSORS: tied | {HEAD: other}}, tie_word_embeddings=True)))


def test_last_rows_of_a_tied_head_are_compared_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: State) -> None:
    head = tied[EMBEDDING].clone()
    head[-1, -1] += 1
    folder = write_folder(tmp_path, {SAFETENSORS: tied | {HEAD: head}}, tie_word_embeddings=True)
    with pytest.raises(FormatError, match="differs"):
        check_model(open_checkpoint(folder))


def test_folder_with_only_a_head_is_not_known(tmp_path: Path, tied: State) -> None:
    only = {name: tensor for name, tensor in tied.items() if name != EMBEDDING} | {HEAD: tied[EMBEDDING]}
    with pytest.raises(FormatError, match=EMBEDDING):
        check_model(open_checkpoint(write_folder(tmp_path, {SAFETENSORS: only}, tie_word_embeddings=True)))


def test_untied_model_without_a_head_is_refused(tmp_path: Path, tied: State) -> None:
    with pytest.raises(FormatError, match=r"lm_head\.weight is missing"):
        check_model(open_checkpoint(write_folder(tmp_path, {SAFETENSORS: tied})))
