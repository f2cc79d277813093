"""torchtitan's TOML files, of every era of their keys: written here, with the keys and comments that those files have."""

from pathlib import Path

import pytest

from tunelib.config.foreign import Imported, import_config
from tunelib.config.load import load_config
from tunelib.config.schema import Config
from tunelib.errors import ConfigError

FIRST = """\
# a preset for 16 GPUs
[job]
dump_folder = "./outputs"
description = "Llama2 7B"
[metrics]
enable_color_printing = true
[model]
name = "llama2"
flavor = "7B"
norm_type = "fused_rmsnorm"
tokenizer_path = "./datasets/tokenizer.model"
[training]
batch_size = 8
data_parallel_degree = -1
tensor_parallel_degree = 2
pipeline_parallel_degree = 1
fp8_linear = ""
compile = false
dataset = "alpaca"
warmup_steps = 20
steps = 100
"""
"""Degrees under [training], the sizes of Llama 2."""
SECOND = """\
[profiling]
enable_profiling = false
save_traces_folder = "trace"
[model]
name = "llama3"
flavor = "debugmodel"
tokenizer_path = "./tests/assets/test_tiktoken.model"
[optimizer]
name = "AdamW"
fused = true
[scheduler]
warmup_steps = 2
lr_min = 0.1
[training]
batch_size = 8
seq_len = 512
steps = 10
data_parallel_shard_degree = 2
dataset = "c4_test"
[experimental]
pipeline_parallel_degree = 4
pipeline_parallel_microbatches = 4
pipeline_parallel_split_points = "layers.2,layers.3,layers.5"
context_parallel_degree = 1
[checkpoint]
enable_checkpoint = true
interval_type = "steps"
interval = 5
model_weights_only = false
[activation_checkpoint]
mode = "none"
selective_ac_option = "2"
[float8]
enable_float8_linear = false
"""
"""[experimental] and [scheduler], a pipeline of micro-batches by number."""
THIRD = """\
# NOTE: this toml config is a preset for 128 H100 GPUs.
[job]
dump_folder = "./runs/big"
[metrics]
enable_tensorboard = true
[model]
name = "llama3"
flavor = "405B"
tokenizer_path = "./assets/tokenizer/original/tokenizer.model"
converters = ["float8"]
[optimizer]
lr = 8e-5
implementation = "fused"
[training]
local_batch_size = 2
seq_len = 8192
steps = 3000
compile = true
dataset = "c4"
[parallelism]
tensor_parallel_degree = 8
enable_async_tensor_parallel = true
[checkpoint]
enable_checkpoint = false
folder = "checkpoint"
[activation_checkpoint]
mode = "full"
selective_ac_option = "op"
[float8]
filter_fqns = ["output"]
"""
"""[parallelism], float8 by a converter."""
LAST = """\
[model]
name = "llama3"
flavor = "8B_flex"
hf_assets_path = "./assets/hf/Llama-3.1-8B"
[training]
local_batch_size = 1
global_batch_size = 16
dataset = "c4"
dtype = "float32"
[training.dataloader]
num_workers = 2
[parallelism]
expert_parallel_degree = 1
pipeline_parallel_first_stage_less_layers = 0
[checkpoint]
enable = true
last_save_model_only = true
last_save_in_hf = true
keep_latest_k = 3
initial_load_path = "weights/step-10"
initial_load_in_hf = true
[compile]
enable = true
components = ["model", "loss"]
[activation_checkpoint]
mode = "selective"
selective_ac_option = "op"
[quantize.linear.float8]
filter_fqns = ["output"]
[validation]
enable = true
dataset = "c4_validation"
freq = 500
steps = 1200
[debug]
seed = 42
moe_force_load_balance = true
"""
"""0.2.2: [debug], [quantize], Hugging Face folders."""
ERAS = {"first": FIRST, "second": SECOND, "third": THIRD, "last": LAST}


def read(text: str, folder: Path, **others: int) -> tuple[Imported, Config]:
    """The import of a file of this text, and the config that it gives."""
    (folder / "titan.toml").write_text(text)
    imported = import_config(str(folder / "titan.toml"), **others)
    assert imported.problems == ()
    (folder / "ours.toml").write_text(imported.text)
    return imported, load_config([str(folder / "ours.toml")], world_size=imported.translation.world_size).config


@pytest.mark.parametrize("era", ERAS)
def test_every_key_ends_in_a_line_or_among_what_is_left_out(era: str, tmp_path: Path) -> None:
    imported, _ = read(ERAS[era], tmp_path)
    for key in imported.translation.source.values:
        assert f"{key} = " in imported.text.replace("\n", "  # "), key
    body, _, _ = imported.text.partition("\n# What ")
    assert all("  # " in line for line in body.splitlines() if " = " in line)


def test_first_files(tmp_path: Path) -> None:
    imported, config = read(FIRST, tmp_path)
    assert (config.model.flavor, config.model.tokenizer_path, config.dataset.path) == ("llama2-7b", "./datasets", "alpaca")
    assert (config.lr_scheduler.warmup_steps, config.lr_scheduler.decay_type, config.optimizer.lr) == (20, "linear", 8e-4)
    assert (config.activation_checkpoint.mode, config.activation_checkpoint.selective_ac_option) == ("selective", "2")
    assert imported.translation.world_size == 16
    assert (config.training.local_batch_size, config.training.global_batch_size) == (8, 64)
    assert config.job.dump_folder == ""


def test_pipeline_has_its_micro_batches(tmp_path: Path) -> None:
    imported, config = read(SECOND, tmp_path)
    assert imported.translation.world_size == 8
    assert (config.training.local_batch_size, config.training.global_batch_size) == (2, 16)
    assert config.parallelism.pipeline_parallel_split_points == ("layers.2", "layers.3", "layers.5")
    assert (config.model.hidden_size, config.model.intermediate_size, config.model.rope_theta) == (256, 768, 500000.0)
    assert (config.lr_scheduler.warmup_steps, config.lr_scheduler.min_lr_factor) == (2, 0.1)
    assert (config.checkpoint.enable_checkpoint, config.checkpoint.interval) == (True, 5)
    needless = imported.translation.needless
    assert needless['activation_checkpoint.selective_ac_option = "2"'] == 'without effect while activation_checkpoint.mode is "none"'
    assert needless['profiling.save_traces_folder = "trace"'] == "without effect while profiling.enable_profiling is false"


def test_global_batch_follows_the_processes(tmp_path: Path) -> None:
    imported, config = read(THIRD, tmp_path)
    assert (imported.translation.world_size, config.training.global_batch_size) == (128, 32)
    assert (config.compile.enable, config.parallelism.enable_async_tensor_parallel) == (True, True)
    assert (config.dataset.hub, config.dataset.subset, config.dataset.streaming, config.dataset.format) == ("allenai/c4", "en", True, "text")
    assert 'model.converters = ["float8"]' in imported.translation.lost
    smaller, config = read(THIRD, tmp_path, ngpu=16)
    assert (smaller.translation.world_size, config.training.global_batch_size) == (16, 4)


def test_last_files(tmp_path: Path) -> None:
    imported, config = read(LAST, tmp_path)
    assert (config.checkpoint.initial_load_path, config.model.flavor, config.checkpoint.model_weights_only) == ("weights/step-10", "", True)
    assert (config.training.seed, config.training.global_batch_size, config.training.dtype) == (42, 16, "float32")
    assert (config.validation.split, config.validation.freq) == ("validation", 500)
    lost = imported.translation.lost
    assert lost["compile.enable = true"] == "which operators of a compiled layer are kept is the compiler's choice"
    assert lost["debug.moe_force_load_balance = true"] == "not built here"
    assert config.compile.enable is None


def test_flavor_says_whether_rotations_are_scaled(tmp_path: Path) -> None:
    text = LAST.replace('initial_load_path = "weights/step-10"\ninitial_load_in_hf = true\n', "")
    assert read(text, tmp_path)[1].model.flavor == "llama3.1-8b"
    assert read(text.replace("Llama-3.1-8B", "Meta-Llama-3-8B"), tmp_path)[1].model.flavor == "llama3-8b"


def test_values_that_may_not_stand_are_left_out_with_the_reason(tmp_path: Path) -> None:
    text = SECOND.replace('mode = "none"', 'mode = "memory_budget"').replace('name = "AdamW"', 'name = "DION"')
    imported, config = read(text, tmp_path)
    assert config.activation_checkpoint.mode == "none"
    lost = imported.translation.lost
    assert lost['activation_checkpoint.mode = "memory_budget"'].startswith('expected one of "none", "full", "selective"')
    assert lost['optimizer.name = "DION"'] == "AdamW takes its place"


def test_stream_is_not_cut(tmp_path: Path) -> None:
    text = THIRD.replace("tensor_parallel_degree = 8", "context_parallel_degree = 8").replace("enable_async_tensor_parallel = true", "")
    _, config = read(text, tmp_path)
    assert (config.dataset.streaming, config.parallelism.context_parallel_degree) == (False, 8)


def test_strange_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'model\.name = "deepseek_v3" with model\.flavor = "16B" is no size that is known here'):
        read(FIRST.replace('"llama2"', '"deepseek_v3"').replace('"7B"', '"16B"'), tmp_path)
