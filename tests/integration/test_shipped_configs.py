"""Every shipped config passes the check, and says the truth about its adapters."""

import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from tunelib.adapters import add_adapters
from tunelib.config import load_config
from tunelib.config.sizes import SIZES
from tunelib.model.decoder import build_on_meta
from tunelib.model.families import parse_config
from tunelib.model.families.llama import ARCHITECTURE

CONFIGS = sorted((ROOT / "train_configs").glob("*.toml"))
FLAVORS = {"llama2_7b": "llama2-7b", "llama3_8b": "llama3.1-8b", "smollm2_135m": "smollm2-135m"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_passes_the_check_on_one_and_two_processes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for world_size in (1, 2):
        load_config([str(path)], world_size=world_size)


@pytest.mark.parametrize("path", [path for path in CONFIGS if "lora" in path.stem or "dora" in path.stem], ids=lambda path: path.stem)
def test_adapters_have_as_many_parameters_as_the_config_says(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    section = load_config([str(path)]).config.lora
    flavor = next(size for name, size in FLAVORS.items() if path.stem.startswith(name))
    model = build_on_meta(parse_config({"architectures": [ARCHITECTURE], **SIZES[flavor]}, flavor), torch.bfloat16)
    add_adapters(model, section)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    for said in re.findall(r"([0-9.]+) M trained parameters", path.read_text()):
        assert float(said) == pytest.approx(trained / 1e6, rel=0.02)
