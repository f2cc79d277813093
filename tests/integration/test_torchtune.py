"""torchtune reads what leaves here, in Hugging Face's names and in Meta's form, and computes the logits of transformers."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from assets.fetch_torchtune import fetch_torchtune
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tunelib.formats.convert import convert, plan_conversion

READER = Path(__file__).parent / "torchtune_reader.py"
pytestmark = pytest.mark.slow  # each reader takes seconds to import torchtune, which is fetched the first time

VOCAB_SIZE = 128
TOKENS = torch.randint(0, VOCAB_SIZE, (1, 96), generator=torch.Generator().manual_seed(1))
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
}


def rope_scaling(factor: float) -> dict[str, Any]:
    return {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


SHAPES: dict[str, dict[str, Any]] = {
    "Llama 3": SIZES,
    "Llama 3.1": SIZES | {"rope_scaling": rope_scaling(8.0)},
    "Llama 3.2": SIZES | {"rope_scaling": rope_scaling(32.0), "tie_word_embeddings": True},
}


def logits_of_torchtune(kind: str, folder: Path, files: list[str], sizes: dict[str, Any], tokens: Tensor, scratch: Path) -> Tensor:
    """Logits (1, S, V) that torchtune computes for tokens (1, S).

    Args:
        kind: "hf" or "meta".
        files: the weights, by their names in ``folder``.
        sizes: fields of a config.json; rope_theta and rope_scaling side by side.
        scratch: a folder beside ``folder``, not within it.
    """
    packages = fetch_torchtune()
    scratch.mkdir(parents=True, exist_ok=True)
    logits = scratch / "logits.pt"
    command = [sys.executable, str(READER), kind, str(folder), ",".join(files), json.dumps(sizes), json.dumps(tokens[0].tolist()), str(logits)]
    environment = os.environ | {"PYTHONPATH": str(packages), "HF_HUB_OFFLINE": "1"}
    finished = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240, check=False)
    assert finished.returncode == 0, finished.stdout[-6000:]
    return torch.load(logits, weights_only=True)


def make_reference(sizes: dict[str, Any]) -> LlamaForCausalLM:
    rope = {"rope_theta": sizes["rope_theta"], **(sizes["rope_scaling"] or {"rope_type": "default"})}
    others = {name: value for name, value in sizes.items() if name not in ("rope_theta", "rope_scaling")}
    torch.manual_seed(0)
    reference = LlamaForCausalLM(LlamaConfig(**others, rope_parameters=rope, initializer_range=0.1, pad_token_id=None)).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            if parameter.ndim == 1:  # norms are drawn as ones, which would hide them
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return reference


@pytest.mark.parametrize("shape", SHAPES)
def test_torchtune_reads_what_dcp_to_torch_makes_of_our_dcp_folder(tmp_path: Path, shape: str) -> None:
    sizes = SHAPES[shape]
    reference = make_reference(sizes)
    reference.save_pretrained(tmp_path / "hf")
    convert(plan_conversion(tmp_path / "hf", tmp_path / "dcp", "dcp"))
    words = [sys.executable, "-m", "torch.distributed.checkpoint.format_utils", "dcp_to_torch", str(tmp_path / "dcp"), str(tmp_path / "dcp/model.pt")]
    subprocess.run(words, check=True, capture_output=True, timeout=120)
    with torch.no_grad():
        expected = reference(TOKENS).logits
    found = logits_of_torchtune("hf", tmp_path / "dcp", ["model.pt"], sizes, TOKENS, tmp_path / "out")
    assert expected.abs().max() > 1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)  # float32, another order of summation


@pytest.mark.parametrize("shape", ["Llama 3", "Llama 3.1", "tied"])
def test_torchtune_reads_our_meta_folder(tmp_path: Path, shape: str) -> None:
    # params.json says factor 32 for Llama 3.2's own two shapes alone
    sizes = SHAPES["Llama 3.1"] | {"tie_word_embeddings": True} if shape == "tied" else SHAPES[shape]
    reference = make_reference(sizes)
    reference.save_pretrained(tmp_path / "hf")
    convert(plan_conversion(tmp_path / "hf", tmp_path / "meta", "meta"))
    with torch.no_grad():
        expected = reference(TOKENS).logits
    found = logits_of_torchtune("meta", tmp_path / "meta", ["consolidated.00.pth"], sizes, TOKENS, tmp_path / "out")
    assert expected.abs().max() > 1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)  # float32, another order of summation


def test_scaling_of_torchtune_shows_within_these_tokens(tmp_path: Path) -> None:
    """Else the comparisons above would say nothing about the factor."""
    sizes, folder = SHAPES["Llama 3.1"], tmp_path / "in"
    reference = make_reference(sizes)
    reference.config.save_pretrained(folder)
    torch.save(reference.state_dict(), folder / "model.pt")
    with torch.no_grad():
        expected = reference(TOKENS).logits
    unscaled = logits_of_torchtune("hf", folder, ["model.pt"], SHAPES["Llama 3"], TOKENS, tmp_path / "out")
    assert (unscaled - expected).abs().max() > 1e-2
