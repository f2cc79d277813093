"""What train_speed.py trains: three workloads as plain data, their documents, and how a contestant says what it did.

Every contestant imports this file in its own environment: standard library and torch alone.
"""

import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Shape:
    """A Llama, with Hugging Face's names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    tie_word_embeddings: bool
    max_position_embeddings: int = 512
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5


@dataclass(frozen=True)
class Workload:
    """A model and what is trained on.

    Attributes:
        rows: of seq_len positions, in a step.
        pairs: conversations of 20 to 400 tokens, the first 60 % of which are not trained; else whole rows of text.
        documents_unpacked: that fill a step of those who pad: as many tokens as the rows have.
        lora_rank: 0 for full training.
    """

    title: str
    shape: Shape
    rows: int
    pairs: bool
    documents_unpacked: int
    lora_rank: int = 0
    seq_len: int = 512


SMALL = Shape(8192, 512, 1408, 8, 8, 4, False)
SMOLLM2 = Shape(49152, 576, 1536, 30, 9, 3, True)
WORKLOADS = {
    "W1": Workload("pretraining, Llama of 34 million", SMALL, rows=4, pairs=False, documents_unpacked=4),
    "W2": Workload("LoRA of rank 16 on all linear layers, SmolLM2-135M's shape", SMOLLM2, rows=2, pairs=True, documents_unpacked=5, lora_rank=16),
    "W3": Workload("full fine-tuning, SmolLM2-135M's shape", SMOLLM2, rows=2, pairs=True, documents_unpacked=5),
}
LR = 1e-4
UNTRAINED = -100


def write_documents(workload: Workload, path: Path, number: int = 4000) -> None:
    """One document a line: input_ids, and labels that are -100 where nothing is trained; random words, the same every time."""
    random_numbers = random.Random(1)
    with path.open("w") as file:
        for _ in range(number):
            length = random_numbers.randint(20, 400) if workload.pairs else workload.seq_len
            ids = random_numbers.choices(range(5, workload.shape.vocab_size), k=length)
            prompt = round(length * 0.6) if workload.pairs else 0
            file.write(json.dumps({"input_ids": ids, "labels": [UNTRAINED] * prompt + ids[prompt:]}) + "\n")


def read_documents(path: Path) -> list[dict[str, list[int]]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def pack_in_order(documents: list[dict[str, list[int]]], seq_len: int) -> Iterator[list[dict[str, list[int]]]]:
    """Rows of documents as they come: what fits goes into the row."""
    row: list[dict[str, list[int]]] = []
    for document in documents:
        if sum(len(one["input_ids"]) for one in row) + len(document["input_ids"]) > seq_len:
            yield row
            row = []
        row.append(document)


def shifted(document: dict[str, list[int]]) -> list[int]:
    """What each position is to foretell."""
    return [*document["labels"][1:], UNTRAINED]


def padded(values: list[int], width: int, value: int) -> list[int]:
    return values + [value] * (width - len(values))


def say_step(num_tokens: int, loss: float) -> None:
    """Tell train_speed.py that an optimizer step is done.

    Args:
        num_tokens: of documents; padding is none.
    """
    print(f"STEP {time.monotonic()} {num_tokens} {loss}", flush=True)


def build_adamw(parameters: Iterator[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW([parameter for parameter in parameters if parameter.requires_grad], lr=LR, fused=True)
