"""Training adapters: the same on one process and on two, resumed exactly, the base neither changed nor saved again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import foreign
import pytest
import torch
from conftest import TOKENIZER, Run, count_traffic, run_processes, write_chats
from parity.test_peft import write_lora_toml
from safetensors.torch import load_file

from tunelib.adapters import AdaptedLinear
from tunelib.checkpoint.dcp_reader import SafeReader, load_tensors
from tunelib.errors import CheckpointError, ConfigError, FormatError
from tunelib.formats.convert import convert, plan_conversion
from tunelib.formats.merge import plan_merge
from tunelib.formats.source import open_checkpoint

KINDS = {"LoRA": "", "DoRA": "use_dora = true", "QLoRA": 'quantize_base = "nf4"', "QDoRA": 'use_dora = true\nquantize_base = "nf4"'}
WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}  # NF4 takes 64 inputs at a time


@pytest.fixture
def base(tmp_path: Path) -> Path:
    foreign.make_hf(tmp_path / "base", tokenizer=TOKENIZER, **WIDE)
    return tmp_path / "base"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_chats(tmp_path / "chats.jsonl", 80)


@pytest.fixture(scope="module")
def every_kind(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind on one process and on two: KIND-1, KIND-2."""
    folder = tmp_path_factory.mktemp("kinds")
    foreign.make_hf(folder / "base", tokenizer=TOKENIZER, **WIDE)
    data = write_chats(folder / "chats.jsonl", 80)
    for world_size in (1, 2):
        cases = []
        for kind, section in KINDS.items():
            toml = write_lora_toml(folder / f"{kind}.toml", folder / "base", data, section)
            words = [str(toml), "--training.dtype", "float64", "--training.steps", "5", "--checkpoint.export_dtype", "float32"]
            cases.append([*words, "--job.dump_folder", str(folder / f"{kind}-{world_size}")])
        run_processes(cases, world_size)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_and_two_train_the_same_adapters(every_kind: Path, kind: str) -> None:
    one, two = Run(every_kind / f"{kind}-1"), Run(every_kind / f"{kind}-2")
    assert one.series("loss") == pytest.approx(two.series("loss"), rel=1e-9)
    assert one.series("grad_norm") == pytest.approx(two.series("grad_norm"), rel=1e-9)
    assert one.series("loss")[0] != one.series("loss")[-1]
    adapters = [load_file(run.folder / "adapter/adapter_model.safetensors") for run in (one, two)]
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(tensor, adapters[1][name], rtol=1e-9, atol=1e-9)
    for name, tensor in one.weights().items():
        torch.testing.assert_close(tensor, two.weights()[name], rtol=1e-6, atol=1e-7)
    fingerprints = [json.loads((run.folder / "adapter/base_fingerprint.json").read_text()) for run in (one, two)]
    assert fingerprints[0] == fingerprints[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("extra", ["", "dropout = 0.1"])
def test_resumed_run_equals_uninterrupted_run_and_saves_no_base(
    tmp_path: Path, train: Callable[..., Run], base: Path, data: Path, kind: str, extra: str
) -> None:
    toml = write_lora_toml(tmp_path / "run.toml", base, data, f"{KINDS[kind]}\n{extra}")
    saving = ("--checkpoint.enable_checkpoint", "--checkpoint.interval", "2")
    whole = train(toml, *saving, "--training.steps", "5")
    half = train(toml, *saving, "--training.steps", "2")
    again = train(toml, *saving, "--training.steps", "5", folder=half.folder)
    assert again.series("loss") == whole.series("loss")
    weights = again.weights()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in whole.weights().items())
    held = SafeReader(again.folder / "checkpoint/step-5").read_metadata().state_dict_metadata
    assert not any(name.endswith(("proj.weight", "norm.weight", "embed_tokens.weight")) for name in held)
    assert any(name.endswith("lora_A.weight") for name in held)


@pytest.mark.parametrize("kind", KINDS)
def test_base_has_neither_gradients_nor_optimizer_state_and_nf4_is_small(
    tmp_path: Path, train: Callable[..., Run], base: Path, data: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import train as program

    step, seen = program.train_step, []

    def watched_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, *words: object) -> tuple[float, float]:
        def look(*facts: object) -> None:
            frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            assert all(parameter.grad is None for parameter in frozen)
            assert all(parameter.grad is not None for parameter in trained)
            assert {id(parameter) for group in optimizer.param_groups for parameter in group["params"]} == {id(parameter) for parameter in trained}
            adapted = [module for module in model.modules() if isinstance(module, AdaptedLinear)]
            numbers = sum(module.in_features * module.out_features for module in adapted)
            seen.append(sum(module.weight.nbytes for module in adapted) / numbers)

        monkeypatch.setattr(program, "set_lr", look)
        return step(model, optimizer, *words)  # type: ignore[arg-type]

    monkeypatch.setattr(program, "train_step", watched_step)
    train(write_lora_toml(tmp_path / "run.toml", base, data, KINDS[kind]))
    assert seen == [0.5625 if "nf4" in KINDS[kind] else 4.0] * 3


def test_gradients_of_the_base_are_not_sent(base: Path) -> None:
    for found in count_traffic(base, 2, {}, {"enable": True, "rank": 4}):
        reduced = found["sent"]["reduce_scatter"][1]
        assert found["trained"] <= reduced <= 1.01 * found["trained"], found  # rows that do not divide by two are padded


def test_resume_beside_another_base_is_an_error(tmp_path: Path, train: Callable[..., Run], base: Path, data: Path) -> None:
    toml = write_lora_toml(tmp_path / "run.toml", base, data, "")
    saving = ("--checkpoint.enable_checkpoint",)
    run = train(toml, *saving, "--training.steps", "2")
    foreign.make_hf(tmp_path / "other", tokenizer=TOKENIZER, seed=1, **WIDE)
    (tmp_path / "other/model.safetensors").replace(base / "model.safetensors")
    with pytest.raises(CheckpointError, match="trained beside other frozen weights"):
        train(toml, *saving, "--training.steps", "4", folder=run.folder)


def test_adapters_alone_are_written_where_that_is_asked_for(tmp_path: Path, train: Callable[..., Run], base: Path, data: Path) -> None:
    run = train(write_lora_toml(tmp_path / "run.toml", base, data, "save_adapter_weights_only = true"))
    assert (run.folder / "adapter/adapter_config.json").is_file()
    assert not (run.folder / "export").exists()


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ('target_modules = ["q_prj"]', r"no linear layer is called 'q_prj'; did you mean 'q_proj'"),
        ('target_modules = ["all-linear", "q_proj"]', r"'all-linear' stands alone"),
    ],
)
def test_modules_that_are_not_there_are_named(tmp_path: Path, train: Callable[..., Run], base: Path, data: Path, lora: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        train(write_lora_toml(tmp_path / "run.toml", base, data, lora))


def test_narrow_layer_cannot_be_quantised(tmp_path: Path, train: Callable[..., Run], data: Path) -> None:
    foreign.make_hf(tmp_path / "narrow", tokenizer=TOKENIZER)
    with pytest.raises(ConfigError, match=r"has 32 inputs, which are not a multiple of 64"):
        train(write_lora_toml(tmp_path / "run.toml", tmp_path / "narrow", data, 'quantize_base = "nf4"'))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--lora.rank", "8"), r"has rank = 4, but lora\.rank is 8"),
        (("--lora.use_dora",), r"has use_dora = false, but lora\.use_dora is true"),
        (("--lora.target_modules", "q_proj"), r"is not part of the model's adapter"),
    ],
)
def test_adapter_of_other_settings_is_refused_by_name(
    tmp_path: Path, train: Callable[..., Run], base: Path, data: Path, words: tuple[str, ...], message: str
) -> None:
    toml = write_lora_toml(tmp_path / "run.toml", base, data, "")
    run = train(toml)
    with pytest.raises(FormatError, match=message):
        train(toml, "--lora.adapter_path", str(run.folder / "adapter"), *words)


@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
def test_merging_later_gives_the_export_of_the_run(tmp_path: Path, train: Callable[..., Run], base: Path, data: Path, kind: str) -> None:
    run = train(write_lora_toml(tmp_path / "run.toml", base, data, KINDS[kind]))
    convert(plan_merge(base, run.folder / "adapter", tmp_path / "merged"))
    for name, tensor in load_file(tmp_path / "merged/model.safetensors").items():
        torch.testing.assert_close(tensor, run.weights()[name], rtol=1e-6, atol=1e-7)
    convert(plan_merge(base, run.folder / "adapter", tmp_path / "half", "bfloat16"))
    for name, tensor in load_file(tmp_path / "half/model.safetensors").items():
        assert torch.equal(tensor, run.weights()[name].bfloat16()), name


def test_merging_in_another_form_gives_the_same_weights(tmp_path: Path, train: Callable[..., Run], base: Path, data: Path) -> None:
    run = train(write_lora_toml(tmp_path / "run.toml", base, data, ""))
    convert(plan_conversion(base, tmp_path / "meta", "meta"))
    convert(plan_merge(tmp_path / "meta", run.folder / "adapter", tmp_path / "merged"))
    merged, exported = open_checkpoint(tmp_path / "merged"), open_checkpoint(run.folder / "export")
    assert merged.form.kind == "meta"
    for name in exported.weights:
        torch.testing.assert_close(merged.read(name), exported.read(name), rtol=1e-6, atol=1e-7)


def test_merging_twice_or_onto_another_base_is_an_error(tmp_path: Path, train: Callable[..., Run], base: Path, data: Path) -> None:
    run = train(write_lora_toml(tmp_path / "run.toml", base, data, ""))
    foreign.make_hf(tmp_path / "other", tokenizer=TOKENIZER, seed=1, **WIDE)
    foreign.make_hf(tmp_path / "narrow", tokenizer=TOKENIZER)
    for wrong, words in (
        (run.folder / "export", "trained beside other weights"),
        (tmp_path / "other", "trained beside other weights"),
        (tmp_path / "narrow", "has other sizes than its weight"),
    ):
        with pytest.raises(FormatError, match=words):
            plan_merge(wrong, run.folder / "adapter", tmp_path / "out")
    with pytest.raises(FormatError, match=r"adapter_config\.json does not exist"):
        plan_merge(base, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", ["merged", "other"])
def test_adapter_starts_beside_the_base_that_it_was_trained_beside_alone(
    tmp_path: Path, train: Callable[..., Run], base: Path, data: Path, wrong: str
) -> None:
    toml = write_lora_toml(tmp_path / "run.toml", base, data, "")
    first = train(toml)
    words = ["--lora.adapter_path", str(first.folder / "adapter")]
    second = train(toml, *words)
    assert second.series("loss")[0] < first.series("loss")[0]
    foreign.make_hf(tmp_path / "other", tokenizer=TOKENIZER, seed=1, **WIDE)
    place = {"merged": first.folder / "export", "other": tmp_path / "other"}[wrong]
    with pytest.raises(CheckpointError, match=r"lora.adapter_path .* were trained beside other frozen weights .* merged into them already"):
        train(toml, *words, "--checkpoint.initial_load_path", str(place))


def test_damaged_adapter_does_not_start_a_run(tmp_path: Path, train: Callable[..., Run], base: Path, data: Path) -> None:
    toml = write_lora_toml(tmp_path / "run.toml", base, data, "")
    path = train(toml).folder / "adapter/adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(FormatError, match=r"adapter_model\.safetensors is damaged: its checksum"):
        train(toml, "--lora.adapter_path", str(path.parent))


def test_resume_needs_no_adapter_to_start_from_and_knows_it_by_its_place(
    tmp_path: Path, train: Callable[..., Run], base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toml = write_lora_toml(tmp_path / "run.toml", base, data, "")
    first = train(toml)
    saving = ("--checkpoint.enable_checkpoint", "--lora.adapter_path")
    run = train(toml, *saving, str(first.folder / "adapter"), "--training.steps", "2")
    shutil.rmtree(first.folder)
    monkeypatch.chdir(tmp_path)
    again = train(toml, *saving, f"{first.folder.name}/adapter/", "--training.steps", "4", folder=run.folder)
    assert again.series("step")[-1] == 4


def test_adapters_beside_a_bfloat16_base_learn_in_float32(tmp_path: Path, train: Callable[..., Run], base: Path, data: Path) -> None:
    """In bfloat16 steps this small would be lost: half a step of a length near 2 is 0.004."""
    toml = write_lora_toml(tmp_path / "run.toml", base, data, "use_dora = true\ntrain_lm_head = true")
    runs = [train(toml, "--training.dtype", "bfloat16", "--optimizer.lr", lr) for lr in ("1e-12", "1e-4")]
    before, after = (load_file(run.folder / "adapter/adapter_model.safetensors") for run in runs)
    assert {name.partition(".lora_")[2]: tensor.dtype for name, tensor in after.items()} == {
        "A.weight": torch.float32,
        "B.weight": torch.float32,
        "magnitude_vector": torch.float32,
        "": torch.bfloat16,
    }
    for name in (name for name in after if name.endswith("lora_magnitude_vector")):
        assert (before[name] != after[name]).float().mean() > 0.9, name


@pytest.mark.parametrize("kind", KINDS)
def test_run_in_mixed_precision_begins_as_its_base(tmp_path: Path, train: Callable[..., Run], base: Path, data: Path, kind: str) -> None:
    mixed = ("--training.mixed_precision_param", "bfloat16", "--training.steps", "1")
    run = train(write_lora_toml(tmp_path / "run.toml", base, data, KINDS[kind]), *mixed)
    plain = train(write_lora_toml(tmp_path / "run.toml", base, data, 'quantize_base = "nf4"' if "nf4" in KINDS[kind] else ""), *mixed)
    assert run.series("loss") == plain.series("loss")


@pytest.mark.parametrize("kind", ["QLoRA", "QDoRA"])
def test_merging_later_beside_a_quantised_base_gives_the_export_of_the_run(
    tmp_path: Path, train: Callable[..., Run], base: Path, data: Path, kind: str
) -> None:
    run = train(write_lora_toml(tmp_path / "run.toml", base, data, KINDS[kind]))
    plan = plan_merge(base, run.folder / "adapter", tmp_path / "merged")
    assert any("trained beside a base in nf4" in note for note in plan.notes)
    convert(plan)
    for name, tensor in load_file(tmp_path / "merged/model.safetensors").items():
        torch.testing.assert_close(tensor, run.weights()[name], rtol=1e-6, atol=1e-7)


def test_merging_later_keeps_the_chat_template_that_was_trained_with(tmp_path: Path, train: Callable[..., Run], base: Path, data: Path) -> None:
    run = train(write_lora_toml(tmp_path / "run.toml", base, data, ""), "--dataset.chat_template", "chatml")
    convert(plan_merge(base, run.folder / "adapter", tmp_path / "merged"))
    assert (tmp_path / "merged/chat_template.jinja").read_text() == (run.folder / "export/chat_template.jinja").read_text()


@pytest.mark.parametrize("more", ["", "train_embeddings = true\ntrain_lm_head = true"])
def test_resized_embedding_is_merged_by_the_run_and_named_later(tmp_path: Path, train: Callable[..., Run], data: Path, more: str) -> None:
    foreign.make_hf(tmp_path / "base", tokenizer=TOKENIZER, **WIDE | {"vocab_size": 600})
    run = train(write_lora_toml(tmp_path / "run.toml", tmp_path / "base", data, more), "--model.resize_embeddings")
    assert run.weights()["model.embed_tokens.weight"].shape == (640, 64)
    if more:
        with pytest.raises(FormatError, match=r"\[640, 64\], which is \[600, 64\] in .*; if the run resized it, take its export"):
            plan_merge(tmp_path / "base", run.folder / "adapter", tmp_path / "merged")
    else:
        plan_merge(tmp_path / "base", run.folder / "adapter", tmp_path / "merged")


def test_adapter_of_somebody_elses_is_found_before_training(tmp_path: Path, train: Callable[..., Run], base: Path, data: Path) -> None:
    folder = tmp_path / "mine"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter/adapter_model.safetensors").write_bytes(b"dear")
    with pytest.raises(ConfigError, match=r"adapter exists and was not written by a run"):
        train(write_lora_toml(tmp_path / "run.toml", base, data, ""), folder=folder)
    assert not (folder / "metrics.jsonl").exists()


def test_refused_run_leaves_later_checkpoints_as_they_are(tmp_path: Path, train: Callable[..., Run], base: Path, data: Path) -> None:
    toml = write_lora_toml(tmp_path / "run.toml", base, data, "")
    saving = ("--checkpoint.enable_checkpoint", "--checkpoint.interval", "2", "--training.steps", "4")
    run = train(toml, *saving)
    foreign.make_hf(tmp_path / "other", tokenizer=TOKENIZER, seed=1, **WIDE)
    (tmp_path / "other/model.safetensors").replace(base / "model.safetensors")
    with pytest.raises(CheckpointError, match="trained beside other frozen weights"):
        train(toml, *saving, "--checkpoint.load_step", "2", folder=run.folder)
    assert sorted(path.name for path in (run.folder / "checkpoint").iterdir()) == ["step-2", "step-4"]


def test_two_processes_leave_out_different_inputs(tmp_path: Path, base: Path, data: Path) -> None:
    toml = write_lora_toml(tmp_path / "run.toml", base, data, "dropout = 0.3")
    run_processes([[str(toml), "--checkpoint.enable_checkpoint", "--job.dump_folder", str(tmp_path / "two")]], 2)
    step = tmp_path / "two/checkpoint/step-3"
    states = {f"rng.{rank}.cpu": torch.empty(0, dtype=torch.uint8) for rank in range(2)}
    metadata = SafeReader(step).read_metadata().state_dict_metadata
    states = {name: torch.empty(metadata[name].size, dtype=torch.uint8) for name in states}
    load_tensors(states, step)
    assert not torch.equal(*states.values())
