"""A source is found, digested and read, or it is said what is wrong with it, and where."""

import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT

from tunelib.config.schema import Columns, Source
from tunelib.data import sources
from tunelib.data.readers import RawRow, RawText
from tunelib.data.sources import OpenedSource, open_source, parse_row
from tunelib.errors import DataError

LINE = '{"text": "a"}\n'


def write(path: Path, content: str | bytes = LINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def opened(path: Path | str, cache: Path | None = None) -> OpenedSource:
    return open_source(Source(path=str(path)), cache or Path("never-made"))


def error_of(path: Path | str, cache: Path | None = None) -> str:
    with pytest.raises(DataError) as caught:
        list(opened(path, cache).rows())
    return str(caught.value)


def names_in(source: OpenedSource, folder: Path) -> list[str]:
    return [Path(file).relative_to(folder).as_posix() for file in source.files]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{", "not JSON: Expecting property name enclosed in double quotes at column 2; a .jsonl file has one JSON object a line"),
        (b'{"text": "a"} {"text": "b"}', "not JSON: Extra data at column 15; a .jsonl file has one JSON object a line"),
        (b"[1]", "not a JSON object: [1]"),
        (b'"text"', 'not a JSON object: "text"'),
        (b"null", "not a JSON object: null"),
        (b"[" * 100_000, "not JSON: maximum recursion depth exceeded"),
        (b'{"n": ' + b"1" * 5000 + b"}", "not JSON: Exceeds the limit (4300 digits) for integer string conversion"),
        (b'{"text": "\xff"}', "byte 10 of the line is not UTF-8; save the file as UTF-8"),
        (b"\xef\xbb\xbf{}", "not JSON: Unexpected UTF-8 BOM"),
        (b'{"text": ["\\ud83d\\ude00 \\uDC00"]}', "\\udc00 is half of a character; no tokenizer can read it"),
        (b'{"text": {"\\ud800": 1}}', "\\ud800 is half of a character; no tokenizer can read it"),
    ],
)
def test_broken_line_is_named_with_file_and_line(tmp_path: Path, line: bytes, words: str) -> None:
    source = opened(write(tmp_path / "data.jsonl", b'{"text": "good"}\n\n' + line + b"\n"))
    first, row = source.rows()
    assert isinstance(first, RawRow)
    assert isinstance(row, RawRow)
    assert parse_row(first.content, "") == {"text": "good"}
    with pytest.raises(DataError) as caught:
        parse_row(row.content, source.where(row.file, row.line))
    assert str(caught.value).startswith(f"{tmp_path}/data.jsonl:3: {words}")


def test_row_that_is_whole_is_parsed_and_one_that_was_read_is_returned() -> None:
    row = {"text": "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"), "n": [1.5, None, float("inf")], "escaped": "\\ud800"}
    assert parse_row(json.dumps(row).encode() + b"\r\n", "here") == row
    assert parse_row(row, "here") is row


def test_long_line_that_is_no_object_is_shortened_in_the_message() -> None:
    with pytest.raises(DataError) as caught:
        parse_row(json.dumps(["x" * 10_000]).encode(), "file:7")
    assert len(str(caught.value)) < 200


def test_files_of_every_kind_are_one_source(tmp_path: Path) -> None:
    write(tmp_path / "b/two.json", '[{"text": "b"},\n{"text": "c"}]')
    write(tmp_path / "a.jsonl.gz", gzip.compress(LINE.encode()))
    write(tmp_path / "b.txt", "one\ntwo\n")
    write(tmp_path / "b/three.csv", "text\nd\n")
    write(tmp_path / ".hidden.jsonl", "{")
    write(tmp_path / ".git/x.jsonl", "{")
    write(tmp_path / "x.bin", "?")
    write(tmp_path / "b/weights.pt", "?")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["e", "f"]}), tmp_path / "c.parquet")
    source = opened(tmp_path)
    assert source.name == str(tmp_path)
    assert names_in(source, tmp_path) == ["a.jsonl.gz", "b.txt", "b/three.csv", "b/two.json", "c.parquet"]
    assert source.notes == (f"{tmp_path}: 2 files are of a kind that is not read, for example {tmp_path}/b/weights.pt",)
    assert source.size_bytes == sum(Path(file).stat().st_size for file in source.files)
    rows = list(source.rows())
    assert rows == list(source.rows())
    texts = [row.text if isinstance(row, RawText) else parse_row(row.content, "")["text"] for row in rows]
    assert texts == [
        "a",
        "one\ntwo\n",
        "d",
        "b",
        "c",
        "e",
        "f",
    ]
    places = [source.where(row.file, row.line).removeprefix(f"{tmp_path}/") for row in rows]
    assert places == ["a.jsonl.gz:1", "b.txt:1", "b/three.csv:2", "b/two.json:1", "b/two.json:2", "c.parquet, row 1", "c.parquet, row 2"]


def test_one_row_of_a_named_column_is_a_row(tmp_path: Path) -> None:
    row = {"turns": [{"from": "human", "value": "q"}]}
    source = Source(path=str(write(tmp_path / "a.json", json.dumps(row))), columns=Columns(messages="turns"))
    assert [found.content for found in open_source(source, tmp_path).rows() if isinstance(found, RawRow)] == [row]


def test_folder_may_have_the_name_of_a_file(tmp_path: Path) -> None:
    write(tmp_path / "part.jsonl/part-0.json")
    assert names_in(opened(tmp_path / "part.jsonl"), tmp_path) == ["part.jsonl/part-0.json"]
    assert names_in(opened(tmp_path), tmp_path) == ["part.jsonl/part-0.json"]
    assert names_in(opened(tmp_path / "*.jsonl"), tmp_path) == ["part.jsonl/part-0.json"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jsonl", ["a1.jsonl", "a2.jsonl"]),
        ("a?.jsonl", ["a1.jsonl", "a2.jsonl"]),
        ("a[2-9].jsonl", ["a2.jsonl"]),
        ("*/*.jsonl", ["b/a3.jsonl"]),
        ("**/*.jsonl", ["a1.jsonl", "a2.jsonl", "b/a3.jsonl", "b/c/a4.jsonl"]),
        ("**/c/*", ["b/c/a4.jsonl"]),
        ("**/**/a4.*", ["b/c/a4.jsonl"]),
        ("b/**", ["b/a3.jsonl", "b/c/a4.jsonl"]),
        ("b*", ["b/a3.jsonl", "b/c/a4.jsonl"]),
    ],
)
def test_pattern_names_files_and_folders(tmp_path: Path, pattern: str, expected: list[str]) -> None:
    for name in ("a1.jsonl", "a2.jsonl", "b/a3.jsonl", "b/c/a4.jsonl", ".d/a5.jsonl", "b/.a6.jsonl"):
        write(tmp_path / name)
    source = opened(tmp_path / pattern)
    assert source.name == str(tmp_path / pattern)
    assert names_in(source, tmp_path) == expected


def test_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path: Path) -> None:
    write(tmp_path / "a1.jsonl")
    write(tmp_path / "a[1].jsonl")
    assert names_in(opened(tmp_path / "a[1].jsonl"), tmp_path) == ["a[1].jsonl"]


def test_links_are_followed(tmp_path: Path) -> None:
    write(tmp_path / "real/a.jsonl")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/folder").symlink_to(tmp_path / "real")
    (tmp_path / "data/file.jsonl").symlink_to(tmp_path / "real/a.jsonl")
    expected = ["data/file.jsonl", "data/folder/a.jsonl"]
    assert names_in(opened(tmp_path / "data"), tmp_path) == expected
    assert names_in(opened(tmp_path / "data/**/*.jsonl"), tmp_path) == expected


def test_link_in_a_circle_is_named(tmp_path: Path) -> None:
    write(tmp_path / "data/deep/a.jsonl")
    (tmp_path / "data/deep/again").symlink_to(tmp_path / "data")
    (tmp_path / "self").symlink_to(tmp_path / "self")
    circle = f"{tmp_path}/data/deep/again is a link to a folder that it lies in; remove the link, or name the files with a pattern"
    for path in ("data", "data/**/*.jsonl", "dat*"):
        assert error_of(tmp_path / path) == circle
    assert names_in(opened(tmp_path / "data/*/*.jsonl"), tmp_path) == ["data/deep/a.jsonl"]
    assert error_of(tmp_path / "self") == f"{tmp_path}/self is a link that leads back to itself"
    assert error_of(tmp_path / "*") == f"{tmp_path}/self is a link that leads back to itself"


def test_path_that_cannot_be_read_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = ".jsonl, .ndjson, .json, .parquet, .csv, .tsv, .txt and .md, each also as .gz or .zst"
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "chats.jsonl")
    write(tmp_path / "only/weights.pt")
    write(tmp_path / "only/.a.jsonl")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "links").mkdir()
    (tmp_path / "links/gone.jsonl").symlink_to(tmp_path / "nowhere")
    expected = {
        "chat.jsonl": "chat.jsonl: no such data file; did you mean chats.jsonl?",
        "none.txt": "none.txt: no such data file",
        "none/none.txt": "none/none.txt: no such data file",
        "chats.jsonl/x": 'chats.jsonl/x: no such data file; for a data set on the Hub, write dataset.hub = "chats.jsonl/x"',
        "tatsu-lab/alpaca": 'tatsu-lab/alpaca: no such data file; for a data set on the Hub, write dataset.hub = "tatsu-lab/alpaca"',
        "*.csv": "*.csv: no file matches this pattern",
        "none/*.csv": "none/*.csv: no file matches this pattern",
        "only/*.pt": f"only/*.pt holds no file of a kind that is read ({kinds}); there are others, for example only/weights.pt",
        "only": f"only holds no file of a kind that is read ({kinds}); there are others, for example only/weights.pt",
        "empty": f"empty holds no file of a kind that is read ({kinds})",
        "only/weights.pt": f"only/weights.pt: .pt is not a kind that is read; {kinds} are",
        "pipe.jsonl": "pipe.jsonl is a pipe, a socket or a device; data is read more than once, so save it as a file",
        "/dev/zero": f"/dev/zero: a file without a suffix is not a kind that is read; {kinds} are",
        "links": "links/gone.jsonl is a link to a file that does not exist",
        "links/gone.jsonl": "links/gone.jsonl is a link to a file that does not exist",
    }
    assert {path: error_of(path) for path in expected} == expected


def test_file_without_permission_is_named() -> None:
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as name:  # pytest's folders are closed to others
        folder = Path(name)
        folder.chmod(0o755)
        file, closed = write(folder / "a.jsonl"), write(folder / "closed/b.jsonl").parent
        file.chmod(0)
        closed.chmod(0)
        try:
            if user == 0:
                os.seteuid(65534)  # root may read everything
            found = [error_of(path) for path in (file, closed, closed / "b.jsonl", folder / "closed/*")]
        finally:
            os.seteuid(user)
            closed.chmod(0o755)
    assert found == [f"{path} cannot be read: Permission denied" for path in (file, closed, closed / "b.jsonl", f"{closed}/*")]


def test_file_that_is_gone_when_it_is_read_is_named(tmp_path: Path) -> None:
    source = opened(write(tmp_path / "a.jsonl"))
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(DataError) as caught:
        list(source.rows())
    assert str(caught.value) == f"{tmp_path}/a.jsonl cannot be read: No such file or directory"


def test_digest_is_of_bytes_and_names_within_the_source(tmp_path: Path) -> None:
    one = write(tmp_path / "one/a.jsonl").parent
    assert opened(one).digest == opened(write(tmp_path / "two/a.jsonl").parent).digest == opened(f"{one}/*").digest
    others = [write(tmp_path / "three/b.jsonl").parent, write(tmp_path / "four/a.jsonl", '{"text": "b"}\n').parent, write(tmp_path / "a.txt")]
    assert len({opened(path).digest for path in (one, *others)}) == 4
    assert opened(write(tmp_path / "x.jsonl")).digest == opened(write(tmp_path / "renamed.jsonl")).digest


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A file for whose digest a memo is kept."""
    return write(tmp_path / "large.jsonl", LINE * (2 * sources.MEMO_MIN_BYTES // len(LINE)))


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """All files were last changed a while ago."""
    now = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() + 3 * 10**9)


def count_digests(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    digested: list[Path] = []
    real = sources._digest_bytes
    monkeypatch.setattr(sources, "_digest_bytes", lambda path: digested.append(path) or real(path))
    return digested


@pytest.mark.usefixtures("later")
def test_unchanged_file_is_digested_once(tmp_path: Path, large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digested = count_digests(monkeypatch)
    first = opened(large, tmp_path / "cache")
    assert opened(large, tmp_path / "cache") == first
    monkeypatch.chdir(tmp_path)
    assert opened("large.jsonl", tmp_path / "cache").digest == first.digest
    assert len(digested) == 1
    (memo,) = (tmp_path / "cache/digests").glob("*.json")
    memo.write_text("{")
    assert opened(large, tmp_path / "cache") == first
    assert len(digested) == 2


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize("change", ["content", "time", "file"])
def test_changed_file_is_digested_again(tmp_path: Path, large: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    digested = count_digests(monkeypatch)
    first, before = opened(large, tmp_path / "cache"), large.stat()
    if change == "content":  # of the same length, with the old time set again
        with open(large, "r+b") as file:
            file.write(b" ")
        os.utime(large, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif change == "time":
        os.utime(large)
    else:
        shutil.copy2(large, tmp_path / "copy")
        os.replace(tmp_path / "copy", large)
    assert (opened(large, tmp_path / "cache").digest == first.digest) == (change != "content")
    assert len(digested) == 2


def test_file_changed_just_now_is_digested_again(tmp_path: Path, large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digested = count_digests(monkeypatch)
    assert opened(large, tmp_path / "cache") == opened(large, tmp_path / "cache")
    assert len(digested) == 2


def test_file_that_changes_while_it_is_digested_is_refused(tmp_path: Path, large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_digest_bytes", lambda path: path.write_text("more") and "0")
    assert error_of(large, tmp_path / "cache") == f"{large} changed while it was read; start again when it is complete"


def test_cache_that_cannot_be_written_is_named(tmp_path: Path, large: Path) -> None:
    write(tmp_path / "file")
    message = f"{tmp_path}/file/cache/digests cannot be written: Not a directory; give dataset.cache_folder another folder"
    assert error_of(large, tmp_path / "file/cache") == message


def test_processes_that_start_at_once_digest_a_file_once(tmp_path: Path, large: Path) -> None:
    program = """
import sys, time
from pathlib import Path
from tunelib.config.schema import Source
from tunelib.data import sources
real, now = sources._digest_bytes, time.time_ns
def digest(path):
    print("digested", flush=True)
    time.sleep(0.5)  # longer than one process starts after the other
    return real(path)
sources._digest_bytes, time.time_ns = digest, lambda: now() + 3 * 10**9
print(sources.open_source(Source(path=sys.argv[1]), Path(sys.argv[2])).digest)
"""
    command = [sys.executable, "-c", program, str(large), str(tmp_path / "cache")]
    processes = [subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    words = [process.communicate(timeout=60)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sum(found.count("digested") for found in words) == 1
    assert {found[-1] for found in words} == {opened(large, tmp_path / "other").digest}


def test_small_files_leave_nothing_in_the_cache(tmp_path: Path) -> None:
    opened(write(tmp_path / "a.jsonl"), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_opening_a_source_imports_neither_datasets_nor_pyarrow(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from tunelib.config.schema import Source
from tunelib.data.sources import open_source
list(open_source(Source(path=sys.argv[1]), Path("never-made")).rows())
sys.exit(1 if {"torch", "datasets", "pyarrow", "zstandard", "huggingface_hub"} & sys.modules.keys() else 0)
"""
    command = [sys.executable, "-c", program, str(write(tmp_path / "a.jsonl"))]
    assert subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False).returncode == 0


def test_missing_package_datasets_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    source: Any = Source(hub="owner/name")
    with pytest.raises(DataError) as caught:
        open_source(source, tmp_path)
    assert str(caught.value) == "owner/name: data sets on the Hub need the package datasets: pip install datasets"
