"""A run's state is flat tensors by name and a few facts in JSON; saved and loaded, the run goes on bit for bit."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from unit.samples import tiny_model

from tunelib.checkpoint.dcp_reader import load_tensors
from tunelib.checkpoint.dcp_writer import save_tensors
from tunelib.checkpoint.state import RunState, model_tensors, optimizer_tensors, read_run_state, restore_rng, rng_tensors, tensors_to_load
from tunelib.config.schema import Optimizer
from tunelib.errors import CheckpointError
from tunelib.model.decoder import Decoder
from tunelib.optimizer import build_optimizer

CPU = torch.device("cpu")
SECTIONS = {"AdamW": Optimizer(lr=0.1), "SGD": Optimizer(name="SGD", lr=0.1), "SGD with momentum": Optimizer(name="SGD", lr=0.1, momentum=0.9)}


def take_step(model: Decoder, optimizer: torch.optim.Optimizer, number: int) -> None:
    tokens = torch.randint(0, 48, (1, 6), generator=torch.Generator().manual_seed(number))
    model(tokens, torch.arange(6)[None], (6,), labels=tokens.roll(-1, 1)).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_names_are_flat_and_a_tied_weight_is_there_once() -> None:
    model = tiny_model(tie_word_embeddings=True)
    optimizer = build_optimizer(model, Optimizer())
    tensors = tensors_to_load(model, optimizer, 0, CPU, same_layout=True)
    names = {name for name, _ in model.named_parameters()}
    assert "lm_head.weight" not in tensors
    assert set(tensors) == names | {f"optimizer.{name}.{key}" for name in names for key in ("step", "exp_avg", "exp_avg_sq")} | {"rng.0.cpu"}
    assert "rng.0.cpu" not in tensors_to_load(model, optimizer, 0, CPU, same_layout=False)


def test_tensors_are_the_models_storage_and_not_copies() -> None:
    model = tiny_model()
    model_tensors(model)["lm_head.weight"].zero_()
    assert (model.lm_head.weight == 0).all()


@pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS.keys())
def test_resumed_training_equals_uninterrupted_training(tmp_path: Path, section: Optimizer) -> None:
    model = tiny_model(torch.float32)
    optimizer = build_optimizer(model, section)
    for number in range(3):
        take_step(model, optimizer, number)
    save_tensors(model_tensors(model) | optimizer_tensors(model, optimizer), tmp_path / "step-3")
    resumed = tiny_model(torch.float32, seed=9)
    resumed_optimizer = build_optimizer(resumed, section)
    load_tensors(tensors_to_load(resumed, resumed_optimizer, 0, CPU, same_layout=False), tmp_path / "step-3")
    for number in range(3, 6):
        take_step(model, optimizer, number)
        take_step(resumed, resumed_optimizer, number)
    for (name, one), (_, other) in zip(model.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_random_state_goes_on_where_it_was() -> None:
    torch.manual_seed(3)
    kept = {name: tensor.clone() for name, tensor in rng_tensors(1, CPU).items()}
    expected = torch.rand(4)
    torch.manual_seed(8)
    restore_rng(kept, 1, CPU)
    assert torch.equal(torch.rand(4), expected)


def test_facts_survive_json(tmp_path: Path) -> None:
    state = RunState(7, 700, 2, "cpu", {"model": {"hidden_size": 4}, "validation.fraction": None, "rope_theta": 5e5})
    (tmp_path / "state.json").write_text(state.to_json())
    assert read_run_state(tmp_path) == state


@pytest.mark.parametrize(
    ("name", "value"),
    [("step", "4"), ("step", True), ("step", None), ("identity", []), ("device", 1), ("passed_over", {}), ("validation_loss", "low")],
)
def test_facts_of_another_type_are_named(tmp_path: Path, name: str, value: object) -> None:
    fields = asdict(RunState(4, 100, 1, "cpu", {}))
    (tmp_path / "state.json").write_text(json.dumps(fields | {name: value}))
    with pytest.raises(CheckpointError, match=rf"state\.json cannot be read: {name} is "):
        read_run_state(tmp_path)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "3", '{"step": 1}', '{"step": 1, "tokens_seen": 1, "world_size": 1, "identity": {}, "more": 1}', "[" * 100_000]
)
def test_broken_facts_are_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"state\.json cannot be read"):
        read_run_state(tmp_path)
