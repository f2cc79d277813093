"""Law 2: one TOML on one and on two processes is the same training."""

import shutil
from pathlib import Path
from typing import Any

import foreign
import pytest
import torch
from conftest import Run, count_traffic, open_train_data, run_processes, write_chats, write_toml

# fp32: two summation orders. float64: what is left is the law itself.
FP32_RELATIVE, FLOAT64_RELATIVE = 1e-5, 1e-9

CASES = {
    "fp32": [],
    "float64": ["--training.dtype", "float64"],
    "fp32_accumulation": ["--training.local_batch_size", "1"],
    "accumulation": ["--training.dtype", "float64", "--training.local_batch_size", "1"],
    "unpacked": ["--training.dtype", "float64", "--dataset.no-packing"],
    "never_reshard": ["--training.dtype", "float64", "--parallelism.fsdp_reshard_after_forward", "never"],
    "sgd": ["--training.dtype", "float64", "--optimizer.name", "SGD", "--optimizer.momentum", "0.9", "--optimizer.lr", "0.1"],
    "tied": ["--training.dtype", "float64", "--model.tie_word_embeddings"],
}


FULL = ["--training.dtype", "float64"]
LORA = [*FULL, "--lora.enable", "--lora.rank", "4", "--lora.use_dora"]
NF4 = [*FULL, "--lora.enable", "--lora.rank", "4", "--lora.quantize_base", "nf4"]
REPLICATE, CONTEXT = (["--parallelism.data_parallel_replicate_degree", "2"], ["--parallelism.context_parallel_degree", "2"])
TENSOR = ["--parallelism.tensor_parallel_degree", "2"]
PIPELINE = ["--parallelism.pipeline_parallel_degree", "2"]
LAYOUTS = {
    (2, "replicate"): REPLICATE,
    (2, "context"): CONTEXT,
    (2, "tensor"): TENSOR,
    (2, "pipeline"): PIPELINE,
    (4, "shard"): [],
    (4, "replicate, shard"): REPLICATE,
    (4, "context, shard"): CONTEXT,
    (4, "replicate, context"): [*REPLICATE, *CONTEXT],
    (4, "tensor, shard"): TENSOR,
    (4, "replicate, tensor"): [*REPLICATE, *TENSOR],
    (4, "context, tensor"): [*CONTEXT, *TENSOR],
    (4, "pipeline, shard"): PIPELINE,
    (4, "pipeline, replicate"): [*PIPELINE, *REPLICATE],
    (4, "pipeline, context"): [*PIPELINE, *CONTEXT],
    (4, "pipeline, tensor"): [*PIPELINE, *TENSOR],
    (8, "pipeline, shard, tensor"): [*PIPELINE, *TENSOR],
}
KINDS = {
    "full": FULL,
    "fp32": [],
    "LoRA": LORA,
    "QLoRA": NF4,
    "unpacked": [*FULL, "--dataset.no-packing"],
    "accumulation": [*FULL, "--training.local_batch_size", "1"],
    "tied": [*FULL, "--model.tie_word_embeddings"],
    "recompute": [*FULL, "--activation_checkpoint.mode", "full"],
}
EVERYWHERE = ("full", "LoRA")
"""What is trained on every layout; the other kinds on those of two processes and on one pair."""


def list_kinds(layout: str) -> list[str]:
    has_all = layout in ("one", "2 replicate", "2 context", "2 tensor", "2 pipeline", "4 context, tensor")
    refused = [kind for kind, degree in (("QLoRA", "tensor"), ("tied", "pipeline")) if degree in layout]  # by name
    return [kind for kind in KINDS if (has_all or kind in EVERYWHERE) and kind not in refused]


COMMON = ["--training.steps", "10", "--lr_scheduler.warmup_steps", "3", "--checkpoint.enable_checkpoint", "--checkpoint.interval", "5"]


class Grid:
    """Every kind of training on one process, and on every layout; each layout is run when it is first asked for,
    once for what is trained everywhere and once for the rest.

    The processes of one layout run nothing else: torch remembers how it spread what over which groups.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        data = write_chats(folder / "chats.jsonl", 300)
        extra = '[validation]\nenable = true\nfraction = 0.1\nfreq = 10\nprompts = ["say sage"]\nmax_new_tokens = 4\n'
        self.toml = write_toml(folder / "tiny.toml", data, extra)
        self._done: set[tuple[str, bool]] = set()

    def run(self, layout: str, kind: str) -> Run:
        asked = (layout, kind in EVERYWHERE)
        if asked not in self._done:
            size, words = next(((size, words) for (size, name), words in LAYOUTS.items() if f"{size} {name}" == layout), (1, []))
            run_processes([self._words(layout, name, words) for name in list_kinds(layout) if (name in EVERYWHERE) == asked[1]], size, timeout=400)
            self._done.add(asked)
        return Run(self.folder / f"{layout}-{kind}")

    def _words(self, layout: str, kind: str, words: list[str]) -> list[str]:
        wide = ["--model.hidden_size", "64"] if kind == "QLoRA" else []
        return [str(self.toml), "--job.dump_folder", str(self.folder / f"{layout}-{kind}"), *COMMON, *KINDS[kind], *wide, *words]


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Grid:
    return Grid(tmp_path_factory.mktemp("grid"))


GRID = [
    pytest.param(f"{size} {name}", kind, marks=[pytest.mark.slow] if size > 2 or name == "replicate" or kind not in EVERYWHERE else [])
    for size, name in LAYOUTS
    for kind in list_kinds(f"{size} {name}")
]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("layout", "kind"), GRID)
def test_every_layout_trains_as_one_process(grid: Grid, layout: str, kind: str) -> None:
    compare(grid.run("one", kind), grid.run(layout, kind), FP32_RELATIVE if kind == "fp32" else FLOAT64_RELATIVE)


def compare(one: Run, spread: Run, tolerance: float) -> None:
    """The same run on other processes: losses, norms, samples and, in float64, the final weights."""
    for name in ("loss", "grad_norm", "validation_loss"):
        assert len(one.series(name)) == (2 if name == "validation_loss" else 10)
        assert spread.series(name) == pytest.approx(one.series(name), rel=tolerance), name
    assert one.series("loss")[-1] < one.series("loss")[0], "nothing was learned, so nothing was compared"
    assert spread.series("tokens") == one.series("tokens")
    assert spread.samples() == one.samples()
    if tolerance == FLOAT64_RELATIVE:
        for name, weight in one.weights().items():
            assert torch.linalg.norm(spread.weights()[name] - weight) <= FLOAT64_RELATIVE * torch.linalg.norm(weight), name


# Saved on one layout, resumed on another; "one" is one process.
MOVES = {
    1: [("2 context", [])],
    2: [
        ("one", TENSOR),
        ("4 context, tensor", []),
        ("one", CONTEXT),
        ("4 replicate, shard", CONTEXT),
        ("4 shard", REPLICATE),
        ("4 replicate, context", []),
        ("2 tensor", PIPELINE),
        ("2 pipeline", CONTEXT),
    ],
    4: [
        ("one", [*PIPELINE, *TENSOR]),
        ("4 pipeline, shard", [*CONTEXT, *TENSOR]),
        ("2 tensor", TENSOR),
        ("2 replicate", CONTEXT),
        ("2 context", [*REPLICATE, *CONTEXT]),
        ("one", REPLICATE),
    ],
}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", EVERYWHERE)
@pytest.mark.parametrize("world_size", MOVES)
def test_run_saved_on_one_layout_goes_on_on_another(grid: Grid, tmp_path: Path, world_size: int, kind: str) -> None:
    cases = []
    for number, (saved, layout) in enumerate(MOVES[world_size]):
        run = grid.run(saved, kind)
        shutil.copytree(run.folder / "checkpoint/step-5", tmp_path / str(number) / "checkpoint/step-5")
        cases.append([str(grid.toml), "--job.dump_folder", str(tmp_path / str(number)), *COMMON, *KINDS[kind], *layout])
    run_processes(cases, world_size, timeout=300)
    for number, (saved, _) in enumerate(MOVES[world_size]):
        assert Run(tmp_path / str(number)).series("loss") == pytest.approx(grid.run("one", kind).series("loss")[5:], rel=FLOAT64_RELATIVE), saved


SCHEDULES = ("GPipe", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
FOUR_LAYERS = ["--model.num_hidden_layers", "4"]
UNEVEN = ["--parallelism.pipeline_parallel_split_points", "layers.3"]
PIPELINES = {
    **{f"{schedule}, {kind}": (schedule, kind, []) for schedule in SCHEDULES for kind in ("full", "LoRA")},
    **{f"{schedule}, recompute": (schedule, "recompute", []) for schedule in ("ZBVZeroBubble", "Interleaved1F1B")},
    "1F1B, three layers and one": ("1F1B", "full", UNEVEN),
    "1F1B, each micro-batch gathers again": ("1F1B", "full", ["--parallelism.fsdp_reshard_after_forward", "always"]),
}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_schedule_trains_as_one_process(grid: Grid, tmp_path: Path) -> None:
    """Four layers on one process, and on two in the order of each schedule."""
    common = [str(grid.toml), *COMMON, *FOUR_LAYERS]
    kinds = dict.fromkeys(kind for _, kind, _ in PIPELINES.values())
    run_processes([[*common, "--job.dump_folder", str(tmp_path / kind), *KINDS[kind]] for kind in kinds], 1)
    cases = []
    for name, (schedule, kind, words) in PIPELINES.items():
        order = ["--parallelism.pipeline_parallel_schedule", schedule]
        cases.append([*common, "--job.dump_folder", str(tmp_path / name), *KINDS[kind], *PIPELINE, *order, *words])
    run_processes(cases, 2, timeout=400)
    for name, (_, kind, _) in PIPELINES.items():
        compare(Run(tmp_path / kind), Run(tmp_path / name), FLOAT64_RELATIVE)


LAYERS = 2
GATHERED = 2 * LAYERS + 1  # every layer before its forward and its backward pass, the rest once
TRAFFIC: dict[str, tuple[int, dict[str, int], dict[str, int]]] = {
    "shard": (2, {}, {"all_gather": GATHERED, "reduce_scatter": LAYERS + 1}),
    "replicate": (2, {"data_parallel_replicate_degree": 2}, {"all_gather": 0, "reduce_scatter": 0, "all_reduce": LAYERS + 1}),
    "replicate, shard": (
        4,
        {"data_parallel_replicate_degree": 2},
        {"all_gather": GATHERED, "reduce_scatter": LAYERS + 1, "all_reduce": LAYERS + 1},
    ),
    # A gather before attention and feed-forward, a scatter after each, and the reverse going back; embedding, head, norms, 2 of the loss.
    "tensor": (
        2,
        {"tensor_parallel_degree": 2},
        {"all_gather": 4 * LAYERS + 2, "reduce_scatter": 4 * LAYERS + 2, "all_reduce": 2 * LAYERS + 1 + 2},
    ),
    "context": (2, {"context_parallel_degree": 2}, {"all_gather": GATHERED + LAYERS, "reduce_scatter": 2 * LAYERS + 1}),
}


@pytest.mark.parametrize("layout", TRAFFIC)
def test_every_collective_of_a_step_is_one_that_theory_asks_for(tmp_path: Path, layout: str) -> None:
    foreign.make_hf(tmp_path / "hf", num_hidden_layers=LAYERS)
    world_size, degrees, expected = TRAFFIC[layout]
    for found in count_traffic(tmp_path / "hf", world_size, degrees, {}):
        calls = {kind: entry[0] for kind, entry in found["sent"].items()}
        assert calls == {kind: count for kind, count in expected.items() if count}, found


class Pairs:
    """Every case on one and on two processes, each run when it is first asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        data = write_chats(folder / "chats.jsonl", 300)
        extra = '[validation]\nenable = true\nfraction = 0.1\nfreq = 10\nprompts = ["say sage"]\nmax_new_tokens = 4\n'
        self.toml = write_toml(folder / "tiny.toml", data, extra)

    def run(self, case: str, world_size: int) -> Run:
        target = self.folder / f"{case}-{world_size}"
        if not target.exists():
            steps = ["--training.steps", "20", "--lr_scheduler.warmup_steps", "3"]
            run_processes([[str(self.toml), "--job.dump_folder", str(target), *steps, *CASES[case]]], world_size)
        return Run(target)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    return Pairs(tmp_path_factory.mktemp("layouts"))


def cases_but(*left_out: str) -> list[Any]:
    """All cases but some, with the mark of the slow ones."""
    slow = ("fp32_accumulation", "unpacked", "tied", "never_reshard")
    return [pytest.param(case, marks=[pytest.mark.slow] if case in slow else []) for case in CASES if case not in left_out]


@pytest.mark.parametrize("case", cases_but())
def test_two_processes_train_as_one(pairs: Pairs, case: str) -> None:
    one, two = pairs.run(case, 1), pairs.run(case, 2)
    tolerance = FP32_RELATIVE if case.startswith("fp32") else FLOAT64_RELATIVE
    for name in ("loss", "grad_norm", "validation_loss"):
        expected, found = one.series(name), two.series(name)
        assert len(expected) == (3 if name == "validation_loss" else 20)
        assert found == pytest.approx(expected, rel=tolerance), name
    assert one.series("loss")[-1] < 0.9 * one.series("loss")[0], "nothing was learned, so nothing was compared"
    assert two.series("tokens") == one.series("tokens")
    assert two.samples() == one.samples()


@pytest.mark.parametrize("case", cases_but("fp32", "fp32_accumulation"))
def test_two_processes_end_with_the_same_weights(pairs: Pairs, case: str) -> None:
    one, two = pairs.run(case, 1).weights(), pairs.run(case, 2).weights()
    assert one.keys() == two.keys()
    for name, weight in one.items():
        assert weight.dtype == torch.float64
        assert torch.linalg.norm(two[name] - weight) <= FLOAT64_RELATIVE * torch.linalg.norm(weight), name


def test_micro_batches_do_not_change_training(pairs: Pairs) -> None:
    whole, in_parts = pairs.run("float64", 1), pairs.run("accumulation", 2).weights()
    assert pairs.run("accumulation", 1).series("loss") == pytest.approx(whole.series("loss"), rel=FLOAT64_RELATIVE)
    for name, weight in whole.weights().items():
        assert torch.linalg.norm(in_parts[name] - weight) <= FLOAT64_RELATIVE * torch.linalg.norm(weight)


def test_rows_hold_uneven_numbers_of_trained_tokens(tmp_path: Path) -> None:
    """The cases above would not notice a mean of means if all rows trained as many tokens."""
    data = open_train_data(write_chats(tmp_path / "chats.jsonl", 300))
    trained = [int(data.index.num_trained[row].sum()) for _, row in data.rows_of(1)]
    assert max(trained) > 1.5 * min(trained)
