"""The script that makes the real SmolLM2 folder where there is no Hub."""

import json
from pathlib import Path

import make_smollm2
import pytest
import torch


def complete(folder: Path, dtype: str = "bfloat16") -> Path:
    folder.mkdir()
    for name in make_smollm2.FILES:
        (folder / name).write_text(json.dumps({"torch_dtype": dtype}))
    return folder


def test_complete_folder_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(make_smollm2, "fetch_gguf", lambda scratch: pytest.fail("nothing is to be fetched"))
    folder = complete(tmp_path / "model")
    assert make_smollm2.make_smollm2(folder) == folder


def test_other_content_is_refused_and_kept(tmp_path):
    folder = complete(tmp_path / "model")
    with pytest.raises(FileExistsError, match="not a complete SmolLM2-135M-Instruct in float32"):
        make_smollm2.make_smollm2(folder, "float32")
    assert sorted(path.name for path in folder.iterdir()) == sorted(make_smollm2.FILES)


def test_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(scratch: Path) -> Path:
        raise ValueError("another file")

    monkeypatch.setattr(make_smollm2, "fetch_gguf", fail)
    with pytest.raises(ValueError, match="another file"):
        make_smollm2.make_smollm2(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_rows_of_neighbouring_pairs_become_halves():
    weight = torch.arange(8.0)[:, None]  # two heads of four rows: pairs (0, 1), (2, 3) and (4, 5), (6, 7)
    assert make_smollm2.pairs_to_halves(weight, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.slow
def test_made_model_answers_in_transformers(tmp_path):
    """Downloads the package. A wrong name, order of rows or tokenizer would not say Paris."""
    transformers = pytest.importorskip("transformers")
    folder = make_smollm2.make_smollm2(tmp_path / "model", "float32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, max_new_tokens=16, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
