"""Eight and four bits through torchao: close to the weights, written as transformers reads it, and the same when read back."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from unit.samples import DEBUG_TOKENIZER, tiny_model, write_model

from tunelib.errors import ConfigError, FormatError
from tunelib.formats import load_model
from tunelib.formats.whole import quantize_checkpoint

TOKENS = torch.tensor([[5, 9, 33, 7, 2, 40]])


def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(TOKENS, torch.arange(6)[None], (6,))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("kind", "most"), [("int8", 0.05), ("int4", 0.6)])
def test_written_once_it_is_what_is_made_on_the_fly(tmp_path: Path, kind: str, most: float, tied: bool) -> None:
    fields = {"intermediate_size": 64, "tie_word_embeddings": tied}
    folder = write_model(tmp_path / "base", tiny_model(torch.float32, **fields), DEBUG_TOKENIZER)
    exact = logits(load_model(folder).model)
    on_the_fly = logits(load_model(folder, quantize=kind).model)
    quantize_checkpoint(folder, tmp_path / "out", kind)
    loaded = load_model(tmp_path / "out")
    torch.testing.assert_close(logits(loaded.model), on_the_fly, rtol=0, atol=0)
    error = (on_the_fly - exact).norm() / exact.norm()
    assert 0 < error < most
    assert loaded.template is not None
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(reference(TOKENS).logits, on_the_fly, rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "base", tiny_model(torch.float32))
    with pytest.raises(ConfigError, match="a scale for each 32 weights"):
        load_model(folder, quantize="int4")  # whose feed-forward layer is 40 wide
    quantize_checkpoint(folder, tmp_path / "out", "int8")
    with pytest.raises(ConfigError, match="is quantised: it takes no adapter"):
        load_model(tmp_path / "out", quantize="int8")
    with pytest.raises(FormatError, match="nothing is overwritten"):
        quantize_checkpoint(folder, tmp_path / "out", "int8")
    weights = tmp_path / "out/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(FormatError, match=r"model\.safetensors"):
        load_model(tmp_path / "out")
