"""docs/extending.md runs as it stands: its blocks are one program."""

import subprocess
import sys
from pathlib import Path

import foreign
from conftest import ROOT, TOKENIZER
from test_documented_commands import find_blocks


def test_the_page_is_a_program_that_runs(tmp_path: Path) -> None:
    (tmp_path / "train_configs").symlink_to(ROOT / "train_configs")
    foreign.make_hf(tmp_path / "assets/SmolLM2-135M-Instruct", tokenizer=TOKENIZER, max_position_embeddings=512)
    blocks = find_blocks("extending.md", "python")
    assert len(blocks) >= 7
    words = [sys.executable, "-W", "error", "-c", "\n".join(blocks)]
    ended = subprocess.run(words, cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    losses = [float(line.split()[1]) for line in ended.stdout.splitlines() if line[:2] in ("1 ", "2 ", "3 ")]
    assert len(losses) == 3
    assert losses[2] < losses[0]
