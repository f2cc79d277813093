"""Every kind of file gives the rows that were written to it, and says where it is broken."""

import csv
import gzip
import io
import json
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from tunelib.data import json_rows, raw_lines, readers
from tunelib.data.readers import RawRow, RawText, kind_of, read_file
from tunelib.data.sources import parse_row
from tunelib.errors import DataError

ROWS = [{"text": 'One.\nTwo, three\tand "four"', "id": "ü"}, {"text": "𝄞 \u2028 \r\n", "id": ""}, {"text": "", "id": "x" * 200_000}]


def as_table(delimiter: str) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, ["text", "id"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return file.getvalue().encode()


def as_parquet() -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)
    return file.getvalue()


def as_lines(rows: list[dict[str, Any]] = ROWS) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def zst(content: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(content)


FILES = {
    "a.jsonl": as_lines(),
    "a.ndjson": as_lines(),
    "array.json": json.dumps(ROWS).encode(),
    "pretty.json": json.dumps(ROWS, indent=4, ensure_ascii=False).encode(),
    "lines.json": as_lines(),
    "objects.json": "\n".join(json.dumps(row, indent=1) for row in ROWS).encode(),
    "a.csv": as_table(","),
    "a.tsv": as_table("\t"),
    "A.PARQUET": as_parquet(),
}


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rows_of(path: Path, **more: Any) -> list[dict[str, Any]]:
    return [parse_row(row.content, "here") for row in read_file(path, 0, **more) if isinstance(row, RawRow)]


def lines_of(path: Path) -> list[int]:
    return [row.line for row in read_file(path, 0)]


def parts_of(path: Path) -> list[RawText]:
    return [part for part in read_file(path, 0) if isinstance(part, RawText)]


def error_of(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        rows_of(path)
    return str(caught.value)


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zst], ids=["", ".gz", ".zst"])
@pytest.mark.parametrize("name", FILES)
def test_rows_are_what_was_written(tmp_path: Path, name: str, pack: Callable[[bytes], bytes]) -> None:
    suffix = {bytes: "", gzip.compress: ".gz", zst: ".zst"}[pack]
    assert rows_of(write(tmp_path / (name + suffix), pack(FILES[name]))) == ROWS


@pytest.mark.parametrize("name", [name for name in FILES if name != "A.PARQUET"])
def test_byte_order_mark_is_dropped(tmp_path: Path, name: str) -> None:
    assert rows_of(write(tmp_path / name, b"\xef\xbb\xbf" + FILES[name])) == ROWS


@pytest.mark.parametrize("name", [*FILES, "a.txt", "a.md", "a.txt.gz", "a.txt.zst", "a.parquet.gz"])
def test_empty_file_has_no_rows(tmp_path: Path, name: str) -> None:
    assert list(read_file(write(tmp_path / name, b""), 0)) == []


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a.csv"])
def test_file_with_nothing_but_a_byte_order_mark_has_no_rows(tmp_path: Path, name: str) -> None:
    assert list(read_file(write(tmp_path / name, b"\xef\xbb\xbf"), 0)) == []


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_file_with_nothing_but_space_has_no_rows(tmp_path: Path, name: str) -> None:
    assert list(read_file(write(tmp_path / name, b" \n\r\n"), 0)) == []


@pytest.mark.parametrize("content", ["[]", "[ \n ]\n", "text,id\n", "text,id"])
def test_list_or_table_without_rows_has_none(tmp_path: Path, content: str) -> None:
    assert rows_of(write(tmp_path / ("a.json" if content.startswith("[") else "a.csv"), content)) == []


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("x.jsonl.gz", ".jsonl"),
        ("x.json", ".json"),
        ("x.MD.ZST", ".md"),
        ("x.gz", ""),
        ("x.txt.gz.zst", ""),
        ("x.tar.gz", ""),
        ("jsonl", ""),
        ("x.bin", ""),
    ],
)
def test_kind_is_the_ending_before_the_compression(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_rows_begin_on_the_line_that_is_said(tmp_path: Path) -> None:
    assert lines_of(write(tmp_path / "a.jsonl", '{"a": 1}\n\n  \n{"a": "b\u2028c"}\r\n{"a": 2}')) == [1, 4, 5]
    assert lines_of(write(tmp_path / "a.json", '\n[\n {"a":\n 1},\n\n {"a": 2}, {"a": "\\n"},\n{}]\n')) == [3, 6, 6, 7]
    assert lines_of(write(tmp_path / "b.json", '\r\n{"a":\r\n 1}\r\n\r\n{"a": 2}{"a": 3}')) == [2, 5, 5]
    assert lines_of(write(tmp_path / "a.csv", '\ntext,id\n"a\n\nb",1\n\nc,2\r\n"d\r\n",3')) == [3, 7, 8]
    assert lines_of(write(tmp_path / "a.parquet", as_parquet())) == [1, 2, 3]


@pytest.mark.parametrize("chunk_bytes", [1, 2, 3, 7, 64])
def test_chunks_may_end_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
    rows = [{"text": "äé𝄞\n\\", "n": -1.5e10}, {"a": [None, True, {"b": "😀"}]}, {"nan": float("-inf")}]
    monkeypatch.setattr(raw_lines, "CHUNK_BYTES", chunk_bytes)
    for name, content in (("a.json", json.dumps(rows, indent=1)), ("b.json", as_lines(rows)), ("c.json", json.dumps(rows, ensure_ascii=False))):
        assert rows_of(write(tmp_path / name, content)) == rows
    text = "äé\r\n𝄞\n\n" * 3
    assert parts_of(write(tmp_path / "a.txt", "\ufeff" + text)) == [RawText(0, 1, text, True)]
    assert (
        error_of(write(tmp_path / "b.json", b'[{"a": 1},\n{"a": "\xc3\xa4\xff"}]'))
        == f"{tmp_path}/b.json:2: byte 20 of the file is not UTF-8; save it as UTF-8"
    )


def test_any_damage_to_json_is_an_error_and_never_other_rows(tmp_path: Path) -> None:
    chance = random.Random(0)
    for pretty in (None, 1):
        content = json.dumps([{"text": "a b", "n": [1, {}]}, {"text": "c"}, {"text": "ß"}], indent=pretty)
        for end in range(1, len(content) - 1):
            with pytest.raises(DataError, match=r"a\.json:\d+: "):
                rows_of(write(tmp_path / "a.json", content[:end]))
    for _ in range(200):
        place = chance.randrange(len(content))
        path = write(tmp_path / "a.json", content[:place] + chance.choice('{}[]",:x\n') + content[place + 1 :])
        try:
            expected = json.loads(path.read_text())
        except ValueError:
            expected = None
        if isinstance(expected, list) and all(isinstance(row, dict) for row in expected):
            assert rows_of(path) == expected
        else:
            assert error_of(path).startswith(f"{path}:")


BAD = [
    ("a.json", '{"a": 1}\n{"a": \n', ":3: not JSON: Expecting value: the file ends"),
    ("a.json", '{"a": 1}\n{"a" 1}', ":2: not JSON: Expecting ':' delimiter: 1}"),
    ("a.json", '[{"a": 1},\n{"a": "x\n"}]', ":2: not JSON: Invalid control character at: "),
    ("a.json", '[{"a": 1},\n]', ":2: not a JSON object: ]"),
    ("a.json", '[{"a": 1}\n {"a": 1}]', ":2: the list goes on with neither ',' nor ']'"),
    ("a.json", '[{"a": 1}\n', ":2: the file ends before its list does"),
    ("a.json", '[{"a": 1}]\n[{"a": 1}]', ":2: the file goes on after the end of its list"),
    ("a.json", "[\n1]", ":2: not a JSON object: 1]"),
    ("a.json", '"text"', ':1: not a JSON object: "text"'),
    ("a.json", "null", ":1: not a JSON object: null"),
    ("a.json", '{"a": ' + "[" * 100_000, ":1: not JSON: maximum recursion depth exceeded"),
    ("a.json", '{"a": ' + "1" * 5000 + "}", ":1: not JSON: Exceeds the limit (4300 digits) for integer string conversion"),
    ("a.json", '[{"a": "x"},\n{"a": "\\ud800"}]', ":2: \\ud800 is half of a character; no tokenizer can read it"),
    (
        "a.json",
        '{"version": 1,\n"data": [{"a": 1}]}\n',
        ":1: one object whose 'data' is a list of objects; save the list itself, or its objects one a line",
    ),
    ("a.json", b'{"a": 1}\n{"a": "\xff"}', ":2: byte 16 of the file is not UTF-8; save it as UTF-8"),
    ("a.json", b"\xff\xfe{\x00", ":1: byte 0 of the file is not UTF-8; save it as UTF-8"),
    ("a.txt", b"\xef\xbb\xbfa\nb\xff", ":2: byte 6 of the file is not UTF-8; save it as UTF-8"),
    ("a.txt", b"a\nb\xc3", ":2: byte 3 of the file is not UTF-8; save it as UTF-8"),
    ("a.csv", b"text\na\n\xff\n", ":3: byte 0 of the line is not UTF-8; save the file as UTF-8"),
    ("a.csv", "text,id\na,1\nb\n", ":3: 1 fields, but the first line names 2 columns"),
    ("a.csv", 'text,id\n"a\n",1\nb,2,3\n', ":4: 3 fields, but the first line names 2 columns"),
    ("a.csv", "text,id,text\n", ":1: the first line has to name the columns, each once; 'text' stands in it more than once"),
    ("a.csv", 'text\na\n"b\nc\n', ":3: not ','-separated values: unexpected end of data; is a quote opened and not closed?"),
    ("a.tsv", 'text\n"a" b\n', ":2: not '\\t'-separated values: '\t' expected after '\"'"),
    ("a.parquet", "not parquet at all", " is damaged or cut off: Parquet magic bytes not found in footer. Either the file is corrupted or this is "),
    ("a.parquet", as_parquet()[:-1], " is damaged or cut off: Parquet magic bytes not found in footer. Either the file is corrupted or this is "),
    ("a.jsonl.gz", gzip.compress(as_lines())[:-20], " is damaged or cut off: Compressed file ended before the end-of-stream marker was reached"),
    ("a.jsonl.gz", as_lines(), " is damaged or cut off: Not a gzipped file (b'{\"')"),
    ("a.jsonl.gz", gzip.compress(as_lines())[:-8] + bytes(8), " is damaged or cut off: CRC check failed"),
    ("a.txt.gz", gzip.compress(as_lines())[:40] + b"\xff" * 40, " is damaged or cut off: Error -3 while decompressing data: "),
    ("a.jsonl.zst", zst(as_lines())[:-1], " is damaged or cut off: it ends in the middle of a frame"),
    ("a.json.zst", as_lines(), " is damaged or cut off: zstd decompressor error: Unknown frame descriptor"),
    ("a.csv.zst", zst(as_table(",")) + b"more", " is damaged or cut off: zstd decompressor error: Unknown frame descriptor"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD, ids=range(len(BAD)))
def test_broken_file_says_where(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = write(tmp_path / name, content)
    found = error_of(path)
    assert found.startswith(f"{path}{message}")
    assert "\n" not in found


def test_single_row_of_a_known_column_is_no_wrapped_list(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "q"}]}
    path = write(tmp_path / "a.json", json.dumps(row))
    assert rows_of(path, columns=frozenset({"messages"})) == [row]
    two = write(tmp_path / "b.json", json.dumps(row) * 2)
    assert rows_of(two) == [row, row]
    assert "'messages' is a list of objects" in error_of(path)


def test_too_long_line_is_said_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (raw_lines, json_rows, readers):
        monkeypatch.setattr(module, "MAX_LINE_BYTES", 1 << 20)
    long = '{"text": "' + "x" * (3 << 20) + '"}'
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n' + long)
    advice = "one JSON object a line is read; if the file is one JSON array, name it .json"
    assert error_of(path) == f"{path}:2: a line of more than 1 MiB; {advice}"
    path = write(tmp_path / "a.json", '{"text": "a"}\n' + long)
    assert error_of(path) == f"{path}:2: an object of more than 1 MiB; if it holds a list of rows, save the list itself"
    path = write(tmp_path / "a.csv", 'text\n"a\n' + "b\n" * (1 << 20))
    assert error_of(path) == f"{path}:2: not ','-separated values: field larger than field limit (1048576); is a quote opened and not closed?"


def test_text_is_cut_after_line_ends_into_parts_that_join_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "TEXT_PART_CHARS", 10)
    text = "one\ntwo\nthree\r\n\n" + "é" * 25 + "\nthe last"
    parts = parts_of(write(tmp_path / "a.md", text))
    assert [(part.line, part.text, part.is_last) for part in parts] == [
        (1, "one\ntwo\n", False),
        (3, "three\r\n\n", False),
        (5, "é" * 10, False),
        (5, "é" * 10, False),
        (5, "é" * 5 + "\n", False),
        (6, "the last", True),
    ]
    assert "".join(part.text for part in parts_of(write(tmp_path / "b.txt", "a" * 20))) == "a" * 20


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst", "array.json", "lines.json", "a.jsonl", "a.jsonl.zst", "a.csv", "a.parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, name: str) -> None:
    count = 30_000
    text = "A line of text that is about as long as a line of text is.\n" * 17  # 1 kB; 30 MB in all
    row = {"text": text}
    if name == "a.parquet":
        with pyarrow.parquet.ParquetWriter(tmp_path / name, pyarrow.schema({"text": pyarrow.string()})) as writer:
            for _ in range(count // 1000):
                writer.write_table(pyarrow.Table.from_pylist([row] * 1000))
    else:
        line = {"t": text, "j": json.dumps(row) + ("," if name == "array.json" else "") + "\n", "c": f'"{text}"\n'}
        kind = "t" if ".txt" in name else "c" if name == "a.csv" else "j"
        content = (line[kind] * count).encode()
        content = b"[" + content[:-2] + b"]" if name == "array.json" else content
        pack = gzip.compress if name.endswith(".gz") else zst if name.endswith(".zst") else bytes
        write(tmp_path / name, pack(content))
        del content
    tracemalloc.start()
    try:
        found = sum(1 for _ in read_file(tmp_path / name, 0))
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found >= (28 if ".txt" in name else count - 1)
    assert peak_bytes < 12 << 20


def test_long_object_is_read_in_bounded_time_and_memory(tmp_path: Path) -> None:
    row = {"text": "x\n" * (5 << 20)}  # 15 MB of JSON: a dozen chunks
    path = write(tmp_path / "a.json", json.dumps([row, {"text": "last"}]))
    assert rows_of(path) == [row, {"text": "last"}]


def test_zst_of_several_frames_is_one_file(tmp_path: Path) -> None:
    skippable = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"hello"
    content = zst(as_lines(ROWS[:1])) + skippable + zst(b"") + zst(as_lines(ROWS[1:]))
    assert rows_of(write(tmp_path / "a.jsonl.zst", content)) == ROWS
    assert rows_of(write(tmp_path / "a.jsonl.gz", gzip.compress(as_lines(ROWS[:1])) + gzip.compress(as_lines(ROWS[1:])))) == ROWS


def test_file_that_is_not_read_to_its_end_is_closed(tmp_path: Path) -> None:
    for name, content in FILES.items():
        for suffix, pack in (("", bytes), (".gz", gzip.compress), (".zst", zst)):
            rows = read_file(write(tmp_path / (name + suffix), pack(content)), 3)
            assert next(rows).file == 3
            rows.close()  # type: ignore[attr-defined]  # a ResourceWarning is an error


@pytest.mark.parametrize(("name", "package"), [("a.parquet", "pyarrow"), ("a.jsonl.zst", "zstandard")])
def test_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    kind = ".zst" if name.endswith(".zst") else ".parquet"
    path = write(tmp_path / name, "")
    assert error_of(path) == f"{path}: {kind} files need the package {package}: pip install {package}"
