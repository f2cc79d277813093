"""Compiled layers: the numbers of the plain ones, on every layout; and a run stays as it began."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Run, run_processes, write_chats, write_toml

FLOAT64_RELATIVE = 1e-9
COMMON = ["--training.steps", "6", "--lr_scheduler.warmup_steps", "3", "--training.dtype", "float64"]
KINDS = {
    "full": [],
    "DoRA": ["--lora.enable", "--lora.rank", "4", "--lora.use_dora"],
    "recompute": ["--activation_checkpoint.mode", "full"],
    "unpacked": ["--dataset.no-packing"],
    "QLoRA": ["--lora.enable", "--lora.rank", "4", "--lora.quantize_base", "nf4", "--model.hidden_size", "64"],
}
LAYOUTS = {
    "one": (1, []),
    "shard": (2, []),
    "context": (2, ["--parallelism.context_parallel_degree", "2"]),
    "tensor": (2, ["--parallelism.tensor_parallel_degree", "2"]),
    "pipeline": (2, ["--parallelism.pipeline_parallel_degree", "2"]),
}
KINDS_OF = {"one": list(KINDS), "tensor": ["full", "DoRA", "recompute"]}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind on one process, not compiled."""
    folder = tmp_path_factory.mktemp("plain")
    extra = '[validation]\nenable = true\nfraction = 0.1\nfreq = 10\nprompts = ["say sage"]\nmax_new_tokens = 4\n'
    write_toml(folder / "tiny.toml", write_chats(folder / "chats.jsonl", 300), extra)
    run_processes([[str(folder / "tiny.toml"), "--job.dump_folder", str(folder / kind), *COMMON, *words] for kind, words in KINDS.items()], 1)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_layers_train_as_plain_ones(plain: Path, tmp_path: Path, layout: str) -> None:
    world_size, words = LAYOUTS[layout]
    kinds = KINDS_OF.get(layout, ["full", "DoRA"])
    common = [str(plain / "tiny.toml"), *COMMON, "--compile.enable", *words]
    run_processes([[*common, "--job.dump_folder", str(tmp_path / kind), *KINDS[kind]] for kind in kinds], world_size, timeout=800, warnings="default")
    for kind in kinds:
        expected, found = Run(plain / kind), Run(tmp_path / kind)
        for name in ("loss", "grad_norm", "validation_loss"):
            assert found.series(name) == pytest.approx(expected.series(name), rel=FLOAT64_RELATIVE), (kind, name)
        for name, weight in expected.weights().items():
            assert torch.linalg.norm(found.weights()[name] - weight) <= FLOAT64_RELATIVE * torch.linalg.norm(weight), (kind, name)
        assert found.samples() == expected.samples()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("default")
def test_layers_are_compiled_once_for_all_documents_and_a_resumed_run_stays_compiled(tmp_path: Path, train: Callable[..., Run]) -> None:
    from torch._dynamo.utils import counters

    toml = write_toml(tmp_path / "tiny.toml", write_chats(tmp_path / "chats.jsonl", 300))
    words = ["--checkpoint.enable_checkpoint", "--checkpoint.interval", "3"]
    counters.clear()
    run = train(toml, "--training.steps", "3", *words, "--compile.enable")
    graphs = counters["stats"]["unique_graphs"]
    assert 0 < graphs <= 8  # of a layer, whose code all layers share
    assert json.loads((run.folder / "checkpoint/step-3/state.json").read_text())["compiled"] is True
    torch._dynamo.reset()  # what this process has compiled would be found again
    counters.clear()
    resumed = train(toml, "--training.steps", "12", *words, folder=run.folder)  # "auto" is not to compile on a CPU
    assert 0 < counters["stats"]["unique_graphs"] <= 8
    assert json.loads((run.folder / "checkpoint/step-12/state.json").read_text())["compiled"] is True
    assert len(resumed.series("loss")) == 12
