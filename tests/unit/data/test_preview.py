"""What the preview shows is what a run trains on: its rows, its marks, the files and lines of its documents."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, open_train_data, run_script, write_chats, write_toml
from unit.samples import DEBUG_TOKENIZER

from tunelib.data.preview import PLAIN, show_tokens
from tunelib.data.tokenizer import Tokenizer


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = write_toml(tmp_path / "tiny.toml", write_chats(tmp_path / "chats.jsonl", 200))
    path.write_text(path.read_text().replace("[training]", "[training]\nsteps = 5"))
    return path


def preview(*words: object) -> subprocess.CompletedProcess[str]:
    return run_script("preview_data.py", *words)


def test_trained_tokens_stand_between_marks() -> None:
    tokenizer = Tokenizer(DEBUG_TOKENIZER)
    ids = np.array(tokenizer.encode("one two three", add_special_tokens=False).ids, dtype=np.int32)
    assert show_tokens(~ids, tokenizer, PLAIN) == "one two three"
    assert show_tokens(ids, tokenizer, PLAIN).count("⟦") == 1
    half = len(ids) // 2
    marked = np.concatenate([~ids[:half], ids[half:]])
    shown = show_tokens(marked, tokenizer, PLAIN)
    assert shown == f"{tokenizer.decode(ids[:half].tolist())}⟦{tokenizer.decode(ids[half:].tolist())}⟧"


def test_characters_of_several_tokens_are_shown_whole() -> None:
    tokenizer = Tokenizer(DEBUG_TOKENIZER)
    ids = np.array(tokenizer.encode("é→🦉", add_special_tokens=False).ids, dtype=np.int32)
    assert len(ids) > 3
    assert show_tokens(ids, tokenizer, ("", "")).endswith("→🦉")


@pytest.mark.parametrize("step", [1, 7])
def test_rows_of_a_step_are_those_that_are_trained(toml: Path, step: int) -> None:
    done = preview(toml, "--step", step)
    assert done.returncode == 0, done.stderr
    rows = open_train_data(toml.parent / "chats.jsonl").rows_of(step)
    heads = re.findall(r"══ row (\d+), epoch (\d+): (\d+) documents", done.stdout)
    assert heads == [(str(number), str(epoch), str(len(row))) for number, (epoch, row) in enumerate(rows)]
    shown = [int(line) for line in re.findall(r"── \S+chats\.jsonl:(\d+): ", done.stdout)]
    assert shown == [document + 1 for _, row in rows for document in row.tolist()]
    # The text under each header is that of the line, its answer between the marks.
    messages = [json.loads(line)["messages"] for line in (toml.parent / "chats.jsonl").read_text().splitlines()]
    bodies = re.split(r"── \S+chats\.jsonl:\d+: .*\n", done.stdout)[1:]
    for line, body in zip(shown, bodies, strict=True):
        question, answer = messages[line - 1]
        assert question["content"] in body
        assert f"⟦{answer['content']}<|im_end|>⟧" in body


def test_figures_and_the_rendering_are_shown(toml: Path) -> None:
    done = preview(toml, "--rows", "1")
    assert done.returncode == 0, done.stderr
    assert "200 documents, " in done.stdout
    assert "read as 'chat', by 'messages' of its first row" in done.stdout
    assert re.search(r"\d+ rows an epoch, \d\d\.\d\d% full", done.stdout)
    counts = [int(count) for count in re.findall(r"^ +[\d,]+ – [\d,]+ +█+ +(\d+) \(\d+\)$", done.stdout, re.MULTILINE)]
    assert sum(counts) == 200
    assert "as the chat template of" in done.stdout
    assert done.stdout.count("══ row") == 1


def test_preview_takes_settings_and_refuses_what_training_refuses(toml: Path) -> None:
    assert "1 documents" in preview(toml, "--rows", "1", "--dataset.no-packing").stdout
    wrong = preview(toml, "--dataset.packng", "false")
    assert wrong.returncode == 2
    assert "did you mean --dataset.packing?" in wrong.stderr
    for words in (["--step", "0"], ["--rows", "-1"], ["--dataset.path", "missing.jsonl"]):
        done = preview(toml, *words)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr


def test_reader_that_has_seen_enough_is_no_error(toml: Path) -> None:
    script = f"{sys.executable} {ROOT / 'scripts/preview_data.py'} {toml} --rows 100 | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.stderr == ""
    assert done.stdout.splitlines()[1] == "0"
