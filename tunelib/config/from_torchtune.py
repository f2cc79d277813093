"""torchtune's YAML recipe configs (up to 0.6.1) as settings of tunelib.

A component is known by its last name: ``torchtune.models.llama3_1.lora_llama3_1_8b`` is LoRA on what the checkpointer's folder holds.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from tunelib.config.fields import show_value
from tunelib.config.sizes import ARCHITECTURES
from tunelib.config.translation import Source, Translation
from tunelib.errors import ConfigError

FAMILIES = {
    **dict.fromkeys(("llama2", "code_llama2", "llama3", "llama3_1", "llama3_2", "llama3_3"), "LlamaForCausalLM"),
    **dict.fromkeys(("qwen2", "qwen2_5"), "Qwen2ForCausalLM"),
    **dict.fromkeys(("phi3", "phi4"), "Phi3ForCausalLM"),
    "mistral": "MistralForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
}
"""torchtune.models.NAME → what a config.json calls it."""
TEMPLATES = {"llama2": "llama2", "code_llama2": "llama2", "llama3": "llama3", "llama3_1": "llama3", "llama3_2": "llama3", "llama3_3": "llama3"}
"""torchtune.models.NAME → the chat template that its tokenizer writes."""
PROMPT_TEMPLATES = {"Llama2ChatTemplate": "llama2", "ChatMLTemplate": "chatml"}
OTHER_RECIPES = {
    "teacher_model": "distils a teacher into a student",
    "kd_loss": "distils a teacher into a student",
    "policy_model": "is reinforcement learning (PPO)",
    "ref_checkpointer": "is preference training (DPO)",
    "tasks": "evaluates",
    "prompt": "generates text",
    "max_new_tokens": "generates text",
}
"""A key that only recipes have which are no fine-tuning → what such a recipe does."""
ATTENTION = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "output_proj": "o_proj"}
FEED_FORWARD = ["gate_proj", "up_proj", "down_proj"]
ADAM_DEFAULTS = {"weight_decay": 0.01, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
"""torch's and bitsandbytes's own."""
MODEL_KEYS = {
    *("_component_", "vocab_size", "num_layers", "num_heads", "num_kv_heads", "embed_dim", "max_seq_len", "intermediate_dim", "head_dim"),
    *("attn_dropout", "norm_eps", "rope_base", "scale_factor", "tie_word_embeddings", "hidden_capping_value", "final_capping_value"),
    *("sliding_window_size", "query_pre_attn_scalar", "lora_attn_modules", "apply_lora_to_mlp", "apply_lora_to_output", "lora_rank"),
    *("lora_alpha", "lora_dropout", "use_dora", "quantize_base"),
}
"""What torchtune's builders of models take."""
LOGGERS = {"TensorBoardLogger": "metrics.enable_tensorboard", "WandBLogger": "metrics.enable_wandb"}
NEEDLESS = {
    "device": "the machine's GPUs, or its CPU where it has none",
    "log_peak_memory_stats": "metrics.jsonl always holds it",
    "log_level": "the opening lines say what is about to happen",
    "loss": "cross-entropy, always worked out in parts",
    "model": "what lies at checkpoint.initial_load_path says it",
    "tokenizer": "the tokenizer is its folder's",
    "shuffle": "documents are shuffled by training.seed",
    "tensor_parallel_plan": "follows from the model",
    "custom_sharded_layers": "every layer is sharded, and embedding and head with them",
    "memory_efficient_fsdp_wrap": "every layer is sharded, and embedding and head with them",
    "low_cpu_ram": "weights are read straight into each process's share",
    "collate_fn": "dataset.packing says how rows are made",
    "checkpointer": "the files show it, and the weights leave in the form they came in",
    "metric_logger": "metrics.jsonl is in the run folder",
    "compile": "layers are compiled",
}
"""Key, or what it is in → why it needs no setting."""
REASONS = {
    "enable_activation_offloading": "not built; activation_checkpoint.mode saves memory too",
    "optimizer_in_bwd": "gradients are clipped over all parameters before a step is taken",
    "fsdp_sharding_strategy": "parallelism.data_parallel_shard_degree and fsdp_reshard_after_forward say it",
    "resume_from_checkpoint": "a run goes on from its own checkpoints, by the same command; torchtune's are not read",
    "checkpointer.recipe_checkpoint": "a run goes on from its own checkpoints; torchtune's are not read",
    "checkpointer.adapter_checkpoint": "name a PEFT folder as lora.adapter_path; torchtune's own file is not read",
    "profiler": "a step is profiled every profiling.profile_freq steps",
    "quantizer": "training for later quantisation (QAT) is not built: this trains without it",
    "fake_quant_after_n_steps": "training for later quantisation (QAT) is not built: this trains without it",
    "optimizer": "no setting here",
    "lr_scheduler": "no setting here",
    "cudnn_deterministic_mode": "training.deterministic = true does it",
}
"""Key, or what it is in → why it is left out, where no function below says it."""
SAME = {
    "seed": "training.seed",
    "log_every_n_steps": "metrics.log_freq",
    "tensor_parallel_dim": "parallelism.tensor_parallel_degree",
    "context_parallel_dim": "parallelism.context_parallel_degree",
    "data_parallel_shard_dim": "parallelism.data_parallel_shard_degree",
    "data_parallel_replicate_dim": "parallelism.data_parallel_replicate_degree",
    "fsdp_cpu_offload": "training.enable_cpu_offload",
    "fsdp.cpu_offload": "training.enable_cpu_offload",
    "save_adapter_weights_only": "lora.save_adapter_weights_only",
}


@dataclass(frozen=True)
class DataSet:
    """What a builder of torchtune.datasets reads, with its own defaults."""

    format: str
    source: str = ""
    subset: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Name under [dataset.columns] → the column that it reads by default."""
    mapped: Mapping[str, str] = field(default_factory=dict)
    """Key of its column_map, or parameter → name under [dataset.columns]."""
    train_on_input: bool = False


INSTRUCT = {"instruction": "instruction", "input": "input", "output": "output"}
PAIR = {"input": "prompt", "output": "completion"}
DATA_SETS = {
    "alpaca_dataset": DataSet("instruct", "tatsu-lab/alpaca", mapped=INSTRUCT, train_on_input=True),
    "alpaca_cleaned_dataset": DataSet("instruct", "yahma/alpaca-cleaned", mapped=INSTRUCT, train_on_input=True),
    "instruct_dataset": DataSet("prompt_completion", columns={"prompt": "input", "completion": "output"}, mapped=PAIR),
    "grammar_dataset": DataSet("prompt_completion", "liweili/c4_200m", columns={"prompt": "input", "completion": "output"}, mapped=PAIR),
    "samsum_dataset": DataSet("prompt_completion", "Samsung/samsum", columns={"prompt": "dialogue", "completion": "summary"}, mapped=PAIR),
    "chat_dataset": DataSet("chat", mapped={"conversations": "messages", "conversation_column": "messages"}),
    "slimorca_dataset": DataSet("chat", "Open-Orca/SlimOrca-Dedup", mapped={"conversations": "messages"}),
    "text_completion_dataset": DataSet("text", mapped={"column": "text"}),
    "wikitext_dataset": DataSet("text", "EleutherAI/wikitext_document_level", "wikitext-103-v1", {"text": "page"}, {"column": "text"}),
    "cnn_dailymail_articles_dataset": DataSet("text", "ccdv/cnn_dailymail", "3.0.0", {"text": "article"}, {"column": "text"}),
}
"""Builder → what it reads."""


def translate_torchtune(source: Source, ngpu: int = 0) -> Translation:
    """The settings of a torchtune recipe config whose interpolations are filled in.

    Args:
        ngpu: processes that it will run on; 0: as the command in the file's comment says, else 1.

    Raises:
        ConfigError: it is no recipe, or none of fine-tuning a model that is trained here.
    """
    found = Translation(source, "torchtune")
    family, builder = find_model(source)
    translate_weights(found)
    translate_adapters(found, builder)
    translate_data(found, family)
    translate_batch(found, ngpu)
    translate_optimizer(found)
    translate_machine(found)
    translate_metrics(found)
    for key, today in SAME.items():
        if source.values.get(key) is not None:
            found.put(today, source.values[key], key)
    if "seed" in source.values and source.values["seed"] is None:
        found.spare("seed", "drawn there, another one each time; here training.seed is 0 unless you give one")
    if source.values.get("shuffle") is False:
        found.lose("shuffle", "documents are always shuffled, by training.seed")
    for key in source.left():
        table = key.partition(".")[0]
        if table == "model" and key.removeprefix("model.") not in MODEL_KEYS:
            found.lose(key, "no parameter of torchtune's models that is known here", source.values[key])
            continue
        reason = REASONS.get(key) or REASONS.get(table if table not in NEEDLESS else "", "")
        if not reason and table in NEEDLESS:
            found.spare(key, NEEDLESS[table])
        else:
            found.lose(key, reason or "no key of torchtune's that is known here", source.values[key])
    found.finish()
    return found


def find_model(source: Source) -> tuple[str, str]:
    """The name behind torchtune.models of the model's family, and its builder's."""
    for key, does in OTHER_RECIPES.items():
        if any(name == key or name.startswith(f"{key}.") for name in source.values):
            raise ConfigError(f"{source.file}: this recipe {does} ('{key}'), which has no config here; fine-tuning recipes can be imported")
    if "rlhf" in str(source.values.get("loss._component_")):
        raise ConfigError(f"{source.file}: this recipe is preference training ({source.show('loss._component_')}), which has no config here")
    component = str(source.values.get("model._component_", ""))
    family, builder = [*component.split("."), ""][-3:-1] if component.count(".") else ("", component)
    needed = [key for key in ("model._component_", "optimizer._component_") if key not in source.values]
    if not has_data(source):
        needed.append("dataset._component_")
    if needed:
        raise ConfigError(f"{source.file}: is no recipe of torchtune: it lacks {', '.join(needed)}; give the config of a fine-tuning recipe")
    if not family:
        family = next((name for name in FAMILIES if re.fullmatch(rf"(q?lora_)?{name}(_[0-9]+b)?", builder)), "")
    if FAMILIES.get(family) not in ARCHITECTURES:
        message = f"tunelib trains {', '.join(ARCHITECTURES)}, and this is none of them; give the config of one that is"
        raise ConfigError(f"{source.file}: {source.show('model._component_')}: {message}")
    return family, builder


def has_data(source: Source) -> bool:
    data = source.values.get("dataset")
    return "dataset._component_" in source.values or (isinstance(data, list) and all(isinstance(item, dict) for item in data))


def translate_weights(found: Translation) -> None:
    """The checkpointer's folder, the run folder, and the tokenizer's folder where it is another one."""
    source = found.source
    folder = str(source.values.get("checkpointer.checkpoint_dir") or "")
    component = last_name(source.values.get("checkpointer._component_"))
    if not folder:
        raise ConfigError(f"{source.file}: there is no checkpointer.checkpoint_dir, the folder with the model; add it")
    why = "torchtune's own names are not read: give a Hugging Face or Meta folder" if "TorchTune" in component else ""
    found.put("checkpoint.initial_load_path", folder.rstrip("/") or "/", "checkpointer.checkpoint_dir", why=why)
    output = source.values.get("output_dir") or source.values.get("checkpointer.output_dir")
    if output:
        found.put("job.dump_folder", output, "output_dir" if source.values.get("output_dir") else "checkpointer.output_dir")
    source.taken.add("checkpointer.output_dir")
    path = source.values.get("tokenizer.path")
    if isinstance(path, str) and path:
        own = os.path.dirname(path)
        if os.path.normpath(own) in (os.path.normpath(folder), os.path.normpath(os.path.join(folder, "original"))):
            found.spare("tokenizer.path", "the weights' folder has the tokenizer")
        else:
            found.put("model.tokenizer_path", own or ".", "tokenizer.path", why="a folder here")


def translate_adapters(found: Translation, builder: str) -> None:
    """[lora], where the model's builder is one of LoRA or QLoRA."""
    source, name = found.source, "model._component_"
    if not builder.startswith(("lora_", "qlora_")):
        return
    found.put("lora.enable", True, name)
    found.put("lora.rank", source.values.get("model.lora_rank", 8), "model.lora_rank")
    found.put("lora.alpha", source.values.get("model.lora_alpha", 16), "model.lora_alpha")
    found.put("lora.dropout", source.values.get("model.lora_dropout") or 0.0, "model.lora_dropout")
    attention = source.values.get("model.lora_attn_modules")
    modules = [ATTENTION.get(str(module), str(module)) for module in attention] if isinstance(attention, list) else []
    modules += FEED_FORWARD if source.values.get("model.apply_lora_to_mlp") else []
    found.put("lora.target_modules", modules, "model.lora_attn_modules", "model.apply_lora_to_mlp")
    head = source.values.get("model.apply_lora_to_output")
    found.lose("model.apply_lora_to_output", "the head gets no adapter; lora.train_lm_head trains it in full", head)
    if source.values.get("model.use_dora") is not None:
        found.put("lora.use_dora", source.values["model.use_dora"], "model.use_dora")
    if builder.startswith("qlora_") or source.values.get("model.quantize_base"):
        found.put("lora.quantize_base", "nf4", "model.quantize_base" if "model.quantize_base" in source.values else name, why="of adapted layers")
    source.taken.add("model.quantize_base")


def translate_data(found: Translation, family: str) -> None:
    """One data set or several, and how their rows are written and packed."""
    source = found.source
    several = source.values.get("dataset")
    if isinstance(several, list):
        source.take("dataset")
        parts = [{str(key): value for key, value in part.items()} for part in several]
    else:
        parts = [{key.removeprefix("dataset."): source.take(key) for key in source.values if key.startswith("dataset.")}]
    for part in parts:
        translate_source(found, part, in_mix=len(parts) > 1)
    first = describe_data_set(found, parts[0])
    if first.format != "text":
        whole = bool(parts[0].get("train_on_input", first.train_on_input))
        why = show_part("train_on_input", parts[0]) or f"{last_name(parts[0]['_component_'])}'s own train_on_input = {show_value(whole)}"
        found.put("dataset.train_on", "all" if whole else "assistant", why=why)
        translate_template(found, family)
    packed = bool(parts[0].get("packed", source.values.get("dataset.packed", False)))
    found.put("dataset.packing", packed, why=show_part("packed", parts[0]) or "the default there")
    if first.format == "text" and not (packed and parts[0].get("split_across_pack", True)):
        found.put("dataset.too_long", "truncate", why=show_part("split_across_pack", parts[0]) or "the default there")
    length = source.values.get("tokenizer.max_seq_len")
    why = "torchtune then cuts nothing; here longer documents are cut, and counted" if length is None else ""
    found.put("training.seq_len", length if length is not None else 2048, "tokenizer.max_seq_len", why=why)


def describe_data_set(found: Translation, part: Mapping[str, object]) -> DataSet:
    name = last_name(part.get("_component_"))
    if name not in DATA_SETS:
        known = ", ".join(DATA_SETS)
        raise ConfigError(f"{found.source.file}: the data set {show_value(name)} has no counterpart here; give another as dataset=NAME: {known}")
    return DATA_SETS[name]


def translate_source(found: Translation, part: dict[str, object], in_mix: bool) -> None:
    """Where one data set comes from: its name on the Hub, or its files."""
    known, name = describe_data_set(found, part), show_part("_component_", part)
    origin, files = str(part.get("source") or known.source), part.get("data_files")
    settings: dict[str, tuple[object, str]] = {}
    if origin in ("json", "csv", "text", "parquet") and isinstance(files, str):
        settings["path"] = (files, show_part("data_files", part))
    elif origin in ("json", "csv", "text", "parquet"):
        message = f"dataset.data_files = {show_value(files)}: expected one file or pattern; give it as dataset.data_files=FILE"
        raise ConfigError(f"{found.source.file}: {message}")
    elif not origin:
        raise ConfigError(f"{found.source.file}: {name} needs a source; give it as dataset.source=OWNER/NAME")
    else:
        settings["hub"] = (origin, show_part("source", part) or name)
        settings["subset"] = (part.get("name") or known.subset, show_part("name", part) or name)
        split = str(part.get("split") or "train")
        settings["split"] = (split.partition("[")[0], show_part("split", part) or "the default there")
        if "[" in split:
            found.lost[f"dataset.split = {split}"] = "a split is taken whole; take rows out of a file of your own"
    settings["format"] = (known.format, name)
    mapped = part.get("column_map")
    nested = {key.removeprefix("column_map."): value for key, value in part.items() if key.startswith("column_map.")}
    given = {**part, **(mapped if isinstance(mapped, dict) else {}), **nested}
    columns = {**known.columns, **{today: given[old] for old, today in known.mapped.items() if isinstance(given.get(old), str)}}
    settings |= {f"columns.{today}": (column, "column_map, column, or the builder's own") for today, column in columns.items()}
    found.put_source(settings, in_mix)
    done = {"_component_", "source", "data_files", "name", "split", "column_map", "packed", "train_on_input", "split_across_pack", *known.mapped}
    for key in part.keys() - done:
        if not key.startswith("column_map."):
            lose_part(found, key, part[key])


def lose_part(found: Translation, key: str, value: object) -> None:
    reasons = {
        "conversation_style": "the layout of messages is seen from the rows",
        "new_system_prompt": "name a column of the rows as dataset.columns.system",
        "add_eos": "every document ends with its end token",
        "max_seq_len": "rows have training.seq_len tokens",
        "template": "the prompt is written by dataset.chat_template",
    }
    if value not in (None, False):
        found.lost[f"dataset.{key} = {show_value(value)}"] = reasons.get(key, "no setting here")


def translate_template(found: Translation, family: str) -> None:
    """The chat template of the model, or of the tokenizer's prompt_template where it has one."""
    source = found.source
    prompt = source.values.get("tokenizer.prompt_template")
    named = PROMPT_TEMPLATES.get(last_name(prompt)) if prompt else None
    if named:
        found.put("dataset.chat_template", named, "tokenizer.prompt_template")
    elif family in TEMPLATES:
        found.put("dataset.chat_template", TEMPLATES[family], "tokenizer._component_", why="see docs/migrate.md for Alpaca's wording")


def translate_batch(found: Translation, ngpu: int) -> None:
    """Rows of a micro-batch and of a step, and the run's length."""
    source = found.source
    rows, accumulated = read_count(source, "batch_size", 1), read_count(source, "gradient_accumulation_steps", 1)
    command = re.search(r"#.*--nproc[_-]per[_-]node[ =]([0-9]+)", source.text)
    found.world_size = ngpu or (int(command[1]) if command else 1)
    split = read_count(source, "tensor_parallel_dim", 1) * read_count(source, "context_parallel_dim", 1)
    ranks = max(found.world_size // split, 1)
    found.put("training.local_batch_size", rows, "batch_size")
    where = f"; the file's command has --nproc_per_node {command[1]}" if command and not ngpu else ""
    why = f"{rows} rows × {accumulated} × {ranks} process{'es' if ranks > 1 else ''}{where}; there it grows with the processes, here it does not"
    found.put("training.global_batch_size", rows * accumulated * ranks, "batch_size", "gradient_accumulation_steps", why=why)
    epochs, limit = read_count(source, "epochs", 1), source.values.get("max_steps_per_epoch")
    if isinstance(limit, int):
        found.put("training.steps", limit * epochs, "epochs", "max_steps_per_epoch")
    else:
        found.put("training.epochs", epochs, "epochs")
    source.taken.update(("max_steps_per_epoch", "epochs"))
    every = source.values.get("save_every_n_steps")
    if isinstance(every, int) or (epochs > 1 and limit is None):
        found.put("checkpoint.enable_checkpoint", True, why="torchtune saves while it trains, too")
        found.put("checkpoint.interval", every if isinstance(every, int) else 1, "save_every_n_steps")
        if not isinstance(every, int):
            found.put("checkpoint.interval_type", "epochs", "epochs")
        if source.values.get("enable_async_checkpointing"):
            found.put("checkpoint.async_mode", "async", "enable_async_checkpointing")
    found.lose("enable_async_checkpointing", "nothing is saved before the end", source.values.get("enable_async_checkpointing"))


def read_count(source: Source, key: str, default: int) -> int:
    value = source.values.get(key)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{source.file}: {key} = {show_value(value)}: expected a whole number of at least 1; correct it, or give {key}=N")
    return value


def translate_optimizer(found: Translation) -> None:
    source, name = found.source, last_name(found.source.take("optimizer._component_"))
    defaults = {"weight_decay": 0.0} if name == "Adam" else ADAM_DEFAULTS
    if "8bit" in name or "Adam8" in name:
        found.put("optimizer.name", "AdamW8bit", "optimizer._component_", why="torchao's, which is not paged")
    elif name == "SGD":
        found.put("optimizer.name", "SGD", "optimizer._component_")
        found.put("optimizer.momentum", source.values.get("optimizer.momentum") or 0.0, "optimizer.momentum")
        defaults = {"weight_decay": 0.0}
    else:
        why = "" if name == "AdamW" else "its state lies on the GPU" if "Adam" in name else f"{name} is not built"
        found.put("optimizer.name", "AdamW", "optimizer._component_", why=why)
        if "Adam" not in name:
            found.lost[source.show("optimizer._component_")] = "not built; AdamW takes its place"
    if source.values.get("optimizer.lr") is not None:
        found.put("optimizer.lr", source.values["optimizer.lr"], "optimizer.lr")
    betas = source.values.get("optimizer.betas")
    for key, default in defaults.items():
        if key.startswith("beta"):
            value = betas[int(key[-1]) - 1] if isinstance(betas, list) and len(betas) == 2 else default
            found.put(f"optimizer.{key}", value, "optimizer.betas")
        else:
            found.put(f"optimizer.{key}", source.values.get(f"optimizer.{key}", default), f"optimizer.{key}")
    found.spare(["optimizer.fused", "optimizer.foreach"], "AdamW is always torch's fused one")
    norm = source.values.get("clip_grad_norm")
    found.put("training.max_norm", norm if norm is not None else 1e9, "clip_grad_norm", why="" if norm is not None else "never reached")
    translate_schedule(found)


def translate_schedule(found: Translation) -> None:
    source, name = found.source, last_name(found.source.take("lr_scheduler._component_"))
    source.taken.add("lr_scheduler")
    if not name:
        found.put("lr_scheduler.decay_type", "constant", "lr_scheduler")
        return
    if name != "get_cosine_schedule_with_warmup" or source.values.get("lr_scheduler.num_cycles", 0.5) != 0.5:
        found.lost[source.show("lr_scheduler._component_")] = "only half a cosine is built; the learning rate stays as it is"
        return
    source.taken.add("lr_scheduler.num_cycles")
    found.put("lr_scheduler.decay_type", "cosine", "lr_scheduler._component_")
    found.put("lr_scheduler.warmup_steps", source.values.get("lr_scheduler.num_warmup_steps", 0), "lr_scheduler.num_warmup_steps")


def translate_machine(found: Translation) -> None:
    """Types, recompute, compiling, and what FSDP frees."""
    source = found.source
    dtypes = {"bf16": "bfloat16", "fp32": "float32", "bfloat16": "bfloat16", "float32": "float32", "fp64": "float64"}
    dtype = str(source.values.get("dtype") or "bf16")
    found.put("training.dtype", dtypes.get(dtype, dtype), "dtype")
    if source.values.get("ac_mode") == "selective":
        found.put("activation_checkpoint.mode", "selective", "ac_mode")
        found.put("activation_checkpoint.selective_ac_option", str(source.values.get("ac_option", "op")), "ac_option")
        source.taken.add("enable_activation_checkpointing")
    else:
        mode = "full" if source.values.get("enable_activation_checkpointing") else "none"
        found.put("activation_checkpoint.mode", mode, "enable_activation_checkpointing")
        source.taken.update(("ac_mode", "ac_option"))
    parts = [key for key in source.values if key == "compile" or key.startswith("compile.")]
    found.put("compile.enable", any(bool(source.values[key]) for key in parts), *(parts or ["compile"]))
    reshard = source.values.get("fsdp_reshard_after_forward")
    if reshard is not None:
        found.put("parallelism.fsdp_reshard_after_forward", "always" if reshard else "never", "fsdp_reshard_after_forward")


def translate_metrics(found: Translation) -> None:
    """The logger and the profiler."""
    source, name = found.source, last_name(found.source.take("metric_logger._component_"))
    if name in LOGGERS:
        found.put(LOGGERS[name], True, "metric_logger._component_")
    elif name in ("DiskLogger", "StdoutLogger"):
        found.spare("metric_logger._component_", "metrics.jsonl is in the run folder")
    elif name:
        found.lose("metric_logger._component_", "not there; metrics.jsonl in the run folder holds all")
    if source.take("profiler.enabled"):
        found.put("profiling.enable_profiling", True, "profiler.enabled")
    elif any(key.startswith("profiler.") for key in source.values):
        found.spare(source.take_all("profiler"), "the profiler is off")


def last_name(component: object) -> str:
    """The last name of a component's path."""
    return str(component or "").rpartition(".")[2]


def show_part(key: str, part: Mapping[str, object]) -> str:
    """A key of a data set with its value; empty where it is not given."""
    return f"dataset.{key} = {show_value(part[key])}" if part.get(key) is not None else ""
