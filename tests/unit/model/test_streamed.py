"""Logits of one layer at a time are those of the whole model."""

import torch
from unit.samples import tiny_model

from tunelib.checkpoint.state import model_tensors
from tunelib.model import streamed
from tunelib.model.families import llama
from tunelib.model.streamed import streamed_logits


def test_streamed_logits_equal_those_of_the_model(monkeypatch) -> None:
    monkeypatch.setattr(streamed, "BLOCK_ELEMENTS", 32 * 3)  # three rows of the embedding at a time
    for tied in (False, True):
        model = tiny_model(torch.float32, tie_word_embeddings=tied)
        tensors = model_tensors(model)
        assert (llama.HEAD in tensors) != tied
        tokens = [3, 0, 5, 5, 1, model.config.vocab_size - 1]
        with torch.no_grad():
            expected = model(torch.tensor([tokens]), torch.arange(len(tokens))[None], (len(tokens),))[0]
        found = streamed_logits(model.config, lambda name, where, tensors=tensors: tensors[name][where], tokens)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
