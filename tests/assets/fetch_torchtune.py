#!/usr/bin/env python3
"""Fetch torchtune, which tests hold up as a reader of our files, into a folder of its own.

    python tests/assets/fetch_torchtune.py [--out assets/torchtune]

Programs that import it run with that folder in PYTHONPATH and take torch and the rest from the environment: pip installs what is listed
here and nothing that those depend on.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

DEFAULT_OUT = Path(__file__).resolve().parents[2] / "assets" / "torchtune"

PACKAGES = {
    "torchtune": "0.6.1",  # the last release
    "torchao": "0.10.0",  # of the same month; later ones have moved the NF4 tensors that torchtune imports
    "omegaconf": "2.4.0",  # imported with torchtune; this version needs PyYAML alone
    "psutil": "7.2.2",  # imported with torchtune
}


def fetch_torchtune(out: Path = DEFAULT_OUT) -> Path:
    """Return the folder for PYTHONPATH, fetched first if it is not there.

    Raises:
        CalledProcessError: pip cannot download or install the packages.
        FileExistsError: the folder holds something else.
    """
    if is_complete(out):
        return out
    if out.exists():
        raise FileExistsError(f"{out} does not hold exactly the versions of {Path(__file__).name}; remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch.", dir=out.parent) as scratch:
        target = Path(scratch) / "packages"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:"]
        pins = [f"{name}=={version}" for name, version in PACKAGES.items()]
        subprocess.run([*command, "--no-compile", "--target", str(target), *pins], check=True)
        try:
            os.rename(target, out)  # never half there, also when two processes fetch it at once
        except OSError:
            if not is_complete(out):
                raise
    return out


def is_complete(out: Path) -> bool:
    """Whether a folder holds the packages in these versions."""
    return all((out / f"{name}-{version}.dist-info").is_dir() for name, version in PACKAGES.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="the folder for PYTHONPATH; what is there is left alone")
    print(fetch_torchtune(parser.parse_args().out))


if __name__ == "__main__":
    main()
