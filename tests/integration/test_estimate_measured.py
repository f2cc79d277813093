"""The estimate against steps that are really taken, against train.py's calls, and as a program."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, TOKENIZER, Run, run_ranks, run_script, write_chats, write_toml

from tunelib.config import load_config
from tunelib.config.schema import ActivationCheckpoint, Lora, Model, Optimizer, Parallelism, Training
from tunelib.data.tokenizer import Tokenizer
from tunelib.formats.load import find_weights
from tunelib.parallel import estimate as room
from tunelib.parallel.estimate import Plan, estimate_memory

MODEL = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
BATCH = {"seq_len": 256, "global_batch_size": 4, "local_batch_size": 2}
CASES: dict[int, dict[str, dict[str, Any]]] = {
    1: {
        "full": {},
        "tied, micro-batches": {"model": {**MODEL, "tie_word_embeddings": True}, "training": {**BATCH, "local_batch_size": 1}},
        "SGD in float64": {"optimizer": {"name": "SGD", "momentum": 0.9}, "training": {**BATCH, "dtype": "float64"}},
        "recompute": {"activation_checkpoint": {"mode": "full"}},
        "recompute of operators": {"activation_checkpoint": {"mode": "selective"}},
        "LoRA": {"lora": {"enable": True}},
        "DoRA in NF4": {"lora": {"enable": True, "use_dora": True, "quantize_base": "nf4"}},
    },
    2: {
        "sharded": {},
        "micro-batches in bfloat16": {"training": {**BATCH, "local_batch_size": 1, "mixed_precision_param": "bfloat16"}},
        "kept gathered": {"parallelism": {"fsdp_reshard_after_forward": "never"}},
        "LoRA on bfloat16, recompute": {
            "lora": {"enable": True, "rank": 4},
            "activation_checkpoint": {"mode": "full"},
            "training": {**BATCH, "dtype": "bfloat16"},
        },
        "replicated": {"parallelism": {"data_parallel_replicate_degree": 2}},
        "split products": {"parallelism": {"tensor_parallel_degree": 2}},
        "cut rows": {"parallelism": {"context_parallel_degree": 2}},
        # The tracker takes one micro-batch a step, and one backward pass.
        "pipeline": {
            "parallelism": {"pipeline_parallel_degree": 2, "pipeline_parallel_schedule": "GPipe"},
            "training": {**BATCH, "local_batch_size": 4},
        },
    },
}


def plan_of(given: dict[str, Any], world_size: int) -> Plan:
    """A case, planned for CPUs."""
    training = Training(**given.get("training", BATCH))
    model = find_weights(Model(**given.get("model", MODEL)), "", 0, training.seq_len).config
    kinds = {"parallelism": Parallelism, "lora": Lora, "optimizer": Optimizer, "activation_checkpoint": ActivationCheckpoint}
    return Plan(model, world_size, "cpu", training, **{name: kind(**given.get(name, {})) for name, kind in kinds.items()})


@pytest.mark.parametrize("world_size", [pytest.param(size, marks=[pytest.mark.slow] if size > 1 else []) for size in CASES])
def test_estimate_is_what_torch_tracks_in_a_step_that_is_taken(world_size: int) -> None:
    """Within 10 per cent is what is promised; with the same torch both see the same tensors, so that we ask for 0.1 per cent.

    With bfloat16 micro-batches two processes hold 2 per cent more than is foreseen, as with larger models (docs/estimate.md).
    In a pipeline the tracker does not see what stages receive into, which is there from the first step on.
    """
    plans = [{"model": MODEL, "training": BATCH, **given} for given in CASES[world_size].values()]
    outputs = run_ranks(ROOT / "tests/integration/track_memory.py", [json.dumps(plans)], world_size, timeout=200)
    of_ranks = [json.loads(output.splitlines()[-1]) for output in outputs]
    for number, name in enumerate(CASES[world_size]):
        worst = max((of_rank[number] for of_rank in of_ranks), key=lambda tracked: tracked["Total"])
        peak = estimate_memory(plan_of(plans[number], world_size)).peak
        tolerance = 0.1 if "pipeline" in name else 0.03 if "micro-batches in bfloat16" in name else 1e-3
        assert peak.total == pytest.approx(worst["Total"], rel=tolerance), name
        assert peak.optimizer == worst["Optstate"], name


class Calls:
    """Notes the calls that set up a run and take a step, in their order, with what decides memory."""

    def __init__(self, patch: pytest.MonkeyPatch, module: Any):
        self.made: list[tuple[str, Any]] = []

        def shape(tensor: torch.Tensor) -> tuple[int, ...]:
            return tuple(tensor.shape)

        def watch(owner: Any, name: str, say: Callable[..., Any]) -> None:
            real = getattr(owner, name)

            def call(*words: Any, **named: Any) -> Any:
                self.made.append((name, say(*words)))
                return real(*words, **named)

            patch.setattr(owner, name, call)

        watch(module, "build_layout", lambda section, runtime: (section, runtime.world_size, runtime.sharded))
        watch(module, "build_on_meta", lambda config, dtype: (config, dtype))
        watch(module, "check_split", lambda config, lora, degree: (config, lora, degree))
        watch(module, "add_adapters", lambda model, section: section)
        watch(
            module, "spread_model", lambda model, section, recompute, layout, runtime, stages, *_: (section, recompute, runtime.compute_dtype, stages)
        )
        watch(module, "build_optimizer", lambda model, section: (section, [shape(parameter) for parameter in model.parameters()]))
        watch(module.Decoder, "forward", lambda model, tokens, positions, lengths: (shape(tokens), shape(positions), sum(lengths)))
        watch(torch.Tensor, "backward", lambda loss: shape(loss))
        watch(module, "plan_stages", lambda model, section, seq_len: (section, seq_len))
        watch(module, "clip_gradients", lambda parameters, max_norm, pipeline: (max_norm, pipeline))
        watch(module, "sum_over_ranks", lambda value, group: (shape(value), value.dtype, group))
        watch(torch.optim.AdamW, "step", lambda optimizer: type(optimizer))
        watch(torch.optim.Optimizer, "zero_grad", lambda optimizer: type(optimizer))


@pytest.mark.parametrize(
    "words",
    [[], ["--lora.enable", "--lora.rank", "4", "--activation_checkpoint.mode", "full", "--training.max_norm", "2"]],
    ids=["full", "LoRA, recompute"],
)
def test_estimate_makes_the_calls_that_training_makes(tmp_path: Path, train: Callable[..., Run], words: list[str]) -> None:
    import train as program

    toml = write_toml(tmp_path / "tiny.toml", write_chats(tmp_path / "chats.jsonl", 60))
    words = ["--training.steps", "1", "--training.local_batch_size", "8", "--checkpoint.no-verify_export", *words]
    with pytest.MonkeyPatch.context() as patch:
        of_training = Calls(patch, program).made
        train(toml, *words)
    config = load_config([str(toml), *words]).config
    model = find_weights(config.model, "", Tokenizer(TOKENIZER).vocab_size, config.training.seq_len).config
    with pytest.MonkeyPatch.context() as patch:
        of_estimate = Calls(patch, room).made
        estimate_memory(Plan(model, 1, "cpu", config.training, config.parallelism, config.lora, config.optimizer, config.activation_checkpoint))
    assert of_estimate == of_training
    assert len(of_estimate) == (13 if config.lora.enable else 12)


def test_checkpoint_is_as_large_as_estimated(tmp_path: Path, train: Callable[..., Run]) -> None:
    toml = write_toml(tmp_path / "tiny.toml", write_chats(tmp_path / "chats.jsonl", 60))
    words = ["--training.steps", "1", "--checkpoint.enable_checkpoint", "--model.hidden_size", "128"]
    run = train(toml, *words)
    on_disk = sum(path.stat().st_size for path in (run.folder / "checkpoint/step-1").rglob("*.distcp"))
    config = load_config([str(toml), *words]).config
    model = find_weights(config.model, "", Tokenizer(TOKENIZER).vocab_size, config.training.seq_len).config
    assert estimate_memory(Plan(model, 1, "cpu", config.training)).checkpoint_bytes == pytest.approx(on_disk, rel=0.05)


def estimate(*words: str) -> subprocess.CompletedProcess[str]:
    return run_script("estimate_memory.py", *words)


PLANNED = """
[model]
flavor = "smollm2-135m"
num_hidden_layers = 4
tokenizer_path = "nowhere"
[dataset]
path = "nothing.jsonl"
[training]
steps = 1000
seq_len = 1024
[checkpoint]
enable_checkpoint = true
keep_latest_k = 2
"""


def test_program_says_what_a_run_needs_and_what_would_fit(tmp_path: Path) -> None:
    toml = tmp_path / "planned.toml"
    toml.write_text(PLANNED)
    folder = ["--job.dump_folder", str(tmp_path / "not/yet")]
    fits = estimate("--job.config_file", str(toml), "--ngpu", "2", "--gpu_memory_gib", "80", *folder, "--training.seq_len", "512")
    assert fits.returncode == 0, fits.stderr
    assert "machine     2 × cuda, sharded over 2, float32 parameters, bfloat16 compute" in fits.stdout
    assert "run         1,000 steps, 4,096,000 tokens; 4,096 tokens a step: 1 micro-batch of 4 × 512 on each data rank" in fits.stdout
    assert "2 at once at most" in fits.stdout
    assert "fits        yes: tensors may take 72.0 of 80 GiB" in fits.stdout
    tight = estimate(str(toml), "--gpu_memory_gib", "1.2", "--headroom", "0", "--device", "cpu", *folder)
    assert tight.returncode == 1, tight.stderr
    assert "fits        NO" in tight.stdout
    assert "--training.local_batch_size 1" in tight.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--training.seq_len", "many"], "--training.seq_len"),
        (["--ngpu", "0"], "--ngpu 0: must be at least 1"),
        (["--ngpu", "3"], "training.global_batch_size = 8 (default): is not a multiple of 3 processes"),
        (["--ngpu", "2", "--parallelism.tensor_parallel_degree", "2"], "does not divide num_attention_heads = 9"),
        (["--checkpoint.initial_load_path", "nowhere"], "there is no nowhere; get it, or name the model: --model.flavor NAME"),
        (["--checkpoint.initial_load_path", "assets/Llama-2-7b-hf"], "--model.flavor llama2-7b --model"),
    ],
)
def test_mistake_is_a_sentence(tmp_path: Path, words: list[str], says: str) -> None:
    (tmp_path / "planned.toml").write_text(PLANNED)
    done = estimate(str(tmp_path / "planned.toml"), *words)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
