"""torchtune's models, packing, loss and compilation, in its own environment, put together as its single-device recipes do.

torchtune_recipe.py WORKLOAD DOCUMENTS STEPS [eager | compile]
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torchtune.training
from torchtune.data import padded_collate_packed
from torchtune.datasets import PackedDataset
from torchtune.models.llama3_2._component_builders import llama3_2, lora_llama3_2
from torchtune.modules.loss import CEWithChunkedOutputLoss
from torchtune.modules.peft import get_adapter_params, set_trainable_params
from workloads import UNTRAINED, WORKLOADS, build_adamw, read_documents, say_step


def main(name: str, documents: str, steps: str, how: str = "eager") -> None:
    workload = WORKLOADS[name]
    shape = workload.shape
    torch.manual_seed(1)
    words: dict[str, Any] = {
        "vocab_size": shape.vocab_size,
        "num_layers": shape.num_hidden_layers,
        "num_heads": shape.num_attention_heads,
        "num_kv_heads": shape.num_key_value_heads,
        "embed_dim": shape.hidden_size,
        "intermediate_dim": shape.intermediate_size,
        "max_seq_len": workload.seq_len,
        "rope_base": int(shape.rope_theta),
        "norm_eps": shape.rms_norm_eps,
        "tie_word_embeddings": shape.tie_word_embeddings,
    }
    if workload.lora_rank:
        attention = ["q_proj", "k_proj", "v_proj", "output_proj"]
        rank = {"lora_rank": workload.lora_rank, "lora_alpha": 2.0 * workload.lora_rank}
        model = lora_llama3_2(attention, apply_lora_to_mlp=True, **rank, **words)
        set_trainable_params(model, get_adapter_params(model))
    else:
        model = llama3_2(**words)
    loss_of = CEWithChunkedOutputLoss()
    model.set_num_output_chunks(loss_of.num_output_chunks)
    if how == "compile":
        torchtune.training.compile_model(model, verbose=False)
        torchtune.training.compile_loss(loss_of, verbose=False)
    optimizer = build_adamw(model.parameters())
    listed = [{"tokens": one["input_ids"], "labels": one["labels"]} for one in read_documents(Path(documents))]
    packed = PackedDataset(listed, max_seq_len=workload.seq_len, max_packs=int(steps) * workload.rows)
    for step in range(int(steps)):
        rows = [packed[number] for number in range(step * workload.rows, (step + 1) * workload.rows)]
        batch = padded_collate_packed(rows)
        labels = torch.nn.functional.pad(batch.pop("labels")[:, 1:], (0, 1), value=UNTRAINED)
        loss = loss_of(model(**batch), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        say_step(sum(int((row["tokens"] != 0).sum()) for row in rows), loss.item())  # 0 is padding, and in no document


if __name__ == "__main__":
    main(*sys.argv[1:])
