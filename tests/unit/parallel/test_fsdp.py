"""Shards in the main memory give the same gradients; how far that goes without a GPU."""

import torch
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from tunelib.config.schema import Comm, Parallelism, Training
from tunelib.formats.load import Weights, give_weights
from tunelib.model.config import ModelConfig
from tunelib.model.decoder import build_on_meta
from tunelib.model.families import parse_config
from tunelib.parallel.fsdp import apply_fsdp, forward_only
from tunelib.parallel.mesh import build_layout
from tunelib.parallel.runtime import start

CONFIG: ModelConfig = parse_config(
    {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
    },
    "a test",
)
BFLOAT16 = Training(mixed_precision_param="bfloat16", mixed_precision_reduce="float32")


def take_step(offloaded: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of one row."""
    with start(BFLOAT16, Comm()) as runtime:
        model = build_on_meta(CONFIG, torch.float32)
        mesh = build_layout(Parallelism(), runtime).mesh
        assert mesh is not None
        apply_fsdp(model, mesh, MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32), True, offloaded)
        model.to_empty(device=runtime.storage)
        give_weights(model, Weights(CONFIG, "drawn"), seed=0)
        tokens = torch.arange(32)[None]
        loss = model(tokens, tokens, (32,), labels=tokens)
        loss.backward()
        return loss.detach(), {
            name: parameter.grad.full_tensor() for name, parameter in model.named_parameters() if isinstance(parameter.grad, DTensor)
        }


def test_shards_in_the_main_memory_give_the_same_gradients() -> None:
    (plain, gradients), (offloaded, found) = take_step(False), take_step(True)
    assert torch.equal(plain, offloaded)
    assert gradients.keys() == found.keys() != set()
    assert all(torch.equal(gradient, found[name]) for name, gradient in gradients.items())


def test_a_model_is_in_shards_again_after_forward_passes_alone() -> None:
    with start(BFLOAT16, Comm()) as runtime:
        model = build_on_meta(CONFIG, torch.float32)
        mesh = build_layout(Parallelism(), runtime).mesh
        assert mesh is not None
        apply_fsdp(model, mesh, MixedPrecisionPolicy(param_dtype=torch.bfloat16), True, False)
        model.to_empty(device="cpu")
        give_weights(model, Weights(CONFIG, "drawn"), seed=0)
        tokens = torch.arange(32)[None]
        with forward_only(model):
            model(tokens, tokens, (32,), labels=tokens)
            assert not isinstance(model.lm_head.weight, DTensor)
        assert isinstance(model, FSDPModule)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
