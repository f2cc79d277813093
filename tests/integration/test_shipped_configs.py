"""Every shipped config says the truth: about its adapters, and about the memory that it needs."""

import importlib.util
import re
import sys
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


def estimate_script() -> ModuleType:
    """scripts/estimate_memory.py, which is no package."""
    spec = importlib.util.spec_from_file_location("estimate_memory", ROOT / "scripts/estimate_memory.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["estimate_memory"] = importlib.util.module_from_spec(spec)  # its dataclass looks for its module there
    spec.loader.exec_module(module)
    return module
