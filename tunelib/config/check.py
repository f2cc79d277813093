"""Relations between settings, the world size and a local config.json: each ``find_`` function yields what is wrong.

A relation is asked only where every key it reads is known: a mistyped value is named once, not once more for what follows from it.
"""

import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tunelib.config.effect import has_no_config
from tunelib.config.fields import FIELDS, find_nearest, show_value
from tunelib.config.resolve import (
    BOTH_ENDS,
    ONE_STAGE_EACH,
    TWO_BACKWARD_PASSES,
    find_what_rules_out_compile,
    resolve_data_ranks,
    resolve_dump_folder,
    resolve_local_batch_size,
    resolve_shard_degree,
)
from tunelib.config.schema import Config, Parallelism
from tunelib.config.settings import Setting
from tunelib.config.sizes import ARCHITECTURES, SIZES

TAKEN_NAMES = (
    *("export", "export_check.json", "adapter", "wandb", "hang", "config.toml"),
    *("metrics.jsonl", "samples.jsonl", "nonfinite.jsonl", "summary.txt", "summary.json", "report.html"),
)
"""What a run writes beside the folders that are named by settings."""
DEGREES = (
    "parallelism.data_parallel_shard_degree",
    "parallelism.data_parallel_replicate_degree",
    "parallelism.tensor_parallel_degree",
    "parallelism.pipeline_parallel_degree",
    "parallelism.context_parallel_degree",
)
"""Whose product is the number of processes."""
NEEDED_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True)
class Checked:
    """What a relation looks at."""

    config: Config
    settings: dict[str, Setting]
    file: str
    world_size: int

    def at(self, key: str) -> str:
        """The place of a key's value and the value, as a message begins."""
        return str(self.settings[key]) if key in self.settings else f"{self.file}: {key} = {show_value(self.value(key))} (default)"

    def at_table(self, key: str, number: int) -> str:
        """The place of one of a list of tables, counted from 0, and its name, as a message begins."""
        return f"{self.settings[key].tables[number]}: table {number + 1} of [[{key}]]"

    def first_at(self, *keys: str) -> str:
        """The place of the first of the keys that was written; else of the first."""
        return self.at(next((key for key in keys if key in self.settings), keys[0]))

    def value(self, key: str) -> object:
        return self.settings[key].value if key in self.settings else FIELDS[key].default


def find_conflicts(checked: Checked, broken: set[str]) -> list[str]:
    """Every broken relation, as messages."""
    messages: list[str] = []
    for reads, find in RELATIONS:
        if not any(key == read or (read.endswith(".") and key.startswith(read)) for key in broken for read in reads):
            messages += find(checked)
    return messages


def find_notices(checked: Checked) -> Iterator[str]:
    """What may well be meant, such as a short trial of a long run's file, but should not pass in silence."""
    yield from find_replaced_size(checked)
    steps, scheduler = checked.config.training.steps, checked.config.lr_scheduler
    if steps is not None and scheduler.warmup_steps >= steps and scheduler.decay_type != "constant":
        yield f"{checked.at('lr_scheduler.warmup_steps')}: the run has {steps} steps, so the learning rate only rises and never decays"


def find_replaced_size(checked: Checked) -> Iterator[str]:
    """A named size of which the layers below leave nothing but the name."""
    named = checked.settings.get("model.flavor")
    below = [key for key in (f"model.{name}" for name in NEEDED_SIZES) if key in checked.settings]
    if named and named.value and below and all(checked.settings[key].origin.layer < named.origin.layer for key in below):
        fields = ", ".join(f"{key} = {show_value(checked.value(key))}" for key in below)
        yield f"{named}: these take the place of the size's own: {fields} ({checked.settings[below[0]].origin})"


def find_length_fault(checked: Checked) -> Iterator[str]:
    training = checked.config.training
    if training.steps is None and training.epochs is None and not checked.config.checkpoint.create_seed_checkpoint:
        yield f"{checked.file}: the length of the run is not given; write 'steps = 1000' or 'epochs = 1' under [training]"


def find_data_fault(checked: Checked) -> Iterator[str]:
    dataset, needs_none = checked.config.dataset, checked.config.checkpoint.create_seed_checkpoint
    if dataset.path or dataset.hub or dataset.mix:
        return
    if not needs_none:
        yield f"{checked.file}: there is nothing to train on; write 'path = \"data.jsonl\"' under [dataset]"
    elif checked.config.model.resize_embeddings:
        why = "which tokens are added follows from the chat template, and whether there is one from the data"
        yield f"{checked.at('model.resize_embeddings')}: {why}; write 'path = \"data.jsonl\"' under [dataset]"


def find_mix_fault(checked: Checked) -> Iterator[str]:
    """Tables that name no source, and weights that only some have: a share cannot be worked out from those."""
    mix = checked.config.dataset.mix
    has_weights = any(source.weight is not None for source in mix)
    for number, source in enumerate(mix):
        place, name = checked.at_table("dataset.mix", number), source.path or source.hub
        if not name:
            yield f"{place} names no source; give it a path or a hub"
        if has_weights and source.weight is None:
            given = f"repeats = {source.repeats:g}" if source.repeats is not None else "no weight"
            yield f"{place}{f' ({name})' if name else ''} has {given}, but others a weight; give all a weight, or none"


def find_validation_fault(checked: Checked) -> Iterator[str]:
    dataset, validation = checked.config.dataset, checked.config.validation
    if not validation.enable or validation.path or validation.split or validation.fraction is not None:
        return
    ways = ["validation.path (a file)"]
    if dataset.hub:
        ways.append(f"validation.split (another split of {show_value(dataset.hub)})")
    if not dataset.streaming:
        ways.append("validation.fraction (such as 0.05)")
    yield f"{checked.at('validation.enable')}: needs held-out documents; give {', '.join(ways[:-1])} or {ways[-1]}"


def find_epoch_fault(checked: Checked) -> Iterator[str]:
    """Saving by epochs of a stream, which has none."""
    if checked.config.checkpoint.interval_type == "epochs" and checked.config.dataset.streaming:
        stream = f"a stream has no epochs, and dataset.streaming is true ({checked.settings['dataset.streaming'].origin})"
        way = 'set checkpoint.interval_type = "steps" or "seconds", or dataset.streaming = false'
        yield f"{checked.at('checkpoint.interval_type')}: {stream}; {way}"


def find_patience_fault(checked: Checked) -> Iterator[str]:
    """That a run has ended early is in its full checkpoint."""
    if checked.config.validation.patience is not None and checked.config.checkpoint.model_weights_only:
        yield (
            f"{checked.at('checkpoint.model_weights_only')}: the end of a run with validation.patience is known from its last full checkpoint; "
            "leave one of them out (export/ holds the weights alone)"
        )


def find_folder_fault(checked: Checked) -> Iterator[str]:
    """The step folders, TensorBoard's and the profiler's have folders of their own, inside the run folder, which is what is locked."""
    taken: tuple[str, ...] = TAKEN_NAMES
    named = [("checkpoint.folder", "checkpoint")]
    if checked.config.metrics.enable_tensorboard:
        named.append(("metrics.save_tb_folder", "tensorboard"))
    if checked.config.profiling.enable_profiling:
        named.append(("profiling.save_traces_folder", "profile"))
    for key, usual in named:
        folder = str(checked.value(key))
        parts = Path(folder).parts
        if os.path.isabs(folder) or ".." in parts:
            yield f"{checked.at(key)}: lies outside of job.dump_folder; give a name inside it"
        elif not parts or parts[0] in taken:
            yield f'{checked.at(key)}: is taken by the run\'s other outputs; give another name, such as "{usual}"'
        taken = (*taken, *parts[:1])


def find_degree_fault(checked: Checked) -> Iterator[str]:
    """Degrees that do not multiply to the world size."""
    parallelism, world_size = checked.config.parallelism, checked.world_size
    product, degrees = multiply_degrees(parallelism, world_size)
    if product != world_size:
        processes = "1 process" if world_size == 1 else f"{world_size} processes"
        place = checked.first_at(*[key for key in DEGREES if checked.value(key) != 1], *DEGREES)
        shown = " × ".join(f"{key.removesuffix('_degree').removeprefix('parallelism.')} {degree}" for key, degree in degrees.items() if degree != 1)
        shown = shown or "each is 1"
        others = product // degrees["parallelism.data_parallel_shard_degree"]
        hint = f"set data_parallel_shard_degree to {'-1' if others == 1 else world_size // others}, or " if world_size % others == 0 else ""
        yield f"{place}: the degrees multiply to {product} ({shown}), but the run has {processes}; {hint}start with NGPU={product}"
    if checked.config.dataset.streaming and parallelism.context_parallel_degree > 1:
        yield f"{checked.at('parallelism.context_parallel_degree')}: rows of a stream cannot be cut; set it to 1, or dataset.streaming = false"


def multiply_degrees(parallelism: Parallelism, world_size: int) -> tuple[int, dict[str, int]]:
    """How many processes the degrees ask for, and each of them; -1 is what the others leave."""
    degrees = {key: getattr(parallelism, key.removeprefix("parallelism.")) for key in DEGREES}
    degrees["parallelism.data_parallel_shard_degree"] = resolve_shard_degree(parallelism, world_size)
    return math.prod(degrees.values()), degrees


def find_stages_fault(checked: Checked) -> Iterator[str]:
    """Split points that are none, or as many stages as the schedule cannot deal out over the processes."""
    section = checked.config.parallelism
    degree, schedule, points = section.pipeline_parallel_degree, section.pipeline_parallel_schedule, section.pipeline_parallel_split_points
    if degree == 1 or not points:
        return
    place = checked.at("parallelism.pipeline_parallel_split_points")
    numbers = [int(found[1]) if (found := re.fullmatch(r"(?:model\.)?layers\.([1-9][0-9]*)", point)) else -1 for point in points]
    if -1 in numbers:
        wrong = f"{show_value(points[numbers.index(-1)])} is no layer that a later stage can begin with"
        yield f'{place}: {wrong}; give names such as "layers.8", with spaces between them'
    elif any(later <= number for number, later in itertools.pairwise(numbers)):
        yield f"{place}: each stage begins after the one before; give the layers in their order, each once"
    elif (schedule in ONE_STAGE_EACH and len(points) + 1 != degree) or (schedule in BOTH_ENDS and len(points) + 1 != 2 * degree):
        each = 1 if schedule in ONE_STAGE_EACH else 2
        wanted = "1 layer" if each * degree == 2 else f"{each * degree - 1} layers"
        yield f"{place}: makes {len(points) + 1} stages, but {schedule} over {degree} processes has {each * degree}; give {wanted}"
    elif (len(points) + 1) % degree or (len(points) + 1 < 2 * degree and schedule not in ONE_STAGE_EACH):
        yield f"{place}: makes {len(points) + 1} stages, which {degree} processes cannot have two or more each of; give {2 * degree - 1} layers"


def find_backward_fault(checked: Checked) -> Iterator[str]:
    """What a schedule rules out that works out gradients of parameters after those of inputs."""
    section, recompute = checked.config.parallelism, checked.config.activation_checkpoint
    schedule = section.pipeline_parallel_schedule
    if section.pipeline_parallel_degree == 1 or schedule not in TWO_BACKWARD_PASSES:
        return
    why = f"{schedule} works out gradients of parameters after those of inputs"
    if section.fsdp_reshard_after_forward == "always":
        yield f'{checked.at("parallelism.fsdp_reshard_after_forward")}: {why}, and needs the parameters until then; set it to "default" or "never"'
    if recompute.mode == "selective" and recompute.selective_ac_option == "op":
        key = "activation_checkpoint.selective_ac_option"
        place = checked.first_at(key, "activation_checkpoint.mode")
        yield f'{place}: {why}, and what was kept is used but once; set {key} = "2", or activation_checkpoint.mode = "full"'


def find_optimizer_fault(checked: Checked) -> Iterator[str]:
    """What torchao's AdamW8bit does not do."""
    config, place = checked.config, checked.at("optimizer.name")
    if config.optimizer.name != "AdamW8bit":
        return
    if (degree := config.parallelism.tensor_parallel_degree) > 1:
        yield (
            f"{place}: moments of 8 bits are cut by rows only, and parallelism.tensor_parallel_degree = {degree} cuts some matrices by columns; "
            "shard with parallelism.data_parallel_shard_degree instead"
        )
    if config.training.enable_cpu_offload:
        yield f"{place}: moments of 8 bits are not offloaded; remove training.enable_cpu_offload, or take AdamW"
    if config.training.dtype == "float64":
        yield f"{place}: its step computes in float32, which training.dtype = float64 would lose its precision to; take AdamW"


def find_compile_fault(checked: Checked) -> Iterator[str]:
    """What compiled layers cannot be had with, and what cannot be had without them."""
    config = checked.config
    key, why = find_what_rules_out_compile(config)
    if config.compile.enable and key:
        yield f"{checked.at('compile.enable')}: {why} ({key} = {show_value(checked.value(key))}); change that, or set compile.enable = false"
    if config.parallelism.enable_async_tensor_parallel and config.compile.enable is not True:
        place = checked.at("parallelism.enable_async_tensor_parallel")
        yield f"{place}: it is the compiler that overlaps products and communication; set compile.enable = true, or remove this"


def find_schedule_fault(checked: Checked) -> Iterator[str]:
    """A schedule with too few micro-batches, or a number of them that it cannot order."""
    config, parallelism = checked.config, checked.config.parallelism
    degree, schedule = parallelism.pipeline_parallel_degree, parallelism.pipeline_parallel_schedule
    if degree == 1 or multiply_degrees(parallelism, checked.world_size)[0] != checked.world_size:
        return
    ranks = resolve_data_ranks(parallelism, checked.world_size)
    local = resolve_local_batch_size(config.training, parallelism, checked.world_size)
    if config.training.global_batch_size % (ranks * local):
        return
    share = config.training.global_batch_size // ranks
    if has_order(schedule, degree, share // local):
        return
    fitting = [size for size in range(min(share, 4096), 0, -1) if not share % size and has_order(schedule, degree, share // size)]
    ways = [f"training.local_batch_size = {size}" for size in fitting[:1]]
    more = next(count for count in itertools.count(share // local) if has_order(schedule, degree, count))
    ways.append(f"training.global_batch_size = {more * local * ranks}")
    if schedule in ONE_STAGE_EACH or not parallelism.pipeline_parallel_split_points:
        ways.append('parallelism.pipeline_parallel_schedule = "GPipe"')
    place = checked.first_at("parallelism.pipeline_parallel_schedule", "parallelism.pipeline_parallel_degree")
    made = (
        f"{share // local} micro-batch{'es' if share // local > 1 else ''} (global_batch_size {config.training.global_batch_size} / {ranks * local})"
    )
    yield f"{place}: {schedule} over {degree} processes cannot order {made}; set {' or '.join(ways)}"


def has_order(schedule: str, degree: int, count: int) -> bool:
    """Whether a schedule over so many processes can order so many micro-batches; as torch says when it is made."""
    if schedule.startswith("Interleaved"):
        return count >= degree and count % (count // degree) == 0
    return count >= {"1F1B": degree, "DualPipeV": 2 * degree}.get(schedule, 1)


def find_batch_fault(checked: Checked) -> Iterator[str]:
    """Whether the global batch divides; asked for the data ranks that the degrees give."""
    training = checked.config.training
    if multiply_degrees(checked.config.parallelism, checked.world_size)[0] != checked.world_size:
        return
    ranks = resolve_data_ranks(checked.config.parallelism, checked.world_size)
    unit = ranks if training.local_batch_size == -1 else ranks * training.local_batch_size
    if training.global_batch_size % unit == 0:
        return
    below = training.global_batch_size // unit * unit
    works = f"{below} or {below + unit}" if below else str(unit)
    divisor = f"{ranks} processes" if training.local_batch_size == -1 else f"local_batch_size {training.local_batch_size} × {ranks} data ranks"
    keys = ("training.global_batch_size", "training.local_batch_size")
    place = checked.first_at(*sorted(keys, key=lambda key: -checked.settings[key].origin.layer if key in checked.settings else 0))
    batch = "" if "training.global_batch_size" in place else f"global_batch_size {training.global_batch_size} "
    yield f"{place}: {batch}is not a multiple of {divisor}; the nearest that works is training.global_batch_size = {works}" + (
        f", or training.local_batch_size = {largest_divisor(training.global_batch_size // ranks, training.local_batch_size)}"
        if training.local_batch_size != -1 and training.global_batch_size % ranks == 0
        else ""
    )


def largest_divisor(number: int, limit: int) -> int:
    return next(size for size in range(min(limit, number, 4096), 0, -1) if number % size == 0)  # bounded, whatever was typed


def find_model_fault(checked: Checked) -> Iterator[str]:
    """Whether the architecture is known: from weights, a named size, or the fields that have no default."""
    model = checked.config.model
    if model.flavor and model.flavor not in SIZES:
        near = find_nearest(model.flavor, SIZES)
        hint = f"did you mean {show_value(near)}?" if near else f"the named sizes are {', '.join(SIZES)}"
        yield f"{checked.at('model.flavor')}: no such size; {hint}"
    path = checked.config.checkpoint.initial_load_path
    if model.flavor or (path and not has_no_config(path)):
        return
    missing = [name for name in NEEDED_SIZES if getattr(model, name) is None]
    if len(missing) == len(NEEDED_SIZES) and path:
        yield f"{checked.at('checkpoint.initial_load_path')}: has no config.json and no params.json; put one there, or name the size as model.flavor"
    elif len(missing) == len(NEEDED_SIZES):
        yield f"{checked.file}: the model is not given; name a folder of weights as checkpoint.initial_load_path, or a size as model.flavor"
    elif missing:
        yield f"{checked.file}: [model] lacks {', '.join(missing)}; give them, or a named size as model.flavor"


def find_shape_fault(checked: Checked) -> Iterator[str]:
    """Widths that do not divide into heads, with a named size's fields where the user gave none."""

    def size(name: str) -> int | None:
        given = getattr(checked.config.model, name)
        return given if given is not None else SIZES.get(checked.config.model.flavor, {}).get(name)  # type: ignore[return-value]  # counts are int

    hidden, heads, kv_heads, head_dim = size("hidden_size"), size("num_attention_heads"), size("num_key_value_heads"), checked.config.model.head_dim
    if hidden and heads and head_dim is None and hidden % heads:
        place = checked.first_at("model.num_attention_heads", "model.hidden_size")
        yield f"{place}: hidden_size {hidden} does not divide by {heads} heads; change one of them, or give model.head_dim"
    width = head_dim or (hidden // heads if hidden and heads and hidden % heads == 0 else None)
    if width and width % 2:
        place = checked.first_at("model.head_dim", "model.num_attention_heads", "model.hidden_size")
        yield f"{place}: a head has {width} dimensions, and rotary positions need an even number; change model.head_dim or the number of heads"
    if heads and kv_heads and heads % kv_heads:
        place = checked.first_at("model.num_key_value_heads", "model.num_attention_heads")
        yield f"{place}: {heads} query heads do not divide by {kv_heads} key and value heads; num_key_value_heads must divide num_attention_heads"


def find_tokenizer_fault(checked: Checked) -> Iterator[str]:
    config = checked.config
    if config.model.tokenizer_path or config.checkpoint.initial_load_path:
        return
    if config.checkpoint.create_seed_checkpoint and (config.model.vocab_size or config.model.flavor):
        return
    yield f"{checked.file}: there is no tokenizer; name its folder as model.tokenizer_path (only checkpoint.initial_load_path brings its own)"


def find_context_fault(checked: Checked) -> Iterator[str]:
    """Whether seq_len exceeds the context of a model that the config describes itself."""
    model = checked.config.model
    longest = model.max_position_embeddings or SIZES.get(model.flavor, {}).get("max_position_embeddings")
    path = checked.config.checkpoint.initial_load_path
    if longest and (not path or has_no_config(path)):
        yield from find_long_rows(checked, longest, "model.max_position_embeddings" if model.max_position_embeddings else model.flavor)


def find_weights_fault(checked: Checked) -> Iterator[str]:
    """What a config.json beside the weights shows, where there is one; whether the weights exist is asked by the run."""
    weights = checked.config.checkpoint.initial_load_path
    path = Path(os.path.dirname(weights) if os.path.isfile(weights) else weights) / "config.json"
    if not weights or not os.path.isfile(path):
        return
    place = checked.at("checkpoint.initial_load_path")
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        yield f"{place}: {path} cannot be read as JSON: {error}; copy the folder again"
        return
    if not isinstance(found, dict):
        yield f"{place}: {path} holds no JSON object; copy the folder again"
        return
    names = found.get("architectures")
    if not isinstance(names, list) or not any(name in ARCHITECTURES for name in names):
        shown = show_value(names) if names else "nothing"
        yield f"{place}: {path} names {shown} under 'architectures'; tunelib trains {', '.join(ARCHITECTURES)}"
    longest = found.get("max_position_embeddings")
    if isinstance(longest, int) and not isinstance(longest, bool):
        yield from find_long_rows(checked, longest, str(path))


def find_export_fault(checked: Checked) -> Iterator[str]:
    """A run that would replace the export that it starts from."""
    path = checked.config.checkpoint.initial_load_path
    if path and os.path.realpath(path) == os.path.realpath(resolve_dump_folder(checked.config) / "export"):
        place = checked.at("checkpoint.initial_load_path")
        yield f"{place}: is the export that this run would replace at its end; give job.dump_folder another folder"


def find_rollback_fault(checked: Checked) -> Iterator[str]:
    """Going back to checkpoints that nobody writes."""
    if checked.config.training.on_nonfinite == "rollback" and not checked.config.checkpoint.enable_checkpoint:
        yield f'{checked.at("training.on_nonfinite")}: there is nothing to go back to; set checkpoint.enable_checkpoint = true, or this to "skip"'


def find_adapter_fault(checked: Checked) -> Iterator[str]:
    """Adapters beside nothing, or of a base that nobody keeps."""
    section = checked.config.lora
    if section.enable and not (section.target_modules and all(section.target_modules)):
        yield f'{checked.at("lora.target_modules")}: names no layer; give "all-linear", or names such as "q_proj"'
    if section.enable and section.save_adapter_weights_only and not checked.config.checkpoint.initial_load_path:
        yield f"{checked.at('lora.save_adapter_weights_only')}: leaves an adapter whose base is drawn from training.seed, and kept nowhere; remove it"


def find_recompute_fault(checked: Checked) -> Iterator[str]:
    """An option that is neither "op" nor a number of layers."""
    option = checked.config.activation_checkpoint.selective_ac_option
    if option != "op" and not (option.isascii() and option.isdigit() and int(option) > 0):
        yield f'{checked.at("activation_checkpoint.selective_ac_option")}: expected "op", or a number of layers such as "2"'


def find_long_rows(checked: Checked, longest: object, source: str) -> Iterator[str]:
    if checked.config.training.seq_len > longest:  # type: ignore[operator]  # both are int
        yield f"{checked.at('training.seq_len')}: the model takes at most {longest} tokens ({source}); set training.seq_len = {longest} or less"


RELATIONS: tuple[tuple[tuple[str, ...], Callable[[Checked], Iterator[str]]], ...] = (
    (("training.steps", "training.epochs", "checkpoint.create_seed_checkpoint"), find_length_fault),
    (("dataset.path", "dataset.hub", "dataset.mix", "checkpoint.create_seed_checkpoint", "model.resize_embeddings"), find_data_fault),
    (("dataset.mix",), find_mix_fault),
    (("validation.enable", "validation.path", "validation.split", "validation.fraction", "dataset.hub", "dataset.streaming"), find_validation_fault),
    (("checkpoint.interval_type", "dataset.streaming"), find_epoch_fault),
    (("checkpoint.model_weights_only", "validation.patience"), find_patience_fault),
    (("checkpoint.folder", "metrics.save_tb_folder", "metrics.enable_tensorboard", "profiling."), find_folder_fault),
    (("training.on_nonfinite", "checkpoint.enable_checkpoint"), find_rollback_fault),
    (("lora.", "checkpoint.initial_load_path"), find_adapter_fault),
    (("activation_checkpoint.",), find_recompute_fault),
    (("parallelism.", "dataset.streaming"), find_degree_fault),
    (("parallelism.",), find_stages_fault),
    (("parallelism.", "activation_checkpoint."), find_backward_fault),
    (("parallelism.", "optimizer.name", "training.dtype", "training.enable_cpu_offload"), find_optimizer_fault),
    (("parallelism.", "activation_checkpoint.", "compile."), find_compile_fault),
    (("parallelism.", "training.global_batch_size", "training.local_batch_size"), find_batch_fault),
    (("parallelism.", "training.global_batch_size", "training.local_batch_size"), find_schedule_fault),
    (("model.", "checkpoint.initial_load_path"), find_model_fault),
    (("model.",), find_shape_fault),
    (("model.", "checkpoint.initial_load_path", "checkpoint.create_seed_checkpoint"), find_tokenizer_fault),
    (("model.", "checkpoint.initial_load_path", "training.seq_len"), find_context_fault),
    (("checkpoint.initial_load_path", "training.seq_len"), find_weights_fault),
    (("checkpoint.initial_load_path", "job.dump_folder"), find_export_fault),
)
"""The keys that a relation reads (a section ends in a dot), and the relation."""
