"""Greedy generation is transformers', token by token, and stops where it should."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from unit.samples import DEBUG_TOKENIZER, TINY_FIELDS, tiny_model

from tunelib.data.chat import find_template
from tunelib.data.tokenizer import Tokenizer
from tunelib.errors import ConfigError, DataError
from tunelib.infer.generate import Stops, answer_prompts, encode_prompts, generate, generate_greedy, stream
from tunelib.infer.sample import Sampling

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


@pytest.mark.parametrize("context", [24, 12])
def test_samples_are_read_once_where_the_context_has_room(context: int) -> None:
    """Else the whole text is read for each token, as on layouts that cut the model; the answers are the same."""
    tokenizer, model = Tokenizer(DEBUG_TOKENIZER), tiny_model(vocab_size=640, max_position_embeddings=context)
    widths: list[int] = []
    model.model.layers["0"].register_forward_pre_hook(lambda _layer, inputs: widths.append(inputs[0].shape[1]))
    answers = answer_prompts(model, PROMPTS, tokenizer, {600}, 6, CPU)
    assert widths == [8, 1, 1, 1, 1, 1] if context == 24 else max(widths) == 13
    assert answers == [tokenizer.decode(generate_greedy(model, prompt, 6, {600}, CPU)) for prompt in PROMPTS]
    assert answer_prompts(model, [], tokenizer, {600}, 6, CPU) == []


def test_prompt_that_is_no_token_is_refused() -> None:
    with pytest.raises(DataError, match="'' is no token at all"):
        encode_prompts([""], Tokenizer(DEBUG_TOKENIZER), None)


PROMPTS = [[3, 14, 15], [9], [26, 5, 35, 8, 9, 7, 9, 3], [1, 2]]


def test_with_a_cache_and_together_answers_are_those_of_reading_everything_alone() -> None:
    model = tiny_model()
    expected = [generate_greedy(model, prompt, 20, (), CPU) for prompt in PROMPTS]
    assert generate(model, PROMPTS, 20) == expected
    assert [generate(model, [prompt], 20)[0] for prompt in PROMPTS] == expected


def test_each_answer_ends_by_itself() -> None:
    """A stop token ends one, the context another; rows that have ended are left out of what is computed."""
    model = tiny_model()
    free = generate(model, PROMPTS, 20)
    stop = free[1][4]
    ended = generate(model, PROMPTS, 20, Stops({stop}))
    assert ended == [answer[: answer.index(stop) + 1] if stop in answer else answer for answer in free]
    assert any(len(answer) < 20 for answer in ended)
    narrow = tiny_model(max_position_embeddings=12)
    assert [len(answer) for answer in generate(narrow, PROMPTS, 20)] == [9, 11, 4, 10]


def test_texts_end_an_answer_and_are_cut_off() -> None:
    tokenizer, model = Tokenizer(DEBUG_TOKENIZER), tiny_model(vocab_size=640)
    free = tokenizer.decode(generate(model, [PROMPTS[0]], 20)[0])
    text = free[8:11]
    stops = Stops((), (text,), tokenizer)
    ids = generate(model, [PROMPTS[0]], 20, stops)[0]
    assert len(ids) < 20
    assert stops.text_of(ids) == free[: free.index(text)]


def test_what_is_drawn_follows_the_seed_and_not_the_neighbours() -> None:
    model, sampling = tiny_model(), Sampling(1.5, top_k=20, top_p=0.9, seed=4)
    drawn = generate(model, PROMPTS, 12, sampling=sampling)
    assert drawn == generate(model, PROMPTS, 12, sampling=sampling)
    assert drawn[0] == generate(model, PROMPTS[:1], 12, sampling=sampling)[0]
    assert drawn != generate(model, PROMPTS, 12, sampling=Sampling(1.5, top_k=20, top_p=0.9, seed=5))


def test_a_prompt_that_fills_the_context_is_refused() -> None:
    with pytest.raises(ConfigError, match="the prompt has 64 tokens, and the model's context is 64"):
        list(stream(tiny_model(), [[1] * 64, [2]], 4))


def test_a_special_token_that_is_named_ends_an_answer() -> None:
    tokenizer = Tokenizer(DEBUG_TOKENIZER)
    text = tokenizer.special_texts[0]
    token, other = tokenizer.id_of(text), tokenizer.encode("house", add_special_tokens=False).ids
    assert token is not None
    stops = Stops((), (text,), tokenizer)
    assert not stops.end(other)
    assert stops.end([*other, token])
    assert stops.text_of([*other, token]) == "house"
