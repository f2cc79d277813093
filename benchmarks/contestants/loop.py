"""A plain training loop as one writes it: packed rows with a mask, all logits, autograd; nothing of tunelib.

loop.py WORKLOAD DOCUMENTS STEPS [compile]
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from workloads import UNTRAINED, WORKLOADS, Shape, build_adamw, pack_in_order, padded, read_documents, say_step, shifted


class LoRA(nn.Module):
    def __init__(self, linear: nn.Linear, rank: int):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.a, self.b = nn.Linear(linear.in_features, rank, bias=False), nn.Linear(rank, linear.out_features, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + 2 * self.b(self.a(x))


class Layer(nn.Module):
    def __init__(self, shape: Shape, rank: int):
        super().__init__()

        def linear(inputs: int, outputs: int) -> nn.Module:
            made = nn.Linear(inputs, outputs, bias=False)
            return LoRA(made, rank) if rank else made

        self.head_dim = shape.hidden_size // shape.num_attention_heads
        kv_size = shape.num_key_value_heads * self.head_dim
        self.norm_1 = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.norm_2 = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.q, self.k, self.v = linear(shape.hidden_size, shape.hidden_size), linear(shape.hidden_size, kv_size), linear(shape.hidden_size, kv_size)
        self.o = linear(shape.hidden_size, shape.hidden_size)
        self.gate, self.up = linear(shape.hidden_size, shape.intermediate_size), linear(shape.hidden_size, shape.intermediate_size)
        self.down = linear(shape.intermediate_size, shape.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        h = self.norm_1(x)
        q, k, v = (project(h).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for project in (self.q, self.k, self.v))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        x = x + self.o(attended.transpose(1, 2).flatten(2))
        h = self.norm_2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Llama(nn.Module):
    def __init__(self, shape: Shape, rank: int):
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape, rank) for _ in range(shape.num_hidden_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        if rank:
            for module in (self.embedding, self.norm, self.head, *(norm for layer in self.layers for norm in (layer.norm_1, layer.norm_2))):
                module.requires_grad_(False)
        if shape.tie_word_embeddings:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        half = self.shape.hidden_size // self.shape.num_attention_heads // 2
        angles = positions[:, None, :, None] * self.shape.rope_theta ** (-torch.arange(half) / half)
        angles = torch.cat((angles, angles), dim=-1)
        x, cos, sin = self.embedding(tokens), angles.cos(), angles.sin()
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        return self.head(self.norm(x))


def main(name: str, documents: str, steps: str, how: str = "eager") -> None:
    workload = WORKLOADS[name]
    torch.manual_seed(1)
    model = Llama(workload.shape, workload.lora_rank)
    if how == "compile":
        for layer in model.layers:
            layer.compile()
    optimizer = build_adamw(model.parameters())
    width, rows = workload.seq_len, pack_in_order(read_documents(Path(documents)), workload.seq_len)
    for _ in range(int(steps)):
        step = [next(rows) for _ in range(workload.rows)]
        tokens = torch.tensor([padded([token for one in row for token in one["input_ids"]], width, 0) for row in step])
        labels = torch.tensor([padded([label for one in row for label in shifted(one)], width, UNTRAINED) for row in step])
        positions = torch.tensor([padded([place for one in row for place in range(len(one["input_ids"]))], width, 0) for row in step])
        mask = None
        if workload.pairs:
            own = torch.tensor([padded([number for number, one in enumerate(row) for _ in one["input_ids"]], width, -1) for row in step])
            mask = ((own[:, :, None] == own[:, None, :]) & torch.ones(width, width, dtype=torch.bool).tril())[:, None]
        loss = F.cross_entropy(model(tokens, positions, mask).flatten(0, 1), labels.flatten(), ignore_index=UNTRAINED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        say_step(sum(len(one["input_ids"]) for row in step for one in row), loss.item())


if __name__ == "__main__":
    main(*sys.argv[1:])
