"""Training starts from any form and leaves in the form that it came in; the export proves itself."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import foreign
import pytest
import torch
from conftest import ROOT, TOKENIZER, Run, run_processes, run_ranks, write_chats, write_toml

import tunelib.formats.load as load
import tunelib.formats.write as write
from tunelib.config import load_config
from tunelib.errors import ConfigError, SaveError
from tunelib.formats.convert import convert, plan_conversion
from tunelib.formats.source import open_checkpoint

HEADS, KV_HEADS = 4, 2
SIZES = {"hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


def write_bare_toml(path: Path, data: Path, extra: str = "") -> Path:
    """A config that leaves the model to the weights."""
    path.write_text(
        f"""
[model]
tokenizer_path = "{TOKENIZER}"
[dataset]
path = "{data}"
[training]
seq_len = 128
steps = 2
[optimizer]
lr = 1e-2  # large: a difference must show
{extra}"""
    )
    return path


def make_forms(folder: Path) -> dict[str, Path]:
    """One model in every form that is read, made without tunelib but for the DCP folder."""
    state = foreign.make_hf(folder / "hf", shards=3, tokenizer=TOKENIZER)
    foreign.make_hf(folder / "bin", shards=2, as_bin=True, tokenizer=TOKENIZER)
    foreign.make_meta(folder / "meta", state, HEADS, KV_HEADS)
    foreign.make_meta(folder / "meta2", state, HEADS, KV_HEADS, model_parallel=2, extras=True)
    foreign.make_torchtitan_dcp(folder / "titan", state, HEADS, KV_HEADS, full=True)
    (folder / "torch").mkdir()
    foreign.make_single(folder / "torch" / "model.pt", state)
    (folder / "torch" / "config.json").write_text((folder / "hf" / "config.json").read_text())
    convert(plan_conversion(folder / "hf", folder / "dcp", "dcp"))
    return {name: folder / name for name in ("hf", "bin", "meta", "meta2", "titan", "torch", "dcp")} | {"file": folder / "torch" / "model.pt"}


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_forms(tmp_path_factory.mktemp("forms"))


def words_for(path: Path, forms: dict[str, Path]) -> list[str]:
    """The command line that starts from a path; torchtitan's folder does not say what model it is."""
    sizes = {**SIZES, "vocab_size": open_checkpoint(forms["hf"]).config.vocab_size, "max_position_embeddings": 256}
    return ["--checkpoint.initial_load_path", str(path)] + (
        [word for name, value in sizes.items() for word in (f"--model.{name}", str(value))] if path == forms["titan"] else []
    )


def test_every_form_starts_the_same_training_and_leaves_as_it_came(tmp_path: Path, train: Callable[..., Run], forms: dict[str, Path]) -> None:
    toml = write_bare_toml(tmp_path / "run.toml", write_chats(tmp_path / "chats.jsonl", 60))
    expected = train(toml, *words_for(forms["hf"], forms)).series("loss")
    for name, path in forms.items():
        run = train(toml, *words_for(path, forms))
        assert run.series("loss") == expected, name
        given, left = open_checkpoint(path, open_checkpoint(forms["hf"]).fields), open_checkpoint(run.folder / "export")
        assert left.form.kind == given.form.kind, name
        if name not in ("dcp", "titan"):  # a DCP folder's chunks follow the processes that wrote it
            assert left.form.files == given.form.files, name
        assert left.form.is_meta == given.form.is_meta, name
        facts = json.loads((run.folder / "export_check.json").read_text())
        assert facts["tensors_compared"] == len(left.weights)
        assert facts["logits"]["largest_difference_from_trained_model"] < 1e-5


def test_weights_and_model_section_say_together_what_the_model_is(tmp_path: Path, forms: dict[str, Path]) -> None:
    toml = write_bare_toml(tmp_path / "run.toml", write_chats(tmp_path / "chats.jsonl", 8))
    with pytest.raises(ConfigError, match=r"initial_load_path.*no config\.json and no params\.json.*model\.flavor"):
        load_config([str(toml), "--checkpoint.initial_load_path", str(forms["titan"])])
    with pytest.raises(ConfigError, match=r"excludes"):
        load_config([str(toml), "--checkpoint.initial_load_path", str(forms["hf"]), "--model.hidden_size", "32"])


@pytest.mark.parametrize("kind", ["hf", "meta", "dcp", "torch"])
def test_export_format_overrides_the_form_that_weights_came_in(tmp_path: Path, train: Callable[..., Run], forms: dict[str, Path], kind: str) -> None:
    toml = write_bare_toml(tmp_path / "run.toml", write_chats(tmp_path / "chats.jsonl", 20))
    run = train(toml, *words_for(forms["meta2"], forms), "--checkpoint.export_format", kind, "--checkpoint.export_dtype", "bfloat16")
    left = open_checkpoint(run.folder / "export")
    assert (left.form.kind, {info.dtype for info in left.weights.values()}) == (kind, {torch.bfloat16})
    facts = json.loads((run.folder / "export_check.json").read_text())
    assert 0 < facts["largest_rounding"]["value"] < 0.01


@pytest.mark.parametrize("kind", ["hf", "meta", "dcp", "torch"])
def test_export_that_is_not_what_was_trained_is_an_error_and_leaves_nothing(
    tmp_path: Path, train: Callable[..., Run], forms: dict[str, Path], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    toml = write_bare_toml(tmp_path / "run.toml", write_chats(tmp_path / "chats.jsonl", 20))
    whole = write._as_stored

    def damaged(tensor: torch.Tensor, entry: write.Entry) -> torch.Tensor:
        stored = whole(tensor, entry).clone()
        if entry.source == "model.layers.1.mlp.up_proj.weight":
            stored.view(-1)[7] *= 1.0001
        return stored

    monkeypatch.setattr(write, "_as_stored", damaged)
    with pytest.raises(SaveError, match=r"read back, and model\.layers\.1\.mlp\.up_proj\.weight is not what was trained"):
        train(toml, *words_for(forms["hf"], forms), "--checkpoint.export_format", kind, folder=tmp_path / "out")
    assert not list((tmp_path / "out").glob("*export*"))


def test_config_that_is_not_the_models_is_found(tmp_path: Path, train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    chats = write_chats(tmp_path / "chats.jsonl", 20)
    whole = load.hf_config
    monkeypatch.setattr(load, "hf_config", lambda config: whole(config) | {"rope_theta": 123.0})
    with pytest.raises(SaveError, match=r"its config differs from the model's: rope_theta is 123\.0 and 10000\.0"):
        train(write_toml(tmp_path / "run.toml", chats), "--training.steps", "1")


def test_unpermuted_rotary_rows_of_an_export_are_found(
    tmp_path: Path, train: Callable[..., Run], forms: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    toml = write_bare_toml(tmp_path / "run.toml", write_chats(tmp_path / "chats.jsonl", 20))
    monkeypatch.setattr(write, "to_pairs", lambda rows, head_dim: rows)
    with pytest.raises(SaveError, match=r"self_attn\.[qk]_proj\.weight is not what was trained"):
        train(toml, *words_for(forms["meta"], forms))


def test_two_processes_export_what_one_does(tmp_path: Path, forms: dict[str, Path]) -> None:
    toml = write_bare_toml(tmp_path / "run.toml", write_chats(tmp_path / "chats.jsonl", 40), '[checkpoint]\nexport_dtype = "float32"\n')
    names = ("hf", "meta2", "dcp", "titan", "file")
    for world_size in (1, 2):
        cases = [[str(toml), "--job.dump_folder", str(tmp_path / f"{name}{world_size}"), *words_for(forms[name], forms)] for name in names]
        run_processes(cases, world_size)
    for name in names:
        one, two = (open_checkpoint(tmp_path / f"{name}{world_size}" / "export") for world_size in (1, 2))
        for weight in one.weights:
            torch.testing.assert_close(one.read(weight), two.read(weight), rtol=0, atol=2e-3)
        losses = [Run(tmp_path / f"{name}{world_size}").series("loss") for world_size in (1, 2)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        facts = json.loads((tmp_path / f"{name}2" / "export_check.json").read_text())
        assert "logits" not in facts  # no process holds the model
        assert facts["tensors_compared"] == len(one.weights)


def test_second_stage_starts_from_the_export_of_the_first(tmp_path: Path, train: Callable[..., Run]) -> None:
    """Pretrain on text, then train on chats, then adapters on chats: three TOMLs, each starting where the last one ended."""
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"The amber fjord number {number} is calm."}) + "\n" for number in range(60)))
    first = train(write_toml(tmp_path / "1.toml", tmp_path / "text.jsonl", "[validation]\nenable = true\nfraction = 0.2\n"), "--training.steps", "3")
    chats = write_chats(tmp_path / "chats.jsonl", 60)
    extra = "[validation]\nenable = true\nfraction = 0.2\n[checkpoint]\ninitial_load_path = '{}'\n"
    second = train(write_bare_toml(tmp_path / "2.toml", chats, extra.format(first.folder / "export")))
    third = train(write_bare_toml(tmp_path / "3.toml", chats, extra.format(second.folder / "export") + "[lora]\nenable = true\nrank = 4\n"))
    assert third.series("validation_loss")[0] == pytest.approx(second.series("validation_loss")[-1], rel=1e-6)
    assert open_checkpoint(third.folder / "export").fields == open_checkpoint(second.folder / "export").fields
    assert (third.folder / "adapter/adapter_model.safetensors").is_file()


SNIPPET = """
[checkpoint]
enable_checkpoint = true
folder = "checkpoint"
interval_type = "steps"
interval = 10
load_step = 5
model_weights_only = true
export_dtype = "bfloat16"
"""


def test_snippet_of_the_older_trainer_works_as_it_stands(tmp_path: Path, train: Callable[..., Run]) -> None:
    chats, folder = write_chats(tmp_path / "chats.jsonl", 60), tmp_path / "out"
    earlier = write_toml(tmp_path / "earlier.toml", chats, "[checkpoint]\nenable_checkpoint = true\ninterval = 5\n")
    train(earlier, "--training.steps", "5", folder=folder)
    run = train(write_toml(tmp_path / "snippet.toml", chats, SNIPPET), "--training.steps", "22", folder=folder)
    kinds = {path.name: json.loads((path / "manifest.json").read_text())["kind"] for path in (folder / "checkpoint").iterdir()}
    assert kinds == {"step-5": "full", "step-10": "full", "step-20": "full", "step-22": "model"}
    assert {info.dtype for info in open_checkpoint(folder / "checkpoint/step-22").weights.values()} == {torch.bfloat16}
    assert {info.dtype for info in open_checkpoint(folder / "checkpoint/step-20").weights.values()} == {torch.float32}
    assert run.series("step")[-1] == 22


def test_dcp_to_torch_of_a_model_only_checkpoint_is_flat_and_taken_back(tmp_path: Path, train: Callable[..., Run]) -> None:
    chats = write_chats(tmp_path / "chats.jsonl", 40)
    saving = "[checkpoint]\nenable_checkpoint = true\nmodel_weights_only = true\n"
    run = train(write_toml(tmp_path / "run.toml", chats, saving), "--training.steps", "2")
    step, file = run.folder / "checkpoint/step-2", tmp_path / "weights.pt"
    words = [sys.executable, "-m", "torch.distributed.checkpoint.format_utils", "dcp_to_torch", str(step), str(file)]
    subprocess.run(words, check=True, capture_output=True, timeout=120)
    flat = torch.load(file, weights_only=True)
    assert flat.keys() == run.weights().keys()
    assert all(torch.equal(flat[name], tensor) for name, tensor in run.weights().items())
    (tmp_path / "config.json").write_text((step / "config.json").read_text())
    toml = write_bare_toml(tmp_path / "again.toml", chats)
    again = [train(toml, "--checkpoint.initial_load_path", str(path)).series("loss") for path in (file, step, run.folder / "export")]
    assert again[0] == again[1] == again[2]


def test_four_processes_read_little_more_than_their_shares(tmp_path: Path) -> None:
    """Bytes that each process asks the system for, by /proc, while weights are given to a spread model."""
    foreign.make_hf(tmp_path / "hf", shards=3, hidden_size=256, intermediate_size=1024, num_hidden_layers=8, head_dim=64, vocab_size=4096)
    outputs = run_ranks(ROOT / "tests/integration/count_reads.py", [str(tmp_path / "hf")], 4)
    total = sum(path.stat().st_size for path in (tmp_path / "hf").glob("*.safetensors"))
    for output in outputs:
        found = re.search(r"read (\d+) of own (\d+)", output)
        assert found, output[-3000:]
        read, own = int(found[1]), int(found[2])
        assert own <= total / 4 * 1.02
        assert own <= read <= own * 1.02 + 200_000  # headers and configs
