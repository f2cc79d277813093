"""Law 2: one TOML on one and on two processes is the same training."""

from pathlib import Path

import pytest
import torch
from conftest import Run, open_train_data, run_processes, write_chats, write_toml

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
LAYOUTS = {
    (2, "replicate"): REPLICATE,
    (2, "context"): CONTEXT,
    (4, "shard"): [],
    (4, "replicate, shard"): REPLICATE,
    (4, "context, shard"): CONTEXT,
    (4, "replicate, context"): [*REPLICATE, *CONTEXT],
}
KINDS = {
    "full": FULL,
    "fp32": [],
    "LoRA": LORA,
    "QLoRA": NF4,
    "unpacked": [*FULL, "--dataset.no-packing"],
    "accumulation": [*FULL, "--training.local_batch_size", "1"],
    "tied": [*FULL, "--model.tie_word_embeddings"],
}
COMMON = ["--training.steps", "10", "--lr_scheduler.warmup_steps", "3"]


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Run]:
    """Every kind of training on one process, and on every layout."""
    folder = tmp_path_factory.mktemp("grid")
    data = write_chats(folder / "chats.jsonl", 300)
    extra = '[validation]\nenable = true\nfraction = 0.1\nfreq = 10\nprompts = ["say sage"]\nmax_new_tokens = 4\n'
    toml = write_toml(folder / "tiny.toml", data, extra)

    def words_of(name: str, kind: str, layout: list[str]) -> list[str]:
        wide = ["--model.hidden_size", "64"] if kind == "QLoRA" else []
        return [str(toml), "--job.dump_folder", str(folder / f"{name}-{kind}"), *COMMON, *KINDS[kind], *wide, *layout]

    run_processes([words_of("one", kind, []) for kind in KINDS], 1)
    for world_size in (2, 4):
        cases = [words_of(f"{world_size} {name}", kind, layout) for (size, name), layout in LAYOUTS.items() if size == world_size for kind in KINDS]
        run_processes(cases, world_size, timeout=600)
    names = ["one", *(f"{size} {name}" for size, name in LAYOUTS)]
    return {(name, kind): Run(folder / f"{name}-{kind}") for name in names for kind in KINDS}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", [f"{size} {name}" for size, name in LAYOUTS])
def test_every_layout_trains_as_one_process(grid: dict[tuple[str, str], Run], layout: str, kind: str) -> None:
    one, spread = grid["one", kind], grid[layout, kind]
    tolerance = FP32_RELATIVE if kind == "fp32" else FLOAT64_RELATIVE
    for name in ("loss", "grad_norm", "validation_loss"):
        assert len(one.series(name)) == (2 if name == "validation_loss" else 10)
        assert spread.series(name) == pytest.approx(one.series(name), rel=tolerance), name
    assert one.series("loss")[-1] < one.series("loss")[0], "nothing was learned, so nothing was compared"
    assert spread.series("tokens") == one.series("tokens")
    assert spread.samples() == one.samples()
    if kind != "fp32":
        for name, weight in one.weights().items():
            assert torch.linalg.norm(spread.weights()[name] - weight) <= FLOAT64_RELATIVE * torch.linalg.norm(weight), name


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Run]:
    """Every case on one and on two processes."""
    folder = tmp_path_factory.mktemp("layouts")
    data = write_chats(folder / "chats.jsonl", 300)
    extra = '[validation]\nenable = true\nfraction = 0.1\nfreq = 10\nprompts = ["say sage"]\nmax_new_tokens = 4\n'
    toml = write_toml(folder / "tiny.toml", data, extra)
    for world_size in (1, 2):
        words = [
            [
                str(toml),
                "--job.dump_folder",
                str(folder / f"{name}-{world_size}"),
                "--training.steps",
                "20",
                "--lr_scheduler.warmup_steps",
                "3",
                *case,
            ]
            for name, case in CASES.items()
        ]
        run_processes(words, world_size)
    return {(name, world_size): Run(folder / f"{name}-{world_size}") for name in CASES for world_size in (1, 2)}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(runs: dict[tuple[str, int], Run], case: str) -> None:
    one, two = runs[case, 1], runs[case, 2]
    tolerance = FP32_RELATIVE if case.startswith("fp32") else FLOAT64_RELATIVE
    for name in ("loss", "grad_norm", "validation_loss"):
        expected, found = one.series(name), two.series(name)
        assert len(expected) == (3 if name == "validation_loss" else 20)
        assert found == pytest.approx(expected, rel=tolerance), name
    assert one.series("loss")[-1] < 0.9 * one.series("loss")[0], "nothing was learned, so nothing was compared"
    assert two.series("tokens") == one.series("tokens")
    assert two.samples() == one.samples()


@pytest.mark.parametrize("case", [name for name in CASES if not name.startswith("fp32")])
def test_two_processes_end_with_the_same_weights(runs: dict[tuple[str, int], Run], case: str) -> None:
    one, two = runs[case, 1].weights(), runs[case, 2].weights()
    assert one.keys() == two.keys()
    for name, weight in one.items():
        assert weight.dtype == torch.float64
        assert torch.linalg.norm(two[name] - weight) <= FLOAT64_RELATIVE * torch.linalg.norm(weight), name


def test_micro_batches_do_not_change_training(runs: dict[tuple[str, int], Run]) -> None:
    assert runs["accumulation", 1].series("loss") == pytest.approx(runs["float64", 1].series("loss"), rel=FLOAT64_RELATIVE)
    for name, weight in runs["float64", 1].weights().items():
        assert torch.linalg.norm(runs["accumulation", 2].weights()[name] - weight) <= FLOAT64_RELATIVE * torch.linalg.norm(weight)


def test_rows_hold_uneven_numbers_of_trained_tokens(tmp_path: Path) -> None:
    """The cases above would not notice a mean of means if all rows trained as many tokens."""
    data = open_train_data(write_chats(tmp_path / "chats.jsonl", 300))
    trained = [int(data.index.num_trained[row].sum()) for _, row in data.rows_of(1)]
    assert max(trained) > 1.5 * min(trained)
