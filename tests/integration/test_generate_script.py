"""scripts/generate.py: answers on stdout, a talk through a terminal, and what a user can get wrong as a sentence."""

import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TOKENIZER, run_script
from unit.samples import tiny_model, write_model

SCRIPT = [sys.executable, "-W", "error", str(ROOT / "scripts/generate.py")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny", tiny_model(torch.float32, vocab_size=640, max_position_embeddings=200), TOKENIZER)


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return run_script("generate.py", *words)


def test_answers_go_to_stdout_and_follow_the_seed(folder: Path) -> None:
    words = [folder, "--prompt", "Who?", "--prompt", "Where are you?", "--max_new_tokens", 6, "--temperature", 1, "--seed", 3]
    first = run(*words)
    assert first.returncode == 0, first.stderr
    assert [line.split(" → ")[0] for line in first.stdout.splitlines() if " → " in line] == ["'Who?'", "'Where are you?'"]
    assert "12 tokens" in first.stderr
    assert run(*words).stdout == first.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "give --prompt TEXT for an answer, or --chat to talk"),
        (["--prompt", "word " * 300], "the model's context is 200: shorten it"),
        (["--prompt", "x", "--chat_template", "none", "--system", "Be kind."], "no chat template that could tell the model"),
        (["--prompt", "x", "--top_k", "3"], "give a temperature"),
        (["--prompt", "x", "--adapter", "nowhere"], "nowhere/adapter_config.json does not exist"),
        (["--prompt", "x", "--chat_template", "chatlm"], "did you mean 'chatml'?"),
    ],
)
def test_what_is_wrong_is_said(folder: Path, words: list[str], says: str) -> None:
    ended = run(folder, *words)
    assert ended.returncode == 2, ended.stderr
    assert says in ended.stderr
    assert "Traceback" not in ended.stderr


def test_talk_through_a_terminal(folder: Path) -> None:
    """Two turns, the second after the first has ended; Ctrl-D ends."""
    ours, theirs = pty.openpty()
    words = [*SCRIPT, str(folder), "--chat", "--max_new_tokens", "8"]
    program = subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    said = ""

    def wait_for(text: str, count: int) -> None:
        nonlocal said
        deadline = time.monotonic() + 60
        while said.count(text) < count:
            assert time.monotonic() < deadline, said
            if select.select([ours], [], [], 1)[0]:
                said += os.read(ours, 4096).decode(errors="replace")

    try:
        for turn, line in enumerate(["Who are you?", "And where?"], 1):
            wait_for("> ", turn)
            os.write(ours, (line + "\n").encode())
        wait_for("> ", 3)
        os.write(ours, b"\x04")
        assert program.wait(timeout=60) == 0, said
    finally:
        program.kill()
        program.wait()
        os.close(ours)
    assert "/reset forgets what was said" in said
    assert "Traceback" not in said
