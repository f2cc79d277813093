"""Plain greedy generation: the whole sequence through the model for every new token, on any layout that training runs on."""

from collections.abc import Collection

import torch

from tunelib.data.chat import ChatTemplate
from tunelib.data.tokenizer import Tokenizer
from tunelib.errors import DataError
from tunelib.model.decoder import Decoder
from tunelib.parallel.fsdp import forward_only
from tunelib.parallel.reduce import from_main


def generate_greedy(model: Decoder, prompt: list[int], max_new_tokens: int, stop_ids: Collection[int], device: torch.device) -> list[int]:
    """The most probable continuation, token by token, without a cache. Collective: every rank follows rank 0's choice.

    Args:
        prompt: token ids, at least one.
        stop_ids: ids that end the answer; the one met is not part of it.
    """
    ids = list(prompt)
    with forward_only(model):
        for _ in range(max_new_tokens):
            tokens = torch.tensor([ids], device=device)  # (1, S)
            positions = torch.arange(len(ids), device=device)[None]
            logits = model(tokens, positions, (len(ids),))  # (1, S, V)
            chosen = from_main(int(logits[0, -1].argmax()))
            if chosen in stop_ids:
                break
            ids.append(chosen)
    return ids[len(prompt) :]


def encode_prompts(prompts: Collection[str], tokenizer: Tokenizer, template: ChatTemplate | None) -> list[list[int]]:
    """Prompts as tokens: each the one message of a user, or, without a template, running text to go on with.

    Raises:
        DataError: the template refuses one, or one becomes no token at all.
    """
    encoded = []
    for prompt in prompts:
        if template is not None:
            ids = template.encode_prompt([{"role": "user", "content": prompt}])
        else:
            ids = tokenizer.encode(prompt, add_special_tokens=True).ids
        if not ids:
            raise DataError(f"validation.prompts: {prompt!r} is no token at all; there is nothing to go on with")
        encoded.append(ids)
    return encoded


def answer_prompts(
    model: Decoder, prompts: list[list[int]], tokenizer: Tokenizer, stop_ids: Collection[int], max_new_tokens: int, device: torch.device
) -> list[str]:
    """Greedy answers, as text, to what `encode_prompts` made. Collective."""
    return [tokenizer.decode(generate_greedy(model, prompt, max_new_tokens, stop_ids, device)) for prompt in prompts]
