"""Rotary positions are transformers', Llama 3.1's scaling included."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from unit.samples import TINY_FIELDS, tiny_config

from tunelib.model.rope import rope_frequencies, rope_tables, rotate

CPU = torch.device("cpu")
SCALINGS: dict[str, dict[str, Any]] = {
    "Llama 2": {"rope_theta": 10_000.0},
    "Llama 3": {"rope_theta": 500_000.0},
    "Llama 3.1": {
        "rope_theta": 500_000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "Llama 3.2": {
        "rope_theta": 500_000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
}


def reference_of(fields: dict[str, Any]) -> LlamaRotaryEmbedding:
    kept = {name: value for name, value in fields.items() if name not in ("architectures", "rope_theta", "rope_scaling")}
    rope = {"rope_type": "default", **fields.get("rope_scaling", {}), "rope_theta": fields["rope_theta"]}
    return LlamaRotaryEmbedding(LlamaConfig(**kept, rope_parameters=rope))


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS.keys())
def test_tables_are_those_of_transformers(scaling: dict[str, Any]) -> None:
    fields = {**TINY_FIELDS, "head_dim": 128, "max_position_embeddings": 131072, **scaling}
    config, reference = tiny_config(**{name: fields[name] for name in ("head_dim", "max_position_embeddings", *scaling)}), reference_of(fields)
    torch.testing.assert_close(rope_frequencies(config, CPU), reference.inv_freq, rtol=1e-6, atol=0)
    positions = torch.tensor([[0, 1, 2, 500], [8191, 8192, 0, 1]])
    cos, sin = rope_tables(config, positions, torch.float32)
    expected_cos, expected_sin = reference(torch.zeros(1), positions)
    assert cos.shape == (2, 4, 1, 128)
    # at position 8192 one rounding of a frequency (6e-8 relative) is an angle of 5e-4
    torch.testing.assert_close(cos[:, :, 0], expected_cos, rtol=0, atol=1e-3)
    torch.testing.assert_close(sin[:, :, 0], expected_sin, rtol=0, atol=1e-3)
    torch.testing.assert_close(cos[0, :3, 0], expected_cos[0, :3], rtol=0, atol=1e-6)


def test_scaling_keeps_short_wavelengths_and_slows_long_ones() -> None:
    plain = rope_frequencies(tiny_config(head_dim=128, **SCALINGS["Llama 3"]), CPU)
    scaled = rope_frequencies(tiny_config(head_dim=128, **SCALINGS["Llama 3.1"]), CPU)
    wavelengths = 2 * torch.pi / plain
    ratio = plain / scaled
    torch.testing.assert_close(ratio[wavelengths < 8192 / 4], torch.ones_like(ratio[wavelengths < 8192 / 4]))
    torch.testing.assert_close(ratio[wavelengths > 8192], torch.full_like(ratio[wavelengths > 8192], 8.0))
    between = ratio[(wavelengths > 8192 / 4) & (wavelengths < 8192)]
    assert len(between) > 0
    assert ((between > 1) & (between < 8)).all()


def test_rotation_is_that_of_transformers() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 2, 8)
    cos, sin = rope_tables(tiny_config(), torch.arange(5).expand(2, 5), torch.float32)
    expected = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos[:, :, 0], sin[:, :, 0])
    torch.testing.assert_close(rotate(q, cos, sin), expected[0].transpose(1, 2), rtol=0, atol=1e-6)
    torch.testing.assert_close(rotate(k, cos, sin), expected[1].transpose(1, 2), rtol=0, atol=1e-6)


def test_attention_scores_depend_on_distance_only() -> None:
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def score(at: int, of: int) -> torch.Tensor:
        q_cos, q_sin, k_cos, k_sin = (table for place in (at, of) for table in rope_tables(tiny_config(), torch.tensor([[place]]), torch.float64))
        return (rotate(q, q_cos, q_sin) * rotate(k, k_cos, k_sin)).sum()

    torch.testing.assert_close(score(9, 4), score(25, 20), rtol=1e-5, atol=1e-5)  # the tables are float32
