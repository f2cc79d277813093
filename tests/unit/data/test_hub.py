"""Data sets on the Hub, with the real clients against a small server that speaks the Hub's API, and without a network."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import NEW, NOWHERE, OLD, TEST, TOOLS, TRAIN, Hub, hub_environment, serve_hub


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    with serve_hub() as endpoint:
        yield endpoint


PROGRAM = """
import json, sys, time
from pathlib import Path
from tunelib.config.schema import Source
from tunelib.data.hub import stream_hub
from tunelib.data.sources import open_source
from tunelib.errors import DataError
time.sleep = lambda seconds: None  # what the client waits before it asks again
for keywords in json.loads(sys.argv[1]):
    streaming = keywords.pop("streaming", False)
    try:
        if streaming:
            dataset, _, digest = stream_hub(Source(**keywords))
            answer = {"rows": list(dataset), "digest": digest}
        else:
            opened = open_source(Source(**keywords), Path("never-made"))
            rows = list(opened.rows())
            answer = {"rows": [row.content for row in rows], "digest": opened.digest, "notes": opened.notes, "size_bytes": opened.size_bytes}
            answer |= {"last": opened.where(rows[-1].file, rows[-1].line), "name": opened.name, "files": opened.files}
    except DataError as error:
        answer = str(error)
    print(json.dumps(answer))
"""


def ask(endpoint: str, home: Path, *sources: dict[str, Any], **more: str) -> list[Any]:
    """What opening and reading each source gives, or its error, from one process that is told nothing else and says nothing else."""
    home.mkdir(exist_ok=True)
    command = [sys.executable, "-W", "error", "-c", PROGRAM, json.dumps(sources)]
    done = subprocess.run(command, env=hub_environment(endpoint, home, **more), cwd=home, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def home(hub: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache in which someone/chats is, at two commits, the newest used last."""
    home = tmp_path_factory.mktemp("hub") / "home"
    ask(hub, home, {"hub": "someone/chats", "revision": "v1"}, {"hub": "someone/chats"})
    return home


def test_rows_are_those_of_the_split(hub: str, home: Path) -> None:
    chats, test, v1, both = ask(
        hub,
        home,
        {"hub": "someone/chats"},
        {"hub": "someone/chats", "split": "test"},
        {"hub": "someone/chats", "revision": "v1"},
        {"hub": "someone/chats", "split": "train[:2]+test"},
    )
    assert chats["rows"] == TRAIN
    assert (chats["name"], chats["files"], chats["last"]) == ("someone/chats", ["someone/chats[train]"], "someone/chats[train], row 600")
    assert chats["size_bytes"] > 10_000
    assert test["rows"] == TEST
    assert both["rows"] == TRAIN[:2] + TEST
    assert len({answer["digest"] for answer in (chats, test, v1, both)}) == 4


def test_data_sets_of_every_make_are_read(hub: str, tmp_path: Path) -> None:
    bare, images, tools, subset = ask(
        hub,
        tmp_path / "home",
        {"hub": "someone/bare"},
        {"hub": "someone/images"},
        {"hub": "someone/tools"},
        {"hub": "someone/pair", "subset": "large"},
    )
    assert bare["rows"] == [{"text": "a"}, {"text": "ß"}]
    assert images["rows"] == [{"text": "a"}]
    assert images["notes"] == [f"someone/images: at commit {NEW}", "someone/images: columns with images, sound and the like are left out: image"]
    assert tools["rows"] == TOOLS
    assert subset["rows"] == TRAIN
    assert subset["last"] == "someone/pair/large[train], row 600"


PROBLEMS: list[tuple[dict[str, Any], str]] = [
    (
        {"hub": "someone/gated"},
        "someone/gated is gated: accept its licence on its page on the Hub, then give a token of that account with HF_TOKEN",
    ),
    (
        {"hub": "someone/nothing"},
        "the Hub has no data set 'someone/nothing' that your token may see: check the name, or give a token with HF_TOKEN",
    ),
    ({"hub": "json"}, 'dataset.hub = "json" is not of the form "owner/name"'),
    ({"hub": "a b/c"}, """dataset.hub = "a b/c" is not the name of a data set: Repo id must"""),
    ({"hub": "someone/chats", "revision": "v3"}, "someone/chats has no revision 'v3'"),
    ({"hub": "someone/chats", "split": "validation"}, "someone/chats has no split 'validation'; set dataset.split to one of 'train', 'test'"),
    ({"hub": "someone/chats", "split": "train[:10%]+tset"}, "someone/chats has no split 'tset'; set dataset.split to one of 'train', 'test'"),
    ({"hub": "someone/pair"}, "someone/pair has several subsets; set dataset.subset to one of 'small', 'large'"),
    ({"hub": "someone/pair", "subset": "middle"}, "someone/pair has no subset 'middle'; set dataset.subset to one of 'small', 'large'"),
    ({"hub": "someone/broken"}, "someone/broken cannot be fetched: ArrowInvalid: JSON parse error: Invalid value. in row 1"),
    ({"hub": "someone/empty"}, "someone/empty cannot be opened: EmptyDatasetError: "),
]


@pytest.fixture(scope="module")
def answers(hub: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What is said of each of the problems: all asked in one process, since `datasets` takes a second to import."""
    found = ask(hub, tmp_path_factory.mktemp("bad") / "home", *(source for source, _ in PROBLEMS))
    return {str(source): answer for (source, _), answer in zip(PROBLEMS, found, strict=True)}


@pytest.mark.parametrize(("source", "message"), PROBLEMS, ids=str)
def test_what_is_wrong_is_said(source: dict[str, Any], message: str, answers: dict[str, str]) -> None:
    assert answers[str(source)].startswith(message)


def test_local_folder_is_not_taken_for_a_data_set(hub: str, tmp_path: Path) -> None:
    (tmp_path / "home/someone/chats").mkdir(parents=True)
    (answer,) = ask(hub, tmp_path / "home", {"hub": "someone/chats"})
    assert answer.startswith('dataset.hub = "someone/chats": a local file or folder has this name too; write dataset.path for it')


def test_nothing_is_asked_but_of_the_hub_and_nothing_that_counts_downloads(hub: str, home: Path) -> None:
    Hub.asked.clear()
    ask(hub, home, {"hub": "someone/chats"})
    assert not [path for path in Hub.asked if "telemetry" in path or path.endswith(".jsonl")]


def test_without_network_the_cache_is_read_with_the_same_digest(hub: str, home: Path) -> None:
    (online,) = ask(hub, home, {"hub": "someone/chats"})
    for answers in (ask(NOWHERE, home, {"hub": "someone/chats"}), ask(hub, home, {"hub": "someone/chats"}, HF_HUB_OFFLINE="1")):
        assert answers == [online]


def test_without_network_another_commit_is_not_taken_in_silence(home: Path) -> None:
    answers = ask(NOWHERE, home, {"hub": "someone/chats", "revision": "v1"}, {"hub": "someone/chats", "revision": NEW}, HF_HUB_OFFLINE="1")
    assert answers[0] == f'someone/chats: the Hub does not answer for commit {OLD}; dataset.revision = "{NEW}" is in the cache'
    assert answers[1]["rows"] == TRAIN


def test_without_network_and_cache_it_is_said(tmp_path: Path) -> None:
    (answer,) = ask(NOWHERE, tmp_path / "home", {"hub": "someone/chats"})
    assert answer == (
        "someone/chats is not in the cache and cannot be fetched (ConnectError: [Errno 111] Connection refused): is there a way to the Hub? "
        "HF_ENDPOINT names a mirror"
    )


def test_stream_has_the_rows_and_the_digest_of_what_is_fetched(hub: str, home: Path) -> None:
    source = {"hub": "someone/chats"}
    fetched, streamed, images, unknown = ask(
        hub,
        home,
        source,
        source | {"streaming": True},
        {"hub": "someone/images", "streaming": True},
        source | {"split": "tset", "streaming": True},
    )
    assert streamed == {"rows": fetched["rows"], "digest": fetched["digest"]}
    assert images["rows"] == [{"text": "a"}]
    assert unknown == "someone/chats has no split 'tset'; set dataset.split to one of 'train', 'test'"


def test_stream_resumes_and_is_sharded(hub: str, home: Path) -> None:
    program = """
import json
from datasets.distributed import split_dataset_by_node
from tunelib.config.schema import Source
from tunelib.data.hub import stream_hub
dataset, *_ = stream_hub(Source(hub="someone/chats"))
shards = [split_dataset_by_node(dataset, rank, 2) for rank in range(2)]
rows = iter(shards[1])
first = [next(rows) for _ in range(100)]
state = shards[1].state_dict()
resumed = split_dataset_by_node(stream_hub(Source(hub="someone/chats"))[0], 1, 2)
resumed.load_state_dict(json.loads(json.dumps(state)))
print(json.dumps([list(shards[0]), first + list(resumed)]))
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], env=hub_environment(hub, home), cwd=home, capture_output=True, text=True, timeout=120
    )
    assert done.stderr == ""
    shards = json.loads(done.stdout)
    assert shards == [TRAIN[0::2], TRAIN[1::2]]
