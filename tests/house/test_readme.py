"""What README.md and docs/ name is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", *(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").glob("*.md")))]
MADE = ("outputs", "assets", ".venv")
"""What a run or a script makes; not in a fresh clone."""
PLACES = {path.name for path in ROOT.iterdir() if path.name not in MADE and not path.name.startswith(".")} | {".ci", "tunelib", "benchmarks"}


def find_paths(text: str) -> set[str]:
    """What stands in backticks or behind a link, and begins with a file or folder of the repository's root."""
    spans = [span for code in re.findall(r"```.*?```", text, re.DOTALL) for span in code.split()]
    spans += [word for span in re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)) for word in span.split()]
    spans += re.findall(r"\]\(([^)#\s]+)", text)
    words = (span.strip("\"',;:()").removeprefix("./").rstrip(".") for span in spans)
    return {word for word in words if re.fullmatch(r"[\w./-]+", word) and (word.split("/")[0] in PLACES or ("/" in word and word.endswith(".py")))}


def test_there_is_a_readme() -> None:
    assert (ROOT / "README.md").is_file()


@pytest.mark.parametrize("page", PAGES)
def test_paths_in_documents_exist(page: str) -> None:
    path = ROOT / page
    named = find_paths(path.read_text(encoding="utf-8"))
    bases = (ROOT, path.parent, ROOT / "tunelib")  # docs/house.md names files within the rooms
    missing = {name for name in named if not any((base / name).exists() for base in bases)}
    assert missing == set()


@pytest.mark.parametrize("page", PAGES)
def test_links_between_documents_lead_somewhere(page: str) -> None:
    path = ROOT / page
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8"))
    local = [link for link in links if not re.match(r"\w+:", link)]
    assert [link for link in local if not (path.parent / link).exists()] == []


def test_readme_shows_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for command in ("./run_train.sh", "./scripts/run_tests.sh"):
        assert command in text


def test_readme_finds_paths_where_there_are_some() -> None:
    text = "Run `./run_train.sh --x.y 1`, see `tunelib/files.py` and [docs](docs/config.md). `step-N` `a/b`"
    text += "\n```\npython train.py train_configs/debug_model.toml\n```\n"
    assert find_paths(text) == {"run_train.sh", "tunelib/files.py", "docs/config.md", "train.py", "train_configs/debug_model.toml"}
