"""Imported configs train, and all of torchtune's own are imported or refused with a sentence."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import foreign
import pytest
from assets.fetch_torchtune import fetch_torchtune
from conftest import TOKENIZER, Run, run_script, write_chats

from tunelib.config.foreign import import_config
from tunelib.errors import ConfigError

RECIPE = """\
# tune run --nproc_per_node 2 lora_finetune_distributed --config mine
model:
  _component_: torchtune.models.llama3_2.lora_llama3_2_1b
  lora_attn_modules: ['q_proj', 'v_proj']
  lora_rank: 4
tokenizer: {_component_: torchtune.models.llama3.llama3_tokenizer, path: model/tokenizer.model, max_seq_len: 64}
checkpointer: {_component_: torchtune.training.FullModelHFCheckpointer, checkpoint_dir: model}
dataset: {_component_: torchtune.datasets.chat_dataset, source: json, data_files: chats.jsonl, conversation_column: messages}
optimizer: {_component_: torch.optim.AdamW, lr: 1e-3}
batch_size: 2
gradient_accumulation_steps: 2
epochs: 1
max_steps_per_epoch: 3
dtype: fp32
"""
TITAN = """\
[model]
name = "llama3"
flavor = "debugmodel"
tokenizer_path = "tokenizer/tokenizer.json"
[training]
batch_size = 2
seq_len = 128
steps = 3
dataset = "c4"
dataset_path = "words.jsonl"
[parallelism]
fsdp_reshard_after_forward = "always"
"""


def run_import(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """scripts/import_config.py in a folder."""
    return run_script("import_config.py", *words, folder=folder)


def test_imported_recipe_trains(tmp_path: Path, train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps of 2 × 2 rows for each of the two processes that the comment names, here on one; none of them padded away."""
    monkeypatch.chdir(tmp_path)
    foreign.make_hf(tmp_path / "model", tokenizer=TOKENIZER, max_position_embeddings=256)
    write_chats(tmp_path / "chats.jsonl", 40)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    finished = run_import(tmp_path, "recipe.yaml", "optimizer.lr=0.002", "--out", "ours.toml")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == "ours.toml passes the config check for 2 processes; its lines say what they came from\n"
    run = train(tmp_path / "ours.toml", "--dataset.chat_template", "")
    rows = run.rows()
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert {row["lr"] for row in rows} == {0.002}
    assert "global_batch_size = 8" in (run.folder / "config.toml").read_text()
    assert json.loads((run.folder / "adapter/adapter_config.json").read_text())["r"] == 4


def test_imported_torchtitan_file_trains(tmp_path: Path, train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TOKENIZER, tmp_path / "tokenizer")
    (tmp_path / "words.jsonl").write_text("".join(json.dumps({"text": f"Number {n} is {n * n}."}) + "\n" for n in range(200)))
    (tmp_path / "titan.toml").write_text(TITAN)
    assert run_import(tmp_path, "titan.toml", "--out", "ours.toml").returncode == 0
    rows = train(tmp_path / "ours.toml").rows()
    assert [row["lr"] for row in rows] == pytest.approx([4e-6, 8e-6, 1.2e-5])  # torchtitan's own warmup of 200 steps to 8e-4
    again = run_import(tmp_path, "titan.toml", "--out", "ours.toml")
    assert (again.returncode, again.stderr) == (2, "command line: --out ours.toml: exists already; give another name\n")


def test_program_says_what_is_left_out_and_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "titan.toml").write_text(TITAN.replace("seq_len = 128", "seq_len = 128\nmax_norm = -1") + "[float8]\nemulate = true\n")
    finished = run_import(tmp_path, "titan.toml")
    assert (finished.returncode, "# For one process" in finished.stdout) == (0, True)
    assert finished.stderr == "left out: training.max_norm = -1: must be above 0\n"
    finished = run_import(tmp_path, "titan.toml", "--ngpu", "-1")
    assert (finished.returncode, finished.stderr) == (2, "command line: --ngpu -1: must be at least 1\n")
    finished = run_import(tmp_path, "nothing.yaml")
    assert (finished.returncode, finished.stderr.startswith("there is no file nothing.yaml; ")) == (2, True)
    (tmp_path / "long.toml").write_text('[model]\nname = "llama2"\nflavor = "7B"\n[training]\nseq_len = 5000\n')
    finished = run_import(tmp_path, "long.toml", "--out", "ours.toml")
    assert finished.returncode == 2
    assert finished.stderr.splitlines()[0] == "it does not pass the config check yet:"
    assert finished.stderr.splitlines()[1].startswith("ours.toml:")


@pytest.mark.slow  # fetches torchtune's wheel the first time
def test_torchtunes_own_configs_are_imported_or_refused() -> None:
    """All that fine-tune a Llama pass the check; the others are refused with one sentence."""
    folder = fetch_torchtune() / "recipes" / "configs"
    passed: list[Path] = []
    refused: dict[Path, ConfigError] = {}
    for path in sorted(folder.rglob("*.yaml")):
        try:
            imported = import_config(str(path))
        except ConfigError as error:
            refused[path] = error
            continue
        passed.append(path)
        assert imported.problems == (), path
        assert [what for what, why in imported.translation.lost.items() if "known here" in why] == [], path
    assert len(passed) >= 53
    assert all(len(error.problems) == 1 and str(error).startswith(f"{path}: ") for path, error in refused.items())
    llamas = [path for name in ("llama2", "llama3", "llama3_1", "llama3_2", "llama3_3") for path in (folder / name).glob("*.yaml")]
    tuning = [
        path for path in llamas if any(word in path.stem for word in ("full", "lora", "dora")) and "dpo" not in path.stem and "KD" not in path.stem
    ]
    assert len(tuning) >= 48
    assert set(tuning) <= set(passed)
