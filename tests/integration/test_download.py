"""scripts/download.py with the real client against a small server that speaks the Hub's API."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import hub_server
import pytest
from conftest import ROOT
from hub_server import NEW, NOWHERE, OLD, Hub, hub_environment, serve_hub

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "chat_template.jinja")
CONFIGS = ("config.json", "generation_config.json")
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json")
BINS = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json")
META = ("consolidated.00.pth", "consolidated.01.pth", "params.json")
ORIGINAL = tuple(f"original/{name}" for name in (*META, "tokenizer.model"))
OTHERS = (
    *("README.md", ".gitattributes", "LICENSE", "model.Q4_K_M.gguf", "onnx/model.onnx", "onnx/config.json", "runs/events.out", "eval.json"),
    *("tf_model.h5", "flax_model.msgpack", "rust_model.ot", "training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state.pth"),
    *("adapter_model.safetensors", "adapter_config.json", "checkpoint-5/model.safetensors", "model.fp16.safetensors", "pytorch_model.fp16.bin"),
)
MODELS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "everything": ((*CONFIGS, *TOKENIZER, *SHARDS, *BINS, *META, *ORIGINAL), (*CONFIGS, *TOKENIZER, *SHARDS, "original/tokenizer.model")),
    "one-file": ((*CONFIGS, *TOKENIZER, "model.safetensors"), (*CONFIGS, *TOKENIZER, "model.safetensors")),
    "mistral": (
        (*CONFIGS, *TOKENIZER, *SHARDS, "consolidated.safetensors", "consolidated.safetensors.index.json", "params.json"),
        (*CONFIGS, *TOKENIZER, *SHARDS),
    ),
    "bins": ((*CONFIGS, *TOKENIZER, *BINS, *ORIGINAL), (*CONFIGS, *TOKENIZER, *BINS, "original/tokenizer.model")),
    "one-bin": ((*CONFIGS, *TOKENIZER, "pytorch_model.bin"), (*CONFIGS, *TOKENIZER, "pytorch_model.bin")),
    "meta": ((*META, "tokenizer.model", "tokenizer_checklist.chk"), (*META, "tokenizer.model", "tokenizer_checklist.chk")),
    "original": ((*CONFIGS, *TOKENIZER, *ORIGINAL), (*CONFIGS, *TOKENIZER, *ORIGINAL)),
}
"""What a repository holds besides OTHERS, and what is fetched of it."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    repositories = {name: (*files, *OTHERS) for name, (files, _) in MODELS.items()}
    repositories |= {"weightless": (*CONFIGS, *TOKENIZER), "gguf": ("config.json", "model.gguf"), "gated-files": (*CONFIGS, *SHARDS)}
    repositories |= {"only-consolidated": (*CONFIGS, "consolidated.safetensors")}
    for name, files in repositories.items():
        monkeypatch.setitem(hub_server.REPOSITORIES, f"someone/{name}", {file: f"{name}: {file}".encode() for file in files})
    with serve_hub() as endpoint:
        yield endpoint


def command(endpoint: str, home: Path, *words: str, **environment: str) -> tuple[list[str], dict[str, str]]:
    return [sys.executable, str(ROOT / "scripts/download.py"), *words], hub_environment(endpoint, home, HF_HUB_ETAG_TIMEOUT="3", **environment)


def download(endpoint: str, place: Path, repo_id: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    line, variables = command(endpoint, place / "home", repo_id, "--output_dir", str(place / "out"), *words, **environment)
    return subprocess.run(line, env=variables, capture_output=True, text=True, timeout=120)


def found(folder: Path) -> set[str]:
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {name.as_posix() for name in names if name.parts[0] != ".cache"}


def fetched() -> set[str]:
    """The files that the server was asked for."""
    return {path.partition(f"/resolve/{NEW}/")[2] for path in Hub.asked if f"/resolve/{NEW}/" in path}


def test_download_does_without_torch() -> None:
    code = "import sys, tunelib.formats.hub; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


@pytest.mark.parametrize("name", MODELS)
def test_download_fetches_what_training_needs(hub: str, tmp_path: Path, name: str) -> None:
    done = download(hub, tmp_path, f"someone/{name}")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    assert found(out) == fetched() == set(MODELS[name][1])
    assert all((out / file).read_text() == f"{name}: {file}" for file in found(out))
    weights = out / "original" if name == "original" else out
    assert done.stdout == f"someone/{name} is in {out}; train it with --checkpoint.initial_load_path {weights}\n"
    assert f"Fetching {len(MODELS[name][1])} files: 100%" in done.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--include", "original/*"), set(ORIGINAL)),
        (("--include", "original/*", "--exclude", "*.pth"), {"original/params.json", "original/tokenizer.model"}),
        (("--include", "*.gguf", "config.json"), {"model.Q4_K_M.gguf", "config.json"}),
        (("--exclude", "original/*", "chat_template*"), {*CONFIGS, *TOKENIZER, *SHARDS} - {"chat_template.jinja"}),
        (("--exclude", "*.safetensors"), {*CONFIGS, *TOKENIZER, *BINS, "original/tokenizer.model"}),
        (("--exclude", "*.safetensors", "*.bin", "consolidated*"), {*CONFIGS, *TOKENIZER, *ORIGINAL}),
        (("--exclude", "*.safetensors", "*.bin", "*.pth"), {*CONFIGS, *TOKENIZER, "original/tokenizer.model"}),
    ],
)
def test_patterns_choose_files(hub: str, tmp_path: Path, words: tuple[str, ...], expected: set[str]) -> None:
    done = download(hub, tmp_path, "someone/everything", *words)
    assert done.returncode == 0, done.stderr
    assert found(tmp_path / "out") == expected
    meta = any(name.endswith(".pth") for name in expected)
    assert done.stdout.rstrip().endswith(f"initial_load_path {tmp_path / 'out' / ('original' if meta else '')}")


def test_repository_without_weights_may_be_fetched_in_part(hub: str, tmp_path: Path) -> None:
    assert download(hub, tmp_path, "someone/weightless", "--include", "tokenizer*").returncode == 0
    assert found(tmp_path / "out") == {name for name in TOKENIZER if name.startswith("tokenizer")}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("someone/gated",), "someone/gated is gated: accept its licence on its page on the Hub, then give a token"),
        (("someone/gated-files",), "someone/gated-files is gated: accept its licence on its page on the Hub, then give a token"),
        (("someone/nothing",), "has no repository 'someone/nothing' that this token may see: check the name"),
        (("someone/one-file", "--revision", "v9"), "someone/one-file has no revision 'v9': give a branch"),
        (("a/b/c",), "'a/b/c' is not the name of a repository"),
        (("someone/weightless",), "someone/weightless has no weights that training can start from: neither *.safetensors nor"),
        (("someone/gguf",), "consolidated*.pth; it has model.gguf. --include names files"),
        (("someone/only-consolidated",), "consolidated*.pth; it has consolidated.safetensors. --include names files"),
        (("someone/gguf", "--include", "*.safetensors"), "leave nothing of someone/gguf, which has config.json, model.gguf"),
    ],
)
def test_download_says_what_to_do_and_fetches_nothing(hub: str, tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    done = download(hub, tmp_path, *words)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not found(tmp_path / "out")


def test_download_without_network_says_so_even_where_files_lie(hub: str, tmp_path: Path) -> None:
    for _ in range(2):
        done = download(NOWHERE, tmp_path, "someone/one-file")
        assert done.returncode == 2
        assert "someone/one-file cannot be fetched (ConnectError" in done.stderr
        assert "is there a way to the Hub? HF_ENDPOINT names a mirror" in done.stderr
        assert "Traceback" not in done.stderr
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out/config.json").write_text("half of a download")


def test_folder_that_cannot_be_written_is_not_blamed_on_the_network(hub: str, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    done = download(hub, tmp_path, "someone/one-file")
    assert done.returncode == 2
    assert f"can {tmp_path / 'out'} be written to?" in done.stderr


def test_revision_is_fetched(hub: str, tmp_path: Path) -> None:
    assert download(hub, tmp_path, "someone/one-file", "--revision", "v1").returncode == 0
    assert any(f"/resolve/{OLD}/" in path for path in Hub.asked)
    assert not fetched()


@pytest.mark.parametrize(("words", "expected"), [((), "Bearer hf_environment"), (("--hf_token", "hf_word"), "Bearer hf_word")])
def test_token_is_shown_to_the_hub(hub: str, tmp_path: Path, words: tuple[str, ...], expected: str) -> None:
    assert download(hub, tmp_path, "someone/one-file", *words, HF_TOKEN="hf_environment").returncode == 0
    assert {headers.get("authorization") for path, headers in Hub.headers_of if "someone/one-file" in path} == {expected}


def test_killed_download_keeps_the_files_that_it_had(hub: str, tmp_path: Path) -> None:
    Hub.stall = ("model.safetensors", 5)
    line, environment = command(hub, tmp_path / "home", "someone/one-file", "--output_dir", str(tmp_path / "out"))
    others = {*CONFIGS, *TOKENIZER}
    with subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not (others <= found(tmp_path / "out") and "model.safetensors" in fetched()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.kill()
    assert found(tmp_path / "out") == others  # a half of a file is never taken for one
    Hub.stall = None
    Hub.asked.clear()
    done = download(hub, tmp_path, "someone/one-file")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/model.safetensors").read_text() == "one-file: model.safetensors"
    assert fetched() == {"model.safetensors"}


def test_download_goes_on_after_the_connection_breaks(hub: str, tmp_path: Path) -> None:
    content = os.urandom(16 * 2**20)
    hub_server.REPOSITORIES["someone/one-file"]["model.safetensors"] = content
    Hub.drop = ("model.safetensors", 12 * 2**20)
    done = download(hub, tmp_path, "someone/one-file")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/model.safetensors").read_bytes() == content
    ranges = [headers["range"] for path, headers in Hub.headers_of if path.endswith("/model.safetensors") and "range" in headers]
    assert ranges == [f"bytes={10 * 2**20}-"]  # the client writes 10 MiB at a time
