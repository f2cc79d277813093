"""Every family computes what transformers computes: logits, loss and gradients, beyond the window where there is one; and leaves as it came."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from families import CASES, FIRST_CASES, WINDOW, make_family
from parity.test_llama import load_ours, run_ours
from parity.test_peft import load_ours as load_adapted
from safetensors.torch import load_file

from tunelib.batch import IGNORED
from tunelib.config.schema import Lora, Model
from tunelib.formats.convert import convert, plan_conversion
from tunelib.formats.load import find_weights, plan_export_of
from tunelib.formats.peft import export_adapter
from tunelib.formats.prove import export_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::DeprecationWarning", "ignore::FutureWarning:transformers")
LENGTHS = (17, 1, 30)


def draw_tokens(length: int, rows: int = 2) -> torch.Tensor:
    return torch.randint(0, 128, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients_equal_those_of_transformers(tmp_path: Path, case: str) -> None:
    reference = make_family(tmp_path, case)
    ours = load_ours(tmp_path)
    tokens = draw_tokens(48)
    assert WINDOW < 48
    labels = tokens.roll(-1, dims=1)
    labels[:, ::3] = IGNORED
    labels[:, -1] = IGNORED
    logits = reference(tokens).logits
    with torch.no_grad():
        assert logits.abs().max() > 1  # logits that a difference would show in
        torch.testing.assert_close(run_ours(ours, tokens), logits.detach(), rtol=0, atol=1e-4)  # float32, another order of summation
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    found = run_ours(ours, tokens, labels)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    found.backward()
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    largest = max(torch.linalg.vector_norm(parameter.grad).item() for parameter in reference.parameters())
    for name, parameter in reference.named_parameters():  # of k's bias it is 0 but for rounding
        difference = torch.linalg.vector_norm(gradients.pop(name) - parameter.grad)
        assert difference < 1e-4 * torch.linalg.vector_norm(parameter.grad) + 1e-6 * largest, name
    assert not gradients


@pytest.mark.parametrize("case", CASES)
def test_packed_row_equals_documents_alone_in_transformers(tmp_path: Path, case: str) -> None:
    reference = make_family(tmp_path, case)
    tokens = draw_tokens(sum(LENGTHS), rows=1)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    with torch.no_grad():
        packed = load_ours(tmp_path)(tokens, positions, LENGTHS)
        alone = torch.cat([reference(piece).logits for piece in tokens.split(LENGTHS, dim=1)], dim=1)
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-4)


def read_tensors(folder: Path) -> dict[str, Any]:
    """By file and name, with types and bits."""
    files = sorted(folder.glob("*.safetensors"))
    return {file.name: {name: (tensor.dtype, tensor.view(torch.uint8)) for name, tensor in load_file(file).items()} for file in files}


@pytest.mark.parametrize("case", CASES)
def test_weights_leave_as_they_came(tmp_path: Path, case: str) -> None:
    """Through a model and its proven export, and through another form and back."""
    make_family(tmp_path / "hf", case)
    weights, model = find_weights(Model(), str(tmp_path / "hf"), 0, 0), load_ours(tmp_path / "hf")
    plan = plan_export_of(model, weights, None, None, frozenset(), None)
    facts = export_model(plan, model, tmp_path / "export", True, None, check=True, sharded=False)
    assert facts["logits"]["largest_difference_from_trained_model"] < 1e-4
    convert(plan_conversion(tmp_path / "hf", tmp_path / "dcp", "dcp"))
    convert(plan_conversion(tmp_path / "dcp", tmp_path / "back", "hf", like_path=tmp_path / "hf"))
    expected = read_tensors(tmp_path / "hf")
    for folder in ("export", "back"):
        found = read_tensors(tmp_path / folder)
        assert found.keys() == expected.keys()
        for file, tensors in expected.items():
            assert found[file].keys() == tensors.keys()
            assert all(found[file][name][0] == dtype and torch.equal(found[file][name][1], bits) for name, (dtype, bits) in tensors.items())
        assert json.loads((tmp_path / folder / "config.json").read_text()) == json.loads((tmp_path / "hf/config.json").read_text())


@pytest.mark.parametrize("case", FIRST_CASES)
def test_adapters_of_all_linear_layers_open_in_peft(tmp_path: Path, case: str) -> None:
    make_family(tmp_path / "hf", case)
    section = Lora(True, rank=4, alpha=8.0)
    model = load_adapted(tmp_path / "hf", section)
    chance = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B.weight"):
                parameter.copy_(torch.randn(parameter.shape, generator=chance) * 0.1)
    export_adapter(model, section, str(tmp_path / "hf"), "", None, tmp_path / "adapter", True)
    targets = json.loads((tmp_path / "adapter/adapter_config.json").read_text())["target_modules"]
    fused = ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]
    assert targets == (fused if case == "Phi-3" else ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"])
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    tokens = draw_tokens(40, rows=1)
    with torch.no_grad():
        before = base(tokens).logits
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")(tokens).logits
        assert (adapted - before).abs().max() > 0.05
        torch.testing.assert_close(run_ours(model, tokens), adapted, rtol=0, atol=1e-4)
