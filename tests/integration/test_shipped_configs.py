"""Every shipped config says the truth: about its adapters, and about the memory that it needs."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import ROOT

from tunelib.adapters import add_adapters
from tunelib.config import load_config
from tunelib.config.shipped import Shipped, list_shipped
from tunelib.config.sizes import SIZES
from tunelib.model.decoder import build_on_meta
from tunelib.model.families import parse_config
from tunelib.model.families.llama import ARCHITECTURE
from tunelib.parallel.tensor import check_split

SHIPPED = list_shipped()


@pytest.mark.parametrize("shipped", SHIPPED, ids=lambda shipped: shipped.name)
def test_config_is_as_it_says(shipped: Shipped, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is one that is known, its heads divide by the processes that share a layer, and its adapters are as many as it says."""
    monkeypatch.chdir(ROOT)
    config = load_config([str(shipped.path)], world_size=shipped.num_processes).config
    if "--model.flavor" not in shipped.words:
        return
    flavor = shipped.words[shipped.words.index("--model.flavor") + 1]
    known = parse_config({"architectures": [ARCHITECTURE], **SIZES[flavor]}, flavor)
    check_split(known, config.lora, config.parallelism.tensor_parallel_degree)
    said = re.findall(r"([0-9.]+) M trained parameters", shipped.path.read_text())
    assert not said or config.lora.enable
    if config.lora.enable:
        model = build_on_meta(known, torch.bfloat16)
        add_adapters(model, config.lora)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        assert all(float(number) == pytest.approx(trained / 1e6, rel=0.02) for number in said)


@pytest.mark.slow  # a step of each on paper: seconds, or minutes for the largest
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("shipped", SHIPPED, ids=lambda shipped: shipped.name)
def test_memory_is_what_the_script_estimates(shipped: Shipped, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The very figure in the file's head; and it leaves a tenth of the GPU that it names."""
    monkeypatch.chdir(ROOT)
    assert estimate_script().main([str(shipped.path), *shipped.words]) == 0
    peak = re.search(r"^peak +([0-9.]+) GiB", capsys.readouterr().out, re.MULTILINE)
    assert peak is not None
    assert peak[1] == shipped.memory_gib
    gpu = re.search(r"GPUs? of ([0-9]+) GB", shipped.machine)
    assert gpu is None or float(peak[1]) < 0.9 * int(gpu[1])


def test_program_lists_and_copies(tmp_path: Path) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, str(ROOT / "scripts/configs.py"), *words], capture_output=True, text=True, timeout=60, check=False)

    lines = run("ls").stdout.splitlines()
    assert [line.split()[0] for line in lines] == [shipped.name for shipped in SHIPPED]
    assert all(
        shipped.machine in line and f"{shipped.memory_gib} GiB  {shipped.description}" in line for shipped, line in zip(SHIPPED, lines, strict=True)
    )
    copied = run("cp", "llama2_7b_lora", str(tmp_path))
    assert (copied.returncode, copied.stderr) == (0, "")
    assert copied.stdout.endswith(f"based on llama2_7b_full.toml beside it; train it with: ./run_train.sh {tmp_path / 'llama2_7b_lora.toml'}\n")
    assert load_config([str(tmp_path / "llama2_7b_lora.toml")]).config.lora.rank == 8
    wrong = run("cp", "llama_7b", str(tmp_path))
    assert (wrong.returncode, wrong.stderr) == (2, "no config llama_7b is shipped; did you mean llama2_7b_lora?\n")


def estimate_script() -> ModuleType:
    """scripts/estimate_memory.py, which is no package."""
    spec = importlib.util.spec_from_file_location("estimate_memory", ROOT / "scripts/estimate_memory.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["estimate_memory"] = importlib.util.module_from_spec(spec)  # its dataclass looks for its module there
    spec.loader.exec_module(module)
    return module
