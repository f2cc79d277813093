"""A program that loads weights as torchtune does and writes the logits of its model: torchtune in PYTHONPATH, nothing of tunelib.

    python torchtune_reader.py KIND FOLDER FILES SIZES TOKENS LOGITS

KIND is "hf" (a folder with a config.json) or "meta"; FILES are names in FOLDER with commas between them; SIZES are fields of a config.json
as a JSON object, of which ``rope_scaling`` is null or a table with ``factor``; TOKENS are the ids of one sequence as a JSON list; the
logits, (1, S, V) in float32, go to the file LOGITS in a folder that must not be FOLDER.
"""
# mypy: disable-error-code="import-not-found"
# torchtune lies in a folder of its own (tests/assets/fetch_torchtune.py).

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torchtune import training
from torchtune.models.llama3 import llama3
from torchtune.models.llama3_1 import llama3_1
from torchtune.models.llama3_2 import llama3_2
from torchtune.training.checkpointing import FullModelHFCheckpointer, FullModelMetaCheckpointer

CHECKPOINTERS = {"hf": FullModelHFCheckpointer, "meta": FullModelMetaCheckpointer}


def build_model(sizes: dict[str, Any], seq_len: int) -> torch.nn.Module:
    """The builder of Llama 3, 3.1 or 3.2: they differ by their rope scaling and by tied embeddings."""
    fields = {
        "vocab_size": sizes["vocab_size"],
        "num_layers": sizes["num_hidden_layers"],
        "num_heads": sizes["num_attention_heads"],
        "num_kv_heads": sizes["num_key_value_heads"],
        "embed_dim": sizes["hidden_size"],
        "intermediate_dim": sizes["intermediate_size"],
        "max_seq_len": seq_len,
        "rope_base": sizes["rope_theta"],
        "norm_eps": sizes["rms_norm_eps"],
    }
    scaling = sizes.get("rope_scaling")
    if sizes.get("tie_word_embeddings"):
        return llama3_2(**fields, scale_factor=scaling["factor"] if scaling else 1)
    return llama3_1(**fields, scale_factor=scaling["factor"]) if scaling else llama3(**fields)


def main(kind: str, folder: str, files: str, sizes: str, tokens: str, logits: str) -> None:
    fields, ids = json.loads(sizes), torch.tensor([json.loads(tokens)])
    checkpointer = CHECKPOINTERS[kind](
        checkpoint_dir=folder,
        checkpoint_files=files.split(","),
        model_type="LLAMA3_2" if fields.get("tie_word_embeddings") else "LLAMA3",
        output_dir=str(Path(logits).parent / "torchtune_output"),
    )
    model = build_model(fields, ids.shape[1]).eval()
    model.load_state_dict(checkpointer.load_checkpoint()[training.MODEL_KEY])
    with torch.no_grad():
        torch.save(model(ids).float(), logits)


if __name__ == "__main__":
    main(*sys.argv[1:])
