"""TRL's SFTTrainer, in its own environment.

    trl_sft.py WORKLOAD DOCUMENTS STEPS [one | padded | packed] [compile]

Each step has as many documents as fill its rows: one after the other, without any padding; all at once; or in packed rows.

Gradient checkpointing is off (it is on by default, and slower); the rest is what its documentation gives.
"""

import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer
from workloads import LR, UNTRAINED, WORKLOADS, read_documents, say_step


class Told(TrainerCallback):
    """Says when a step is done, and how many tokens it had."""

    def __init__(self) -> None:
        self.tokens = 0

    def on_step_end(self, *_: Any, **__: Any) -> None:
        say_step(self.tokens, float("nan"))
        self.tokens = 0


def main(name: str, documents: str, steps: str, rows: str = "one", how: str = "eager") -> None:
    workload, told = WORKLOADS[name], Told()
    torch.manual_seed(1)
    shape = asdict(workload.shape)
    theta = shape.pop("rope_theta")
    model = LlamaForCausalLM(LlamaConfig(**shape, rope_parameters={"rope_type": "default", "rope_theta": theta}, attention_bias=False))
    model.config.pad_token_id = 0
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>")))
    words.add_special_tokens({"pad_token": "<pad>", "eos_token": "<eos>"})
    listed = [
        {"input_ids": one["input_ids"], "completion_mask": [int(label != UNTRAINED) for label in one["labels"]]}
        for one in read_documents(Path(documents))
    ]
    data = Dataset.from_list(listed if workload.pairs else [{"input_ids": one["input_ids"]} for one in listed])
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            max_steps=int(steps),
            per_device_train_batch_size={"one": 1, "padded": workload.documents_unpacked, "packed": workload.rows}[rows],
            gradient_accumulation_steps=workload.documents_unpacked if rows == "one" else 1,
            max_length=workload.seq_len,
            packing=rows == "packed",
            completion_only_loss=workload.pairs,
            learning_rate=LR,
            gradient_checkpointing=False,
            torch_compile=how == "compile",
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_steps=1000,
            disable_tqdm=True,
            seed=1,
        )
        lora = LoraConfig(r=workload.lora_rank, lora_alpha=2 * workload.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer = SFTTrainer(model, config, train_dataset=data, processing_class=words, peft_config=lora if workload.lora_rank else None)
        trainer.add_callback(told)
        collate = trainer.data_collator

        def counted(rows: list[dict[str, Any]]) -> Any:
            batch = collate(rows)
            told.tokens += sum(len(row["input_ids"]) for row in rows)
            return batch

        trainer.data_collator = counted
        trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:])
