"""A small server that speaks the Hub's API, with some data sets and room for models; for tests with the real clients."""

import contextlib
import hashlib
import http.server
import io
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

import pyarrow
import pyarrow.parquet
from conftest import ROOT

NOWHERE = "http://127.0.0.1:9"
OLD, NEW = "0" * 40, "1234567890" * 4
TRAIN = [{"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"ä{n}"}]} for n in range(600)]
TEST = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "test"}]}]


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(**columns: list[Any]) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


PAIR = b"""---
configs:
- config_name: small
  data_files: small.jsonl
- config_name: large
  data_files: large.jsonl
---
"""
IMAGES = b"""---
dataset_info:
  features:
  - name: image
    dtype: image
  - name: text
    dtype: string
---
"""
TOOLS = [{"messages": [{"content": "a", "arguments": {"x": 1}}]}, {"messages": [{"content": "b", "arguments": {"y": "z"}}]}]
REPOSITORIES: dict[str, dict[str, bytes]] = {
    "someone/chats": {"README.md": b"# Chats", "train.jsonl": lines(TRAIN), "test.jsonl": lines(TEST)},
    "someone/pair": {"README.md": PAIR, "small.jsonl": lines(TEST), "large.jsonl": lines(TRAIN)},
    "someone/bare": {"data/train-00000-of-00001.parquet": parquet(text=["a", "ß"])},
    "someone/images": {
        "README.md": IMAGES,
        "train.parquet": parquet(image=[{"bytes": b"no image", "path": "x.png"}], text=["a"]),
    },
    "someone/tools": {"README.md": b"#", "train.jsonl": lines(TOOLS)},
    "someone/broken": {"README.md": b"#", "train.jsonl": b'{"text": "a"}\n{"text": \n'},
    "someone/flawed": {"README.md": b"#", "train.jsonl": lines([*TRAIN[:3], {"messages": TRAIN[3]["messages"][:1]}, *TRAIN[4:40]])},
    "someone/empty": {"README.md": b"# nothing yet"},
}


class Hub(http.server.BaseHTTPRequestHandler):
    """Some repositories, each with two commits of the same files.

    someone/gated answers nothing to anybody; someone/gated-files shows its list, as the Hub does, and no file.
    """

    protocol_version = "HTTP/1.1"
    asked: list[str]
    headers_of: list[tuple[str, dict[str, str]]]
    """Each request's path and headers."""
    stall: tuple[str, int] | None
    """A file's path, and after how many of its bytes the server falls silent."""
    drop: tuple[str, int] | None
    """A file's path, and after how many of its bytes the server hangs up, once."""
    closing: threading.Event

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        content = self.rfile.read(length).decode()
        names = json.loads(content)["paths"] if content.startswith("{") else parse_qs(content)["paths"]
        self.do_GET(names)

    def do_GET(self, names: list[str] | None = None) -> None:
        path = unquote(self.path.split("?")[0])
        self.asked.append(path)
        self.headers_of.append((path, {key.lower(): value for key, value in self.headers.items()}))
        words = path.removeprefix("/api").removeprefix("/datasets").removeprefix("/models").lstrip("/").split("/")
        name, action, rest = "/".join(words[:2]), words[2] if len(words) > 2 else "", words[3:]
        files = REPOSITORIES.get(name)
        if name == "someone/gated" or (name == "someone/gated-files" and action == "resolve"):
            self.answer(b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "ask first"}, 403)
        elif files is None:
            self.answer(b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "no such thing"}, 404)
        elif rest and rest[0] not in ("main", "v1", OLD, NEW):
            self.answer(b"{}", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "no such revision"}, 404)
        elif action in ("", "revision"):
            siblings = [{"rfilename": file} for file in files]
            self.answer(json.dumps({"id": name, "sha": self.commit(rest), "siblings": siblings, "private": False}).encode())
        elif action in ("tree", "paths-info"):
            below = "/".join(rest[1:])
            found = [file for file in files if (names is None or file in names) and file.startswith(below)]
            folders = {file.rpartition("/")[0] for file in found} - {""}
            entries = [{"type": "directory", "path": folder, "oid": "0"} for folder in folders if names is None and folder != below]
            entries += [{"type": "file", "path": file, "oid": self.digest(files[file]), "size": len(files[file])} for file in found]
            missing = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "no such folder"} if below and not entries else {}
            self.answer(b"{}" if missing else json.dumps(entries).encode(), missing, 404 if missing else 200)
        elif "/".join(rest[1:]) in files:
            content = files["/".join(rest[1:])]
            first, last = 0, len(content)
            if asked := self.headers.get("Range"):
                first, _, end = asked.removeprefix("bytes=").partition("-")
                first, last = int(first), min(int(end) + 1 if end else len(content), len(content))
            headers = {"X-Repo-Commit": self.commit(rest), "ETag": f'"{self.digest(content)}"', "Accept-Ranges": "bytes"}
            if asked:
                headers["Content-Range"] = f"bytes {first}-{last - 1}/{len(content)}"
            self.answer(content[first:last], headers, 206 if asked else 200)
        else:
            headers = {"X-Repo-Commit": self.commit(rest), "X-Error-Code": "EntryNotFound", "X-Error-Message": "no such file"}
            self.answer(b"{}", headers, 404)

    def commit(self, rest: list[str]) -> str:
        return OLD if rest and rest[0] in ("v1", OLD) else NEW

    def digest(self, content: bytes) -> str:
        return hashlib.sha256(content).hexdigest()

    def answer(self, content: bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), "Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        path = unquote(self.path.split("?")[0])
        if self.stall and path.endswith(f"/{self.stall[0]}"):
            self.wfile.write(content[: self.stall[1]])
            self.closing.wait()
        elif self.drop and path.endswith(f"/{self.drop[0]}"):
            self.wfile.write(content[: self.drop[1]])
            self.close_connection, Hub.drop = True, None
        else:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def serve_hub() -> Iterator[str]:
    """The address of the server, while it runs."""
    Hub.asked, Hub.headers_of, Hub.stall, Hub.drop, Hub.closing = [], [], None, None, threading.Event()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True  # clients keep their connections open
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        Hub.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()


def hub_environment(endpoint: str, home: Path, **more: str) -> dict[str, str]:
    """The environment of a process whose Hub is the server, and whose cache is ``home``."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return kept | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)} | more
