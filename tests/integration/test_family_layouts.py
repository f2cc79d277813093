"""Law 2 for every family: the same training on one and on two processes, of weights that transformers wrote."""

from pathlib import Path

import pytest
from conftest import TOKENIZER, Run, run_processes, write_chats
from families import CASES, FIRST_CASES, make_family

FLOAT64_RELATIVE, FLOAT32_ROUNDING = 1e-9, 1e-7
STEPS = 3
LAYOUTS = {
    "shard": [],
    "tensor": ["--parallelism.tensor_parallel_degree", "2"],
    "context": ["--parallelism.context_parallel_degree", "2"],
    "pipeline": ["--parallelism.pipeline_parallel_degree", "2"],
}
LORA = ["--lora.enable", "--lora.rank", "4", "--lora.use_dora"]
CASES_OF = {
    "shard": FIRST_CASES,
    "tensor": [*FIRST_CASES, "Phi-3, DoRA", "OLMo 2, DoRA"],
    "context": ["Mistral", "Gemma 2"],
    "pipeline": [case for case in FIRST_CASES if not CASES[case][1].get("tie_word_embeddings")],
}


FAST = (("tensor", "Phi-3"), ("tensor", "OLMo 2"), ("context", "Gemma 2"))
"""Fused projections, norms over all heads, windows with capped scores: what is most particular on a layout."""


class OnOne:
    """Every case on one process, run when it is first asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        data = write_chats(folder / "chats.jsonl", 80)
        self.toml = folder / "run.toml"
        self.toml.write_text(
            f"""
[dataset]
path = "{data}"
[training]
seq_len = 128
steps = {STEPS}
dtype = "float64"
[optimizer]
lr = 1e-2  # large: a difference must show
[validation]
enable = true
fraction = 0.1
freq = 10
prompts = ["say sage"]
max_new_tokens = 4
"""
        )

    def words(self, case: str, target: Path) -> list[str]:
        """For a run of a case, whose weights are made when they are first asked for."""
        family, _, lora = case.partition(",")
        weights = self.folder / "hf" / family
        if not weights.exists():
            make_family(weights, family, tokenizer=TOKENIZER)
        return [str(self.toml), "--job.dump_folder", str(target), "--checkpoint.initial_load_path", str(weights), *(LORA if lora else [])]

    def run(self, case: str) -> Run:
        target = self.folder / "runs" / case
        if not target.exists():
            run_processes([self.words(case, target)], 1)
        return Run(target)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> OnOne:
    return OnOne(tmp_path_factory.mktemp("one"))


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("layout", "case"),
    [pytest.param(layout, case, marks=[] if (layout, case) in FAST else [pytest.mark.slow]) for layout in LAYOUTS for case in CASES_OF[layout]],
)
def test_two_processes_train_every_family_as_one(one: OnOne, tmp_path: Path, layout: str, case: str) -> None:
    run_processes([[*one.words(case, tmp_path), *LAYOUTS[layout]]], 2, timeout=400)
    expected, found = one.run(case), Run(tmp_path)
    for name in ("loss", "grad_norm", "validation_loss"):
        assert len(expected.series(name)) == (2 if name == "validation_loss" else STEPS)
        assert found.series(name) == pytest.approx(expected.series(name), rel=FLOAT64_RELATIVE), name
    assert expected.series("loss")[-1] < expected.series("loss")[0], "nothing was learned, so nothing was compared"
    assert found.samples() == expected.samples()
    for name, weight in expected.weights().items():
        assert (found.weights()[name] - weight).norm() <= FLOAT32_ROUNDING * weight.norm(), name  # as they leave, in the base's type


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("layout", ["one", "tensor"])
def test_compiled_layers_of_every_family_train_as_plain_ones(one: OnOne, tmp_path: Path, layout: str) -> None:
    """Each in two whole graphs: what breaks one is an error."""
    words = ["--compile.enable", *LAYOUTS.get(layout, [])]
    cases = [[*one.words(case, tmp_path / case), *words] for case in FIRST_CASES]
    run_processes(cases, 2 if layout == "tensor" else 1, timeout=1400, warnings="default")
    for case in FIRST_CASES:
        expected, found = one.run(case), Run(tmp_path / case)
        for name in ("loss", "grad_norm", "validation_loss"):
            assert found.series(name) == pytest.approx(expected.series(name), rel=FLOAT64_RELATIVE), (case, name)
