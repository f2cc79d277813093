"""A Hub data set streamed while training: exact after a resume on as many data ranks, refused on another number."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import TOKENIZER, Run, run_processes, run_ranks
from hub_server import hub_environment, serve_hub

WORDS = ["--training.global_batch_size", "4", "--checkpoint.enable_checkpoint", "--checkpoint.interval", "3"]


@pytest.fixture
def toml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "stream.toml"
    path.write_text(
        f"""
[model]
tokenizer_path = "{TOKENIZER}"
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 1
num_attention_heads = 2
[dataset]
hub = "someone/chats"
streaming = true
[training]
seq_len = 64
[validation]
enable = true
split = "test"
"""
    )
    with serve_hub() as endpoint:
        for name, value in hub_environment(endpoint, tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        yield path


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_streamed_run_resumes_exactly(world_size: int, toml: Path, tmp_path: Path) -> None:
    def words(folder: str, steps: int) -> list[str]:
        return [str(toml), "--job.dump_folder", str(tmp_path / folder), "--training.steps", str(steps), *WORDS]

    run_processes([words("whole", 7), words("halves", 3), words("halves", 7)], world_size)
    whole, halves = Run(tmp_path / "whole"), Run(tmp_path / "halves")
    assert len(whole.series("loss")) == 7
    assert halves.series("loss") == whole.series("loss")
    assert halves.series("grad_norm") == whole.series("grad_norm")
    assert len(whole.series("validation_loss")) == 2
    with pytest.raises(AssertionError, match=r"data ranks: \d then, \d now"):
        run_processes([words("halves", 9)], 3 - world_size)


SPOILT_ONCE = """
import json, math, sys
import train as program
take_step = program.train_step
for words in json.loads(sys.argv[1]):
    faulty = set()
    def step(model, optimizer, work, *rest):
        if work.number == 4 and not faulty:
            faulty.add(4)
            return math.nan, math.nan
        return take_step(model, optimizer, work, *rest)
    program.train_step = step
    program.main(words)
"""


def test_rollback_gives_a_stream_its_rows_again(toml: Path, tmp_path: Path) -> None:
    """To the very step before the one that is passed over, and further; the rows after it are those of a run that only skips it.

    In a process of its own: the Hub's client reads where the Hub is when it is imported.
    """
    cases = []
    for policy, interval in (("skip", "3"), ("rollback", "3"), ("rollback", "2")):
        folder = ["--job.dump_folder", str(tmp_path / f"{policy}{interval}")]
        cases.append([str(toml), *folder, "--training.steps", "7", *WORDS[:-1], interval, "--training.on_nonfinite", policy])
    program = tmp_path / "spoilt_once.py"
    program.write_text(SPOILT_ONCE)
    run_ranks(program, [json.dumps(cases)], 1, warnings="error")
    skipped = Run(tmp_path / "skip3").series("loss")
    assert len(skipped) == 6
    assert Run(tmp_path / "rollback3").series("loss") == Run(tmp_path / "rollback2").series("loss") == skipped


def test_row_that_one_rank_cannot_read_is_named_by_all(toml: Path, tmp_path: Path) -> None:
    words = [str(toml), "--job.dump_folder", str(tmp_path / "flawed"), "--training.steps", "9", "--dataset.hub", "someone/flawed"]
    with pytest.raises(AssertionError) as caught:  # with what the first of the processes, rank 0, has printed
        run_processes([[*words, "--validation.no-enable"]], 2)
    assert "someone/flawed[train] of rank 1, row 2: no message is the assistant's" in str(caught.value)
    assert "Connection closed" not in str(caught.value)
