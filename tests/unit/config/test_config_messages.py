"""The text of every message that a wrong config gives, against tests/golden/config/messages.txt.

After a change that is meant: ``UPDATE_GOLDEN=1 python -m pytest tests/unit/config/test_config_messages.py``, then read the diff.
"""

import os
import time
from pathlib import Path

import config_cases
import pytest
from config_cases import CASES, Case

from tunelib.config import layers, load_config
from tunelib.errors import ConfigError

GOLDEN = Path(__file__).parents[2] / "golden" / "config" / "messages.txt"


@pytest.mark.parametrize("name", CASES)
def test_message_is_the_golden_one(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    lay_out(case, tmp_path, monkeypatch)
    begun = time.process_time()
    problems = problems_of(case)
    assert time.process_time() - begun < 1
    golden = read_golden()
    if os.environ.get("UPDATE_GOLDEN"):
        golden[name] = problems
        write_golden({known: golden[known] for known in CASES if known in golden})
    assert problems == golden.get(name)


def test_golden_holds_no_other_case() -> None:
    assert list(read_golden()) == list(CASES)


def test_every_message_names_a_place_and_holds_one_line() -> None:
    for problems in read_golden().values():
        for problem in problems:
            assert problem.partition(": ")[0].partition(":")[0] in ("run.toml", "base.toml", "sub/b.toml", "command line"), problem


def test_config_is_needed() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(["--training.stpes", "5"])
    assert len(caught.value.problems) == 2
    assert "train_configs/debug_model.toml" in caught.value.problems[0]


def test_good_config_of_the_cases_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay_out(Case(config_cases.GOOD), tmp_path, monkeypatch)
    assert load_config(["run.toml"]).config.training.steps == 10


def lay_out(case: Case, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes the case's files, with one shipped config, and makes their folder the current one."""
    (folder / "run.toml").write_bytes(case.text if isinstance(case.text, bytes) else case.text.encode())
    for file, text in {"train_configs/debug_model.toml": "", **case.others}.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(layers, "SHIPPED_CONFIGS", folder / "train_configs")


def problems_of(case: Case) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config([case.file, *case.words], world_size=case.world_size)
    return caught.value.problems


def read_golden() -> dict[str, list[str]]:
    """Cases and messages: a line "# name" before the messages of each."""
    golden: dict[str, list[str]] = {}
    if GOLDEN.exists():
        for line in GOLDEN.read_text().splitlines():
            if line.startswith("# "):
                golden[line[2:]] = []
            elif line:
                golden[list(golden)[-1]].append(line)
    return golden


def write_golden(golden: dict[str, list[str]]) -> None:
    GOLDEN.write_text("\n".join("\n".join([f"# {name}", *problems, ""]) for name, problems in golden.items()))
