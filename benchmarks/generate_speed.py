"""Tokens a second that a real model answers with, beside transformers', in turn: alone and eight prompts together.

    python benchmarks/generate_speed.py [--model assets/SmolLM2-135M-Instruct] [--new 64] [--rounds 3]

Greedy, float32 on a CPU, the same tokens on both sides, which is checked; the reading of the prompts counts too.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from tunelib.formats import load_model
from tunelib.infer.generate import encode_prompts, generate

QUESTIONS = [
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain in two sentences why the sky is blue.",
    "List three prime numbers.",
    "Translate 'good morning' into Spanish.",
    "Who wrote Romeo and Juliet, and when?",
    "2 + 2 =",
    "Give me a recipe for pancakes.",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="assets/SmolLM2-135M-Instruct")
    parser.add_argument("--new", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--rounds", type=int, default=3)
    words = parser.parse_args()
    from transformers import AutoModelForCausalLM

    loaded = load_model(words.model, device="cpu")
    assert loaded.tokenizer is not None
    reference = AutoModelForCausalLM.from_pretrained(words.model, dtype=torch.float32).eval()
    prompts = encode_prompts(QUESTIONS, loaded.tokenizer, loaded.template)

    def ours(asked: list[list[int]]) -> list[list[int]]:
        return generate(loaded.model, asked, words.new)

    def theirs(asked: list[list[int]]) -> list[list[int]]:
        longest = max(map(len, asked))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in asked])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in asked])
        with torch.inference_mode():
            answers = reference.generate(ids, attention_mask=mask, max_new_tokens=words.new, do_sample=False, eos_token_id=None, pad_token_id=0)
        return answers[:, longest:].tolist()

    def measure(answer: Callable[[list[list[int]]], list[list[int]]], asked: list[list[int]]) -> tuple[float, list[list[int]]]:
        began = time.monotonic()
        answers = answer(asked)
        return sum(map(len, answers)) / (time.monotonic() - began), answers

    print(f"{words.model}, {words.new} tokens each, {torch.get_num_threads()} threads; torch {torch.__version__}")
    print(f"{'':20}{'tunelib':>14}{'transformers':>16}{'ratio':>10}")
    for name, asked in (("one prompt", prompts[:1]), ("eight together", prompts)):
        measure(ours, [prompts[0][:4]]), measure(theirs, [prompts[0][:4]])
        pairs = []
        for _ in range(words.rounds):
            (own, own_answers), (other, other_answers) = measure(ours, asked), measure(theirs, asked)
            assert own_answers == other_answers, "the answers differ"
            pairs.append((own, other))
        own, other = (statistics.median(rates) for rates in zip(*pairs, strict=True))
        print(f"{name:20}{own:10.1f} t/s{other:12.1f} t/s{statistics.median(a / b for a, b in pairs):10.2f}", flush=True)


if __name__ == "__main__":
    main()
