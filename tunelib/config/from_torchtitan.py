"""torchtitan's TOML files (up to 0.2.2, the last with TOML) as settings of tunelib.

Most keys have the same name, or one in ``renamed.py``. What is here is where the same word means another thing: sizes and data sets
that have names, a batch that grows with the processes, and defaults that differ.
"""

import os
import re

from tunelib.config.fields import FIELDS, find_nearest, show_value
from tunelib.config.renamed import RENAMED, REPLACED
from tunelib.config.resolve import find_what_rules_out_compile
from tunelib.config.schema import ActivationCheckpoint, Config
from tunelib.config.sizes import SIZES
from tunelib.config.translation import Source, Translation, explain_unbuilt
from tunelib.errors import ConfigError

DEBUG_MODEL = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "rope_theta": 500000.0,
}
"""The flavor "debugmodel" of llama3, whose vocabulary is the tokenizer's."""
TOKENIZER_KEYS = ("model.hf_assets_path", "model.tokenizer_path")
"""The newer goes before the older."""
MEANT_OTHERWISE = ("training.dataset", "training.dataset_path", "validation.dataset", "validation.dataset_path", "training.batch_size")
"""Keys that ``renamed.py`` has, but whose values become something else."""
ALSO_RENAMED = {
    "scheduler.warmup_steps": "lr_scheduler.warmup_steps",
    "scheduler.decay_ratio": "lr_scheduler.decay_ratio",
    "scheduler.decay_type": "lr_scheduler.decay_type",
    "scheduler.lr_min": "lr_scheduler.min_lr_factor",
    "training.batch_size": "training.local_batch_size",
}
SWITCHES = {
    **dict.fromkeys(("float8", "mx", "quantize"), "model.converters"),
    "profiling.save_memory_snapshot_folder": "profiling.enable_memory_snapshot",
    "profiling": "profiling.enable_profiling",
    "metrics.save_tb_folder": "metrics.enable_tensorboard",
    "memory_estimation": "memory_estimation.enabled",
    "fault_tolerance": "fault_tolerance.enable",
}
"""Key or section → the key without which it does nothing there."""
DEFAULTS = {
    "optimizer.lr": 8e-4,
    "lr_scheduler.warmup_steps": 200,
    "lr_scheduler.decay_type": "linear",
    "training.steps": 10000,
    "activation_checkpoint.mode": "selective",
}
"""torchtitan's own, where a run would be another with ours."""
C4 = "allenai/c4"
C4_SETS = {"c4": "train", "c4_validation": "validation"}
"""Data sets by name → the split of C4, in English, that they are."""
TEST_SETS = {"c4_test": "tests/assets/c4_test", "c4_mini": "torchtitan/datasets/c4_mini"}
"""Data sets that lie in torchtitan's repository."""
NEEDLESS = {
    "job.print_args": "the settings of a run are in its config.toml",
    "job.print_config": "the settings of a run are in its config.toml",
    "job.save_config_file": "the settings of a run are in its config.toml",
    "job.save_config_folder": "the settings of a run are in its config.toml",
    "debug.print_config": "the settings of a run are in its config.toml",
    "debug.save_config_file": "the settings of a run are in its config.toml",
    "job.use_for_integration_test": "for torchtitan's own tests",
    "metrics.disable_color_printing": "there are no colours",
    "metrics.enable_color_printing": "there are no colours",
    "metrics.save_for_all_ranks": "metrics.jsonl holds what all ranks did",
    "metrics.rank_0_only": "metrics.jsonl holds what all ranks did",
    "model.norm_type": "the norm is the model's own, RMSNorm",
    "training.gc_freq": "Python collects garbage when it likes",
    "training.gc_debug": "Python collects garbage when it likes",
    "training.dataloader": "a thread makes the rows of the next step",
    "validation.dataloader": "a thread makes the rows of the next step",
    "parallelism.context_parallel_load_balancer": "rows are always cut evenly, from head and tail",
    "training.data_parallel_type": "parameters are always sharded by FSDP2",
    "compile.components": "layers are compiled, and the loss needs no compiling",
    "compile.model": "layers are compiled, and the loss needs no compiling",
    "compile.loss": "layers are compiled, and the loss needs no compiling",
    "parallelism.enable_compiled_autograd": "layers are compiled with their backward pass",
    "checkpoint.initial_load_in_hf_quantized": "the form of checkpoint.initial_load_path is seen from its files",
}
"""Key, or what it is in → why it needs no setting."""
REASONS = {
    "job.custom_config_module": "settings are those of docs/config.md",
    "model.converters": "float8 and MX training are not built yet",
    "model.print_after_conversion": "float8 and MX training are not built yet",
    "optimizer.early_step_in_backward": "gradients are clipped over all parameters before a step is taken",
    "training.enable_fp8_linear": "float8 training is not built yet",
    "training.enable_float8_linear": "float8 training is not built yet",
    "training.fp8_linear": "float8 training is not built yet",
    "compile.backend": "layers are compiled by inductor",
    "parallelism.pipeline_parallel_layers_per_stage": "stages are balanced by work; parallelism.pipeline_parallel_split_points says otherwise",
    "parallelism.module_fqns_per_model_part": "stages are balanced by work; parallelism.pipeline_parallel_split_points says otherwise",
    "parallelism.pipeline_parallel_first_stage_less_layers": "stages are balanced by work",
    "parallelism.pipeline_parallel_last_stage_less_layers": "stages are balanced by work",
    "parallelism.pipeline_parallel_schedule_csv": "a schedule has one of torch's names",
    "lr_scheduler.total_steps": "the decay ends with the run; lr_scheduler.min_lr_factor ends it higher",
    "parallelism.expert_parallel_comm_backend": "expert parallelism is not built yet",
    "parallelism.pipeline_parallel_expert_parallel_overlap": "expert parallelism is not built yet",
    "parallelism.expert_tensor_parallel_degree": "expert parallelism is not built yet",
    "checkpoint.enable_first_step_checkpoint": "scripts/check_resume.py tries a save beforehand",
    "checkpoint.load_only": "checkpoint.initial_load_path loads without saving",
    "checkpoint.enable_ft_dataloader_checkpoints": "replicas that come and go are not built",
    "memory_estimation": "scripts/estimate_memory.py does it, before a run",
    "fault_tolerance": "replicas that come and go are not built",
    "experimental": "code of your own goes into a copy of train.py",
    "debug": "not built here",
    "activation_checkpoint": "which operators are kept is fixed",
    "comm": "the flight recorder is not built yet",
}
"""Key or section → why it is left out, for what ``renamed.py`` does not explain."""


def translate_torchtitan(source: Source, ngpu: int = 0) -> Translation:
    """The settings of a torchtitan TOML.

    Args:
        ngpu: processes that it will run on; 0: as a comment of the file says, or as few as its degrees allow.

    Raises:
        ConfigError: its model is none that is trained here.
    """
    found = Translation(source, "torchtitan")
    spellings = {find_today(key): key for key in source.values}
    translate_job(found)
    translate_model(found)
    translate_rest(found)
    translate_batch(found, spellings, ngpu)
    translate_data(found)
    translate_validation(found)
    for key, value in DEFAULTS.items():
        if key not in spellings:
            found.put(key, value, key)
    if value_of(found, "activation_checkpoint.mode", "") == "selective" and "activation_checkpoint.selective_ac_option" not in spellings:
        found.put("activation_checkpoint.selective_ac_option", "2", "activation_checkpoint.selective_ac_option")
    settle_conflicts(found)
    found.finish()
    return found


def find_today(key: str) -> str:
    """A key's spelling of today; its own where there is no other."""
    return ALSO_RENAMED.get(key, key if key in MEANT_OTHERWISE else RENAMED.get(key, key))


def translate_job(found: Translation) -> None:
    folder = found.source.values.get("job.dump_folder")
    if folder in ("./outputs", "outputs", "./torchtitan/outputs"):
        found.spare("job.dump_folder", "each run has a folder of its own, ./outputs/<name of the file>")


def translate_model(found: Translation) -> None:
    """A size by its name, unless weights say what the model is; and the tokenizer's folder."""
    source = found.source
    name, flavor = str(source.take("model.name", "llama3")), str(source.take("model.flavor", "debugmodel"))
    path_key = next((key for key in TOKENIZER_KEYS if key in source.values), TOKENIZER_KEYS[0])
    path = str(source.take(path_key, "./tests/assets/tokenizer"))
    found.spare([key for key in TOKENIZER_KEYS if key != path_key], f"{path_key} goes before it")
    weights = source.values.get("checkpoint.initial_load_path")
    if os.path.basename(path).endswith((".model", ".json")):
        path, file = os.path.split(path)
        renamed = "" if file in ("tokenizer.model", "tokenizer.json") else f"; {file} must be called tokenizer.model there"
        found.put("model.tokenizer_path", path or ".", path_key, why=f"a folder here{renamed}")
    else:
        found.put("model.tokenizer_path", path, path_key)
    if weights:
        why = "what lies at checkpoint.initial_load_path says it; where it has no config.json, add model.flavor"
        found.lose(["model.name", "model.flavor"], why)
        return
    base, size = split_flavor(flavor)
    if base == "debugmodel" and name in ("llama2", "llama3"):
        for field, value in DEBUG_MODEL.items():
            if name == "llama3" or field != "rope_theta":
                found.put(f"model.{field}", value, "model.name", "model.flavor")
        return
    has_scaling = "3.1" in path or size == "405b"
    choices = [f"{name}.1-{size}" if has_scaling else f"{name}-{size}", f"{name}-{size}", f"{name}.1-{size}", f"{name}.2-{size}"]
    choice = next((choice for choice in choices if choice in SIZES), None)
    if choice is None:
        near = find_nearest(choices[0], SIZES)
        hint = f"; the nearest that is: model.flavor = {show_value(near)}" if near else ""
        what = f"model.name = {show_value(name)} with model.flavor = {show_value(flavor)}"
        raise ConfigError(f"{source.file}: {what} is no size that is known here{hint}")
    found.put("model.flavor", choice, "model.name", "model.flavor", why="documents never attend to each other" if size != flavor.lower() else "")


def split_flavor(flavor: str) -> tuple[str, str]:
    """A flavor without the kernel that it names at its end ("8B_flex" → "8B"), as it is and in lower case."""
    base = re.sub(r"_(flex|varlen).*$", "", flavor)
    return base, base.lower()


def translate_rest(found: Translation) -> None:
    """Every key that means here what it meant there, and the reason for each that means nothing."""
    for key in found.source.left():
        today, value = find_today(key), found.source.values[key]
        if today in MEANT_OTHERWISE or today in ("training.local_batch_size", "training.global_batch_size"):
            continue
        if key.startswith("validation."):
            continue
        if today == "optimizer.name" and value not in FIELDS[today].choices:
            found.lose(key, "AdamW takes its place")
        elif today in FIELDS and FIELDS[today].kind == "words" and isinstance(value, str):
            found.put(today, [part.strip() for part in value.split(",") if part.strip()], key)
        elif today in FIELDS:
            found.put(today, value, key)
        elif needless := NEEDLESS.get(key) or NEEDLESS.get(key.rpartition(".")[0]):
            found.spare(key, needless)
        elif (switch := find_switch(key)) and not found.source.values.get(switch):
            found.spare(key, f"{switch} is off")
        else:
            found.lose(key, explain_loss(key), value)


def find_switch(key: str) -> str:
    """The key that turns another on; empty where there is none."""
    if key in SWITCHES.values():
        return ""
    return next((switch for part, switch in SWITCHES.items() if f"{key}.".startswith(f"{part}.")), "")


def explain_loss(key: str) -> str:
    """Why a key is left out."""
    parts = [key, *(key.rsplit(".", number)[0] for number in range(1, key.count(".") + 1))]
    reason = next((REPLACED.get(part) or REASONS.get(part) for part in parts if part in REPLACED or part in REASONS), None)
    unbuilt = explain_unbuilt(key)
    return reason or (unbuilt if unbuilt != "not built" else "no key of torchtitan's that is known here")


def translate_batch(found: Translation, spellings: dict[str, str], ngpu: int) -> None:
    """Rows of a micro-batch and of a step: there the second grows with the processes, here it is a number."""
    source = found.source
    replicas, split, cut, stages = (
        degree_of(found, name) for name in ("data_parallel_replicate", "tensor_parallel", "context_parallel", "pipeline_parallel")
    )
    shards = degree_of(found, "data_parallel_shard", -1)
    others = replicas * split * cut * stages
    preset = re.search(r"#.*\bpreset for ([0-9]+)\b", source.text)
    said = int(preset[1]) if preset else 0
    if shards > 0:
        found.world_size = ngpu or shards * others
    else:
        found.world_size = ngpu or (said if said and said % others == 0 else others)
    data_ranks = max(found.world_size // (split * cut * stages), 1)
    local_key = spellings.get("training.local_batch_size", "training.local_batch_size")
    local, whole = source.take(local_key, 8), source.take("training.global_batch_size", -1)
    if not isinstance(local, int) or not isinstance(whole, int):
        raise ConfigError(f"{source.file}: {local_key} and training.global_batch_size are whole numbers; correct them")
    rows = local
    if stages > 1:
        rows = take_microbatch(found, local)
    found.put("training.local_batch_size", rows, local_key, why="the micro-batch of a pipeline" if rows != local else "")
    if whole > 0:
        found.put("training.global_batch_size", whole, "training.global_batch_size")
    else:
        where = f"; {preset[0].lstrip('# ')!r}" if preset and not ngpu and found.world_size == said else ""
        why = f"{local} rows × {data_ranks} data ranks{where}; there it grows with the processes, here it does not"
        found.put("training.global_batch_size", local * data_ranks, local_key, "training.global_batch_size", why=why)


def take_microbatch(found: Translation, local: int) -> int:
    """Rows of a pipeline's micro-batch: its size, of late; before, the number of them."""
    source, size_key = found.source, "parallelism.pipeline_parallel_microbatch_size"
    for key in ("experimental.pipeline_parallel_microbatches", "parallelism.pipeline_parallel_microbatches"):
        count = source.values.get(key)
        if isinstance(count, int) and count > 0 and local % count == 0:
            return local // count
    size = source.values.get(size_key, 1)
    return size if isinstance(size, int) and size > 0 else 1


def degree_of(found: Translation, name: str, default: int = 1) -> int:
    return int(str(value_of(found, f"parallelism.{name}_degree", default)))


def value_of(found: Translation, key: str, default: object) -> object:
    return found.lines[key].value if key in found.lines else default


def translate_data(found: Translation) -> None:
    source = found.source
    keys = ("training.dataset", "training.dataset_path")
    name, path = str(source.take(keys[0], "c4_test")), source.take(keys[1])
    if path:
        found.put("dataset.path", path, *keys)
    elif name in C4_SETS:
        cut = degree_of(found, "context_parallel") > 1
        found.put("dataset.hub", C4, *keys)
        found.put("dataset.subset", "en", *keys)
        found.put("dataset.split", C4_SETS[name], *keys)
        why = "rows of a stream cannot be cut, so that it is fetched beforehand: 305 GB" if cut else "read while training, as there"
        found.put("dataset.streaming", not cut, *keys, why=why)
    elif name in TEST_SETS:
        found.put("dataset.path", TEST_SETS[name], *keys, why="in torchtitan's repository: copy it, or name your own")
    else:
        found.put("dataset.path", name, *keys, why="no data set that is known here: name its files, or dataset.hub")
    found.put("dataset.format", "text", *keys, why="documents of the column 'text'")


def translate_validation(found: Translation) -> None:
    """Held-out documents: another split of C4, or a file; there is no other data set beside the one that is trained on."""
    source = found.source
    switch = next((key for key in ("validation.enable", "validation.enabled") if key in source.values), "validation.enable")
    if not source.take(switch, False):
        for key in source.take_all("validation"):
            found.needless[source.show(key)] = "validation is off"
        if switch in source.values:
            found.put("validation.enable", False, switch)
        return
    name, path = str(source.take("validation.dataset", "c4_validation")), source.take("validation.dataset_path")
    if path:
        found.put("validation.path", path, "validation.dataset_path", "validation.dataset")
    elif name in C4_SETS and value_of(found, "dataset.hub", "") == C4:
        found.put("validation.split", C4_SETS[name], "validation.dataset")
    else:
        found.lose([switch, *source.take_all("validation"), "validation.dataset"], "held-out documents are of the data that is trained on")
        return
    found.put("validation.enable", True, switch)
    found.put("validation.freq", source.take("validation.freq", 10), "validation.freq")
    for key in source.left():
        if key.startswith("validation."):
            found.lose(key, explain_loss(key))


def settle_conflicts(found: Translation) -> None:
    """Pairs that torchtitan takes and tunelib does not."""
    lines = found.lines
    recompute = ActivationCheckpoint(
        str(value_of(found, "activation_checkpoint.mode", "none")),  # type: ignore[arg-type]  # find_fault has judged it
        str(value_of(found, "activation_checkpoint.selective_ac_option", "op")),
    )
    _, why = find_what_rules_out_compile(Config(activation_checkpoint=recompute))
    if value_of(found, "compile.enable", None) is True and why:
        found.drop("compile.enable", why)
    if value_of(found, "parallelism.enable_async_tensor_parallel", False) and value_of(found, "compile.enable", None) is not True:
        found.drop("parallelism.enable_async_tensor_parallel", "only compiled layers overlap products and communication")
    if "lr_scheduler.decay_ratio" in lines and lines["lr_scheduler.decay_ratio"].value == 0:
        found.drop("lr_scheduler.decay_ratio", "no decay")
