"""scripts/download.py with the real client against a small server that speaks the Hub's API."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {"config.json": b'{"architectures": ["LlamaForCausalLM"]}', "model.safetensors": b"weights", "original/params.json": b"{}", "README.md": b"#"}


class Hub(http.server.BaseHTTPRequestHandler):
    """One repository, someone/model, and one that is gated."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path.startswith("/api/models/someone/model/tree/"):
            self.answer(json.dumps([{"type": "file", "path": name, "oid": "0", "size": len(content)} for name, content in FILES.items()]).encode())
        elif path.startswith("/api/models/someone/model"):
            self.answer(json.dumps({"id": "someone/model", "sha": COMMIT, "siblings": [{"rfilename": name} for name in FILES]}).encode())
        elif path.startswith(f"/someone/model/resolve/{COMMIT}/"):
            content = FILES[path.removeprefix(f"/someone/model/resolve/{COMMIT}/")]
            self.answer(content, {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'})
        elif "gated" in path:
            self.answer(b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "ask first"}, 403)
        else:
            self.answer(b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "no such thing"}, 404)

    def answer(self, content: bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def download(endpoint: str, home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_ETAG_TIMEOUT": "3"}
    command = [sys.executable, str(ROOT / "scripts/download.py"), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_download_fetches_what_training_needs(hub: str, tmp_path: Path) -> None:
    done = download(hub, tmp_path, "someone/model", "--output_dir", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file() and ".cache" not in path.parts}
    assert found == {"config.json", "model.safetensors"}
    assert (tmp_path / "out/model.safetensors").read_bytes() == b"weights"


@pytest.mark.parametrize(
    ("repo_id", "message"),
    [
        ("someone/gated", "is gated: accept its licence"),
        ("someone/nothing", "has no repository 'someone/nothing'"),
        ("a/b/c", "is not the name of a repository"),
    ],
)
def test_download_says_what_to_do(hub: str, tmp_path: Path, repo_id: str, message: str) -> None:
    done = download(hub, tmp_path, repo_id, "--output_dir", str(tmp_path / "out"))
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_download_without_network_says_so(tmp_path: Path) -> None:
    done = download("http://127.0.0.1:9", tmp_path, "someone/model", "--output_dir", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "is there a way to the Hub?" in done.stderr
