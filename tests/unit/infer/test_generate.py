"""Greedy generation is transformers', token by token, and stops where it should."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from unit.samples import DEBUG_TOKENIZER, TINY_FIELDS, tiny_model

from tunelib.data.chat import find_template
from tunelib.data.tokenizer import Tokenizer
from tunelib.errors import DataError
from tunelib.infer.generate import answer_prompts, encode_prompts, generate_greedy

CPU = torch.device("cpu")
PROMPT = [3, 14, 15]


def test_continuation_is_that_of_transformers() -> None:
    model = tiny_model(torch.float32)
    reference = LlamaForCausalLM(LlamaConfig(**TINY_FIELDS, eos_token_id=None, bos_token_id=None)).eval()
    reference.load_state_dict(model.state_dict())
    expected = reference.generate(torch.tensor([PROMPT]), attention_mask=torch.ones(1, 3), max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert generate_greedy(model, PROMPT, 12, (), CPU) == expected[0, 3:].tolist()


def test_stop_token_ends_the_answer_and_is_not_part_of_it() -> None:
    model = tiny_model()
    free = generate_greedy(model, PROMPT, 12, (), CPU)
    stop = free[5]
    assert generate_greedy(model, PROMPT, 12, {stop}, CPU) == free[: free.index(stop)]


def test_generation_leaves_no_gradient_behind() -> None:
    model = tiny_model()
    generate_greedy(model, PROMPT, 2, (), CPU)
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("chat", [True, False])
def test_prompts_are_answered_in_order(chat: bool) -> None:
    tokenizer = Tokenizer(DEBUG_TOKENIZER)
    template = find_template(tokenizer, "") if chat else None
    model = tiny_model(vocab_size=640)
    prompts = encode_prompts(["Who?", "Where?"], tokenizer, template)
    together = answer_prompts(model, prompts, tokenizer, tokenizer.stop_ids, 4, CPU)
    assert together == [answer_prompts(model, [prompt], tokenizer, tokenizer.stop_ids, 4, CPU)[0] for prompt in prompts]


def test_prompt_that_is_no_token_is_refused() -> None:
    with pytest.raises(DataError, match="'' is no token at all"):
        encode_prompts([""], Tokenizer(DEBUG_TOKENIZER), None)
