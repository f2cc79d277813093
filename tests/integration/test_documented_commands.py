"""Every command of docs/formats.md and docs/checkpoints.md runs, in the order of the page."""

import os
import re
import subprocess
import sys
from pathlib import Path

import foreign
import pytest
from conftest import ROOT, TOKENIZER

from tunelib.config import load_config
from tunelib.formats.source import open_checkpoint

MODEL = load_config([str(ROOT / "train_configs/debug_model.toml")]).config.model


def find_blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page, by the word behind their fence."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return [code for found, code in re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE) if found == language]


def prepare(folder: Path) -> None:
    """Small stand-ins for the checkpoints that the pages name, all one model of the debug model's shape, and the repository's own folders."""
    (folder / "train_configs").symlink_to(ROOT / "train_configs")
    heads, kv_heads = MODEL.num_attention_heads, MODEL.num_key_value_heads
    assert MODEL.hidden_size is not None
    assert heads is not None
    assert kv_heads is not None
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    sizes = {name: getattr(MODEL, name) for name in names} | {"head_dim": MODEL.hidden_size // heads}
    state = foreign.make_hf(folder / "assets/SmolLM2", kv_heads=kv_heads, tokenizer=TOKENIZER, **sizes)
    foreign.make_meta(folder / "assets/Llama-2-7b", state, heads, kv_heads)
    foreign.make_torchtitan_dcp(folder / "assets/titan/step-1000", state, heads, kv_heads, full=True)


def run(command: str, folder: Path) -> None:
    """One line of a page, with this Python; the repository's programs are found by their names."""
    line = re.sub(r"^python ", f"{sys.executable} ", command).replace("./run_train.sh", str(ROOT / "run_train.sh"))
    line = line.replace(" scripts/", f" {ROOT}/scripts/")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(line, shell=True, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240)
    assert finished.returncode == 0, f"{command}\n{finished.stdout[-4000:]}"


@pytest.mark.slow  # about forty programs that each import torch
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", ["formats.md", "checkpoints.md"])
def test_every_command_of_a_page_runs(tmp_path: Path, page: str) -> None:
    prepare(tmp_path)
    commands = [line for block in find_blocks(page, "") for line in block.splitlines() if line.strip()]
    assert len(commands) >= 4
    for command in commands:
        run(command, tmp_path)
    for code in find_blocks(page, "python"):
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, timeout=120)
    if page == "formats.md":
        assert open_checkpoint(tmp_path / "outputs/to-meta/export").form.kind == "meta"


def test_toml_of_the_pages_passes_the_config_check(tmp_path: Path) -> None:
    for block in find_blocks("checkpoints.md", "toml"):
        (tmp_path / "page.toml").write_text(f'base = "{ROOT}/train_configs/debug_model.toml"\n{block}')
        assert load_config([str(tmp_path / "page.toml")]).config.checkpoint.enable_checkpoint
