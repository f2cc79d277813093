"""Conversions and exports stay within 0.5 GB + twice the largest tensor, whatever the model's size."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

EXPORT = """
import json, sys
from pathlib import Path
import torch
from tunelib.formats.load import Weights, give_weights, plan_export_of
from tunelib.formats.prove import export_model
from tunelib.model.decoder import build_on_meta
from tunelib.model.families import parse_config

def resident(what):
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what)).split()[1]) * 1024

fields, form, folder = json.loads(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
config = parse_config(fields, "here")
model = build_on_meta(config, torch.float32)
model.to_empty(device="cpu")
weights = Weights(config, "")
give_weights(model, weights, 0)
plan = plan_export_of(model, weights, None, None, frozenset(), torch.bfloat16, form)
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
facts = export_model(plan, model, folder / "export", True, None, check=True, sharded=False)
print("peak", resident("VmHWM") - before, "logits", facts["logits"]["largest_difference_from_trained_model"])
"""


def test_conversions_of_a_billion_parameters_stay_in_bounds(tmp_path: Path) -> None:
    words = ["--work", str(tmp_path), "--rounds", "1", "--sizes", "1.1B", "--only", "hf:dcp", "dcp:hf", "hf:meta4", "meta4:hf", "hf:torch"]
    finished = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/convert_memory.py"), *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=800
    )
    assert finished.returncode == 0, finished.stdout


@pytest.mark.parametrize("form", ["hf", "meta", "dcp", "torch"])
def test_export_and_its_proof_stay_in_bounds(tmp_path: Path, form: str) -> None:
    """A model of 1.6 GB with its largest tensor of 0.26 GB."""
    vocab_size, hidden_size = 32000, 2048
    fields = (
        f'{{"architectures": ["LlamaForCausalLM"], "vocab_size": {vocab_size}, "hidden_size": {hidden_size}, "intermediate_size": 5632, '
        '"num_hidden_layers": 6, "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}'
    )
    words = [sys.executable, "-c", EXPORT, fields, form, str(tmp_path)]
    finished = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    assert finished.returncode == 0, finished.stdout
    shutil.rmtree(tmp_path / "export")
    peak = int(finished.stdout.split("peak ")[1].split()[0])
    assert peak <= 500_000_000 + 2 * vocab_size * hidden_size * 4, finished.stdout
