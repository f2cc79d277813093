"""litgpt's models and chunked loss, in its own environment, put together as its pretraining and finetuning do.

litgpt_fit.py WORKLOAD DOCUMENTS STEPS [eager | compile]
"""

import sys
from pathlib import Path
from typing import Any

import litgpt.lora
import torch
from litgpt.utils import chunked_cross_entropy
from workloads import UNTRAINED, WORKLOADS, build_adamw, padded, read_documents, say_step


def main(name: str, documents: str, steps: str, how: str = "eager") -> None:
    workload = WORKLOADS[name]
    shape = workload.shape
    torch.manual_seed(1)
    words: dict[str, Any] = {
        "block_size": workload.seq_len,
        "padded_vocab_size": shape.vocab_size,
        "n_layer": shape.num_hidden_layers,
        "n_head": shape.num_attention_heads,
        "n_query_groups": shape.num_key_value_heads,
        "n_embd": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "rotary_percentage": 1.0,
        "parallel_residual": False,
        "bias": False,
        "norm_class_name": "RMSNorm",
        "norm_eps": shape.rms_norm_eps,
        "mlp_class_name": "LLaMAMLP",
        "rope_base": int(shape.rope_theta),
    }
    if workload.lora_rank:
        places = ("query", "key", "value", "projection", "mlp")
        lora = {"lora_r": workload.lora_rank, "lora_alpha": 2 * workload.lora_rank, **{f"lora_{place}": True for place in places}}
        model = litgpt.lora.GPT(litgpt.lora.Config(**words, **lora))
        litgpt.lora.mark_only_lora_as_trainable(model)
    else:
        model = litgpt.GPT(litgpt.Config(**words))
    if shape.tie_word_embeddings:
        head = model.lm_head.linear if workload.lora_rank else model.lm_head
        head.weight = model.transformer.wte.weight
    run = torch.compile(model) if how == "compile" else model
    optimizer = build_adamw(model.parameters())
    listed = read_documents(Path(documents))
    for step in range(int(steps)):
        rows = listed[step * workload.documents_unpacked : (step + 1) * workload.documents_unpacked]
        width = max(len(row["input_ids"]) for row in rows)
        tokens = torch.tensor([padded(row["input_ids"], width, 0) for row in rows])
        labels = torch.tensor([padded(row["labels"], width, UNTRAINED) for row in rows])
        if workload.pairs:
            logits = run(tokens, lm_head_chunk_size=128)
            logits[-1] = logits[-1][..., :-1, :]
            loss = chunked_cross_entropy(logits, labels[..., 1:])
        else:
            loss = chunked_cross_entropy(run(tokens)[:, :-1], labels[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        say_step(sum(len(row["input_ids"]) for row in rows), loss.item())


if __name__ == "__main__":
    main(*sys.argv[1:])
