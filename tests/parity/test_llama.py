"""Our decoder computes what transformers' does: logits and gradients, for weights that travelled through a saved folder."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tunelib.batch import IGNORED
from tunelib.config.schema import ActivationCheckpoint, Model, Parallelism
from tunelib.formats.load import check_weights, find_weights, give_weights
from tunelib.model.decoder import Decoder, build_on_meta
from tunelib.parallel.apply import spread_model
from tunelib.parallel.mesh import build_layout
from tunelib.parallel.runtime import Runtime

CPU = torch.device("cpu")
SMOLLM2 = Path(__file__).parents[2] / "assets/SmolLM2-135M-Instruct"

SMALL: dict[str, Any] = {"vocab_size": 128, "num_hidden_layers": 3, "initializer_range": 0.1, "pad_token_id": None}


def llama3_rope(factor: float) -> dict[str, Any]:
    """Llama 3.1's scaling with a context of 64, so that a sequence of 96 meets kept, blended and slowed rotations."""
    scaling = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    return {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500_000.0, **scaling}}


SHAPES: dict[str, dict[str, Any]] = {
    "Llama 2": {"hidden_size": 64, "intermediate_size": 172, "num_attention_heads": 4, "num_key_value_heads": 4},
    "Llama 3.1": {"hidden_size": 64, "intermediate_size": 224, "num_attention_heads": 8, "num_key_value_heads": 2, **llama3_rope(8.0)},
    "Llama 3.2": {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "tie_word_embeddings": True,
        **llama3_rope(32.0),
    },
    "TinyLlama": {"hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 16, "num_key_value_heads": 2, "rms_norm_eps": 1e-5},
    "with biases": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attention_bias": True,
        "mlp_bias": True,
    },
}


def load_ours(folder: Path) -> Decoder:
    """The calls that train.py makes."""
    weights = find_weights(Model(), str(folder), vocab_size=0, seq_len=0)
    model = build_on_meta(weights.config, torch.float32)
    check_weights(weights)
    runtime = Runtime(0, 1, CPU, torch.float32, torch.float32, torch.float32)
    spread_model(model, Parallelism(), ActivationCheckpoint(), build_layout(Parallelism(), runtime), runtime)
    give_weights(model, weights, seed=0)
    return model


def make_pair(folder: Path, shape: str) -> tuple[LlamaForCausalLM, Decoder]:
    torch.manual_seed(0)
    reference = LlamaForCausalLM(LlamaConfig(**SMALL, **SHAPES[shape])).eval()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if parameter.ndim == 1:  # norms are drawn as ones and biases as zeros, which would hide them
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
            assert parameter.abs().sum() > 0, name
    reference.save_pretrained(folder, max_shard_size="100KB")
    return reference, load_ours(folder)


def draw_tokens(vocab_size: int, length: int) -> torch.Tensor:
    return torch.randint(0, vocab_size, (2, length), generator=torch.Generator().manual_seed(1))


def run_ours(model: Decoder, tokens: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
    length = tokens.shape[1]
    return model(tokens, torch.arange(length).expand_as(tokens), (length,) * len(tokens), labels=labels)


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_those_of_transformers(tmp_path: Path, shape: str) -> None:
    reference, ours = make_pair(tmp_path, shape)
    tokens = draw_tokens(128, 96)
    with torch.no_grad():
        expected, found = reference(tokens).logits, run_ours(ours, tokens)
    assert expected.abs().max() > 1  # logits that a difference would show in
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)  # float32, another order of summation


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_equal_those_of_transformers(tmp_path: Path, shape: str) -> None:
    reference, ours = make_pair(tmp_path, shape)
    tokens = draw_tokens(128, 48)
    labels = tokens.roll(-1, dims=1)
    labels[:, ::3] = IGNORED
    labels[:, -1] = IGNORED
    F.cross_entropy(reference(tokens).logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum").backward()
    run_ours(ours, tokens, labels).backward()
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    for name, parameter in reference.named_parameters():
        difference = torch.linalg.vector_norm(gradients.pop(name) - parameter.grad) / torch.linalg.vector_norm(parameter.grad)
        assert difference < 1e-4, name
    assert not gradients


@pytest.mark.parametrize("shape", ["Llama 3.1", "TinyLlama"])
def test_packed_row_equals_documents_alone_in_transformers(tmp_path: Path, shape: str) -> None:
    reference, ours = make_pair(tmp_path, shape)
    lengths = (17, 1, 30)
    tokens = draw_tokens(128, 48)[:1]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    with torch.no_grad():
        packed = ours(tokens, positions, lengths)
        alone = torch.cat([reference(piece).logits for piece in tokens.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-4)


def test_logits_of_the_real_smollm2_equal_those_of_transformers() -> None:
    if not SMOLLM2.is_dir():
        pytest.skip(f"{SMOLLM2} is not there; tests/assets/make_smollm2.py makes it")
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    prompts = ["The capital of France is", "def fibonacci(n):\n    ", "Once upon a time, in a village near the sea, there lived"]
    reference, ours = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32), load_ours(SMOLLM2)
    with torch.no_grad():
        for prompt in prompts:
            tokens = tokenizer(prompt, return_tensors="pt")["input_ids"]
            torch.testing.assert_close(run_ours(ours, tokens), reference(tokens).logits, rtol=0, atol=1e-4)
