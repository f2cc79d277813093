"""Matrices decay, norms and biases do not; prepared state is what a real first step would make."""

import contextlib
import copy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import run_ranks
from torch import nn
from unit.samples import tiny_model

from tunelib.config.schema import Optimizer
from tunelib.errors import ConfigError
from tunelib.optimizer import build_optimizer, load_adamw8bit, prepare_state, set_lr, state_tensors

pytestmark = pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # torch.compile makes it
SECTIONS = {
    "AdamW": Optimizer(),
    "SGD": Optimizer(name="SGD"),
    "SGD with momentum": Optimizer(name="SGD", momentum=0.9),
    "AdamW8bit": Optimizer(name="AdamW8bit"),
}


def model_for(section: Optimizer, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A tiny one; where moments can have 8 bits, those of its matrices do, which are all of one shape: each shape is compiled."""
    wide = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 64, "num_key_value_heads": 4}
    return tiny_model(dtype, **(wide if section.name == "AdamW8bit" else {}))


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for number, parameter in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(number)
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    optimizer.step()
    optimizer.zero_grad()


def describe_state(optimizer: torch.optim.Optimizer) -> list[dict[str, tuple]]:
    """Of each parameter in the order of the groups: key → shape, type, device and stride."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    held = [dict(state_tensors(optimizer, of)) if of in optimizer.state else {} for of in parameters]
    return [{key: (value.shape, value.dtype, value.device, value.stride()) for key, value in state.items()} for state in held]


def test_every_parameter_is_in_one_group_and_only_matrices_decay() -> None:
    model = tiny_model(attention_bias=True, tie_word_embeddings=True)
    optimizer = build_optimizer(model, Optimizer(weight_decay=0.3))
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, kept = ({names[parameter] for parameter in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert decayed | kept == set(names.values())
    assert not decayed & kept
    assert kept == {name for name in names.values() if name.endswith(("norm.weight", ".bias"))}
    assert "model.embed_tokens.weight" in decayed


@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit", "SGD"])
def test_weight_decay_acts_on_matrices_and_not_on_norms(name: str) -> None:
    model = model_for(Optimizer(name=name))  # type: ignore[arg-type]  # a Literal
    optimizer = build_optimizer(model, Optimizer(name=name, lr=0.1, weight_decay=0.5))  # type: ignore[arg-type]  # a Literal
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with uncompiled(name):
        optimizer.step()
    for name, parameter in model.named_parameters():
        expected = before[name] * (1 - 0.1 * 0.5) if parameter.ndim == 2 else before[name]
        torch.testing.assert_close(parameter.detach(), expected)


def test_frozen_parameters_are_left_alone() -> None:
    model = tiny_model()
    model.lm_head.weight.requires_grad_(False)
    optimizer = build_optimizer(model, Optimizer())
    assert all(parameter is not model.lm_head.weight for group in optimizer.param_groups for parameter in group["params"])


def test_section_reaches_torch() -> None:
    adamw = build_optimizer(tiny_model(), Optimizer(lr=0.5, beta1=0.7, beta2=0.8, eps=1e-3))
    assert all((group["lr"], group["betas"], group["eps"]) == (0.5, (0.7, 0.8), 1e-3) for group in adamw.param_groups)
    sgd = build_optimizer(tiny_model(), Optimizer(name="SGD", lr=0.5, momentum=0.25))
    assert all((group["lr"], group["momentum"]) == (0.5, 0.25) for group in sgd.param_groups)
    small = build_optimizer(tiny_model(), Optimizer(name="AdamW8bit", lr=0.5, beta1=0.7, beta2=0.8, eps=1e-3))
    assert all((group["lr"], group["betas"], group["eps"]) == (0.5, (0.7, 0.8), 1e-3) for group in small.param_groups)


@contextlib.contextmanager
def uncompiled(name: str) -> Iterator[None]:
    """Without compiling AdamW8bit's step, which took most of the time of a test that does not look at it."""
    with torch.compiler.set_stance("force_eager") if name == "AdamW8bit" else contextlib.nullcontext():
        yield


def wide_model() -> nn.Module:
    """With matrices whose moments have 8 bits, one that is too small, and one whose rows are no multiple of a block."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 96), nn.Tanh(), nn.Linear(96, 128), nn.Tanh(), nn.Linear(128, 8, bias=False))


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """Losses of learning one fixed map."""
    inputs = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(steps):
        loss = (model(inputs) - inputs[:, :8].sin()).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
def test_moments_of_8_bits_train_as_well_in_a_quarter_of_the_memory() -> None:
    losses = {}
    for name in ("AdamW", "AdamW8bit"):
        model = wide_model()
        optimizer = build_optimizer(model, Optimizer(name=name, lr=3e-3))  # type: ignore[arg-type]  # a Literal
        losses[name] = learn(model, optimizer, 60)
    assert losses["AdamW8bit"][-1] == pytest.approx(losses["AdamW"][-1], rel=0.05)
    assert losses["AdamW"][-1] < losses["AdamW"][0] / 10
    assert isinstance(model, nn.Sequential)
    wide, uneven, small = model[0].weight, model[2].weight, model[4].weight
    held = dict(state_tensors(optimizer, wide))
    assert [(key, tensor.dtype, tuple(tensor.shape)) for key, tensor in held.items()] == [
        ("step", torch.float32, ()),
        ("exp_avg.codes", torch.uint8, (96, 128)),
        ("exp_avg.scale", torch.float32, (96, 2)),
        ("exp_avg_sq.codes", torch.uint8, (96, 128)),
        ("exp_avg_sq.scale", torch.float32, (96, 2)),
    ]
    assert sum(tensor.nbytes for tensor in held.values()) < 0.27 * 2 * wide.nbytes
    for other in (uneven, small):
        assert [key for key, _ in state_tensors(optimizer, other)] == ["step", "exp_avg", "exp_avg_sq"]


def test_state_of_8_bits_that_was_written_down_goes_on_bit_for_bit() -> None:
    whole, cut = wide_model(), wide_model()
    section = Optimizer(name="AdamW8bit", lr=3e-3)
    expected = learn(whole, build_optimizer(whole, section), 6)
    first, second = build_optimizer(cut, section), build_optimizer(cut, section)
    begun = learn(cut, first, 3)
    prepare_state(second)
    for parameter in cut.parameters():
        for (_, empty), (_, full) in zip(state_tensors(second, parameter), state_tensors(first, parameter), strict=True):
            empty.copy_(full)
    assert begun + learn(cut, second, 3) == expected


@pytest.mark.slow
def test_moments_of_8_bits_where_a_process_has_no_row(tmp_path: Path) -> None:
    """Two processes share a matrix of one row: the same training as in one, and the same codes."""
    program = """
import sys, torch, torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from tunelib.config.schema import Optimizer
from tunelib.optimizer import build_optimizer, state_tensors
world_size = int(sys.argv[1])
dist.init_process_group("gloo") if world_size > 1 else None
torch.manual_seed(0)
model = nn.Linear(4096, 1, bias=False)
inputs = torch.randn(8, 4096)
fully_shard(model) if world_size > 1 else None
optimizer = build_optimizer(model, Optimizer(name="AdamW8bit", lr=0.01))
for _ in range(3):
    (model(inputs) - 1).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
whole = {key: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for key, tensor in state_tensors(optimizer, model.weight)}
whole["weight"] = model.weight.detach().full_tensor() if world_size > 1 else model.weight.detach()
torch.save(whole, f"{sys.argv[2]}/{world_size}.pt")
dist.destroy_process_group() if world_size > 1 else None
"""
    (tmp_path / "program.py").write_text(program)
    for world_size in (1, 2):
        run_ranks(tmp_path / "program.py", [str(world_size), str(tmp_path)], world_size, timeout=240)
    one, two = (torch.load(tmp_path / f"{number}.pt") for number in (1, 2))
    assert one["exp_avg.codes"].shape == (1, 4096)
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        assert torch.equal(tensor, two[key]), key


def test_missing_torchao_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    load_adamw8bit.cache_clear()
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(ConfigError, match="torchao: pip install torchao"):
        build_optimizer(tiny_model(), Optimizer(name="AdamW8bit"))


@pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_prepared_state_is_what_a_first_step_would_make(section: Optimizer, dtype: torch.dtype) -> None:
    if section.name == "AdamW8bit" and dtype == torch.float64:
        pytest.skip("refused: it computes in float32")
    prepared, stepped = build_optimizer(model_for(section, dtype), section), build_optimizer(model := model_for(section, dtype), section)
    prepare_state(prepared)
    with uncompiled(section.name):
        take_step(model, stepped)
    assert describe_state(prepared) == describe_state(stepped)
    assert any("exp_avg.codes" in of for of in describe_state(prepared)) == (section.name == "AdamW8bit")


@pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS.keys())
def test_training_from_prepared_state_equals_training_from_none(section: Optimizer) -> None:
    fresh = model_for(section)
    prepared = copy.deepcopy(fresh)
    fresh_optimizer, prepared_optimizer = build_optimizer(fresh, section), build_optimizer(prepared, section)
    prepare_state(prepared_optimizer)
    for _ in range(3):
        take_step(fresh, fresh_optimizer)
        take_step(prepared, prepared_optimizer)
    for one, other in zip(fresh.parameters(), prepared.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS.keys())
def test_rate_is_the_one_that_was_set(section: Optimizer) -> None:
    model = model_for(section)
    optimizer = build_optimizer(model, section)
    set_lr(optimizer, 0.0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    take_step(model, optimizer)
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))
    set_lr(optimizer, 0.1)
    take_step(model, optimizer)
    assert not any(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))
