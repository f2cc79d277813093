"""The real SmolLM2 answers as with transformers, token by token: alone and together, with and without a cache."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tunelib.formats import load_model
from tunelib.infer.generate import encode_prompts, generate, generate_greedy

PROMPTS = [
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain in two sentences why the sky is blue.",
    "List three prime numbers.",
    "Translate 'good morning' into Spanish.",
    "Who wrote Romeo and Juliet, and when? Answer as a librarian would who has all day and likes to talk about the theatre.",
    "2 + 2 =",
    "Give me a recipe for pancakes with few ingredients.",
]
NEW = 64


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_real_answers_are_those_of_transformers(smollm2: Path) -> None:
    loaded = load_model(smollm2)
    assert loaded.tokenizer is not None
    prompts = encode_prompts(PROMPTS, loaded.tokenizer, loaded.template)
    reference = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2, padding_side="left")
    expected = []
    for text, prompt in zip(PROMPTS, prompts, strict=True):
        theirs = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True)
        assert theirs["input_ids"][0].tolist() == prompt
        with torch.no_grad():
            answer = reference.generate(**theirs, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
        expected.append(answer[0, len(prompt) :].tolist())
    assert [generate(loaded.model, [prompt], NEW)[0] for prompt in prompts] == expected
    assert generate(loaded.model, prompts, NEW) == expected
    assert [generate_greedy(loaded.model, prompt, NEW, (), loaded.device) for prompt in prompts[:3]] == expected[:3]
