"""Which settings do something: what each key needs to have an effect, and which keys exclude each other.

Within one layer a key without effect, or two keys that exclude each other, are a mistake. Across layers the higher one wins: what a
lower layer said is dropped, with one notice, so that one flag can switch off a section of a shipped file. What needs a dropped key is
dropped with it, unless it stands in the layer that dropped the key, or above.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

from tunelib.config.fields import FIELDS, TABLE_FIELDS, is_unset, show_value
from tunelib.config.schema import FORMAT_COLUMNS
from tunelib.config.settings import Problem, Setting


@dataclass(frozen=True)
class Need:
    """``keys`` have an effect unless ``switch`` has one of the values ``off``; where there are none, unless it is given."""

    keys: tuple[str, ...]
    switch: str
    off: tuple[object, ...] = ()


def keys_of(section: str, *without: str) -> tuple[str, ...]:
    """Every key of a section and of the sections inside it."""
    return tuple(key for key in FIELDS if key.startswith(f"{section}.") and key not in without)


WITHOUT_CHECKPOINTS = (
    *("checkpoint.enable_checkpoint", "checkpoint.initial_load_path"),
    *("checkpoint.export_dtype", "checkpoint.export_format", "checkpoint.verify_export"),
)
"""Keys of [checkpoint] that work while nothing is saved during training."""


def needs_of_source(section: str) -> Iterator[Need]:
    """A column needs a format that has it; what chooses a part of a Hub data set needs the data set's name."""
    for column in dict.fromkeys(column for columns in FORMAT_COLUMNS.values() for column in columns):
        yield Need((f"{section}.columns.{column}",), f"{section}.format", tuple(name for name, own in FORMAT_COLUMNS.items() if column not in own))
    yield Need((f"{section}.subset", f"{section}.split", f"{section}.revision"), f"{section}.hub", ("",))


NEEDS = (
    Need(keys_of("checkpoint", *WITHOUT_CHECKPOINTS), "checkpoint.enable_checkpoint", (False,)),
    Need(keys_of("lora", "lora.enable"), "lora.enable", (False,)),
    Need(("parallelism.pipeline_parallel_schedule", "parallelism.pipeline_parallel_split_points"), "parallelism.pipeline_parallel_degree", (1,)),
    Need(("parallelism.enable_async_tensor_parallel",), "parallelism.tensor_parallel_degree", (1,)),
    Need(("activation_checkpoint.selective_ac_option",), "activation_checkpoint.mode", ("none", "full")),
    Need(("checkpoint.model_weights_only", "checkpoint.create_seed_checkpoint"), "lora.enable", (True,)),
    Need(("checkpoint.export_format", "checkpoint.export_dtype", "checkpoint.verify_export"), "lora.save_adapter_weights_only", (True,)),
    Need(("checkpoint.load_step",), "checkpoint.resume", ("never",)),
    Need(("checkpoint.keep_best",), "validation.enable", (False,)),
    Need(("checkpoint.load_best_at_end",), "checkpoint.keep_best", (False,)),
    Need(("training.max_nonfinite_steps",), "training.on_nonfinite", ("stop",)),
    Need(keys_of("validation", "validation.enable"), "validation.enable", (False,)),
    Need(keys_of("profiling", "profiling.enable_profiling"), "profiling.enable_profiling", (False,)),
    Need(("validation.max_new_tokens",), "validation.prompts", ((),)),
    Need(("metrics.save_tb_folder",), "metrics.enable_tensorboard", (False,)),
    Need(("metrics.wandb_project", "metrics.wandb_name", "metrics.wandb_mode"), "metrics.enable_wandb", (False,)),
    Need(("validation.task_path", "validation.task_limit", "validation.task_chat_template"), "validation.tasks", ((),)),
    Need(("optimizer.beta1", "optimizer.beta2", "optimizer.eps"), "optimizer.name", ("SGD",)),
    Need(("optimizer.momentum",), "optimizer.name", ("AdamW", "AdamW8bit")),
    Need(("lr_scheduler.decay_ratio", "lr_scheduler.min_lr_factor"), "lr_scheduler.decay_type", ("constant",)),
    Need(keys_of("model.rope_scaling", "model.rope_scaling.rope_type"), "model.rope_scaling.rope_type", ("default",)),
    Need(("dataset.subset", "dataset.split", "dataset.revision", "dataset.format", *keys_of("dataset.columns")), "dataset.mix"),
    *needs_of_source("dataset"),
    *needs_of_source("dataset.mix"),
    Need(("dataset.train_on", "dataset.chat_template"), "dataset.format", ("text", "tokens")),
    Need(("dataset.parse_special_tokens",), "dataset.format", ("tokens",)),
    Need(("dataset.streaming", "validation.split"), "dataset.hub", ("",)),
    Need(("dataset.last_batch", "training.epochs", "validation.fraction"), "dataset.streaming", (True,)),
)
"""Outer switches stand before inner ones."""

EXCLUSIVE = (
    ("training.steps", "training.epochs"),
    ("validation.path", "validation.fraction"),
    ("validation.path", "validation.split"),
    ("validation.split", "validation.fraction"),
    *((f"{section}.path", f"{section}.hub") for section in ("dataset", "dataset.mix")),
    ("dataset.mix.weight", "dataset.mix.repeats"),
    ("dataset.mix", "dataset.path"),
    ("dataset.mix", "dataset.hub"),
    *(("checkpoint.initial_load_path", key) for key in keys_of("model", "model.tokenizer_path", "model.resize_embeddings")),
)
"""Pairs of which at most one may be given, but see `excludes`."""


@dataclass(frozen=True)
class Drop:
    """A setting that went, and the one of a higher layer that did it."""

    gone: Setting
    cause: Setting
    verb: str
    """What the cause does to it, for a notice."""


@dataclass
class Effects:
    """The settings that stand, what is wrong, and what was dropped."""

    settings: dict[str, Setting]
    problems: list[Problem] = field(default_factory=list)
    drops: dict[str, Drop] = field(default_factory=dict)

    @property
    def notices(self) -> list[str]:
        """One line per cause."""
        causes: dict[tuple[str, str], list[str]] = {}
        for drop in self.drops.values():
            causes.setdefault((str(drop.cause), drop.verb), []).append(f"{drop.gone.key} ({drop.gone.origin})")
        return [f"{cause}: {verb} {', '.join(gone)}" for (cause, verb), gone in causes.items()]

    def drop(self, gone: Setting, cause: Setting, verb: str) -> None:
        self.drops[gone.key] = Drop(self.settings.pop(gone.key), cause, verb)


def resolve_effects(settings: dict[str, Setting], broken: set[str]) -> Effects:
    """Settings without those that a higher layer made idle; ``broken`` keys have an unknown value and judge nothing."""
    effects = Effects(dict(settings))
    for layer in sorted({setting.origin.layer for setting in settings.values()}, reverse=True):  # so that only what stands drops others
        drop_excluded(layer, effects)
        drop_idle(layer, effects, broken)
    find_problems(effects, broken)
    return effects


def drop_excluded(layer: int, effects: Effects) -> None:
    """Drops what settings of this layer exclude in lower ones."""
    for pair in EXCLUSIVE:
        if excludes(pair, effects.settings):
            low, high = sorted((effects.settings[key] for key in pair), key=lambda setting: setting.origin.layer)
            if low.origin.layer < high.origin.layer == layer:
                effects.drop(low, high, "takes the place of")


def drop_idle(layer: int, effects: Effects, broken: set[str]) -> None:
    """Drops what settings of this layer turn off in lower ones, what needs that, and so on."""
    num_drops = -1
    while len(effects.drops) > num_drops:
        num_drops = len(effects.drops)
        for idle, need in list_idle(effects.settings, broken):
            cause, verb = find_cause(need, effects)
            if cause and idle.origin.layer < cause.origin.layer == layer:
                effects.drop(idle, cause, verb)


def find_cause(need: Need, effects: Effects) -> tuple[Setting | None, str]:
    """The setting by which the switch is as it is, or what dropped the switch; and what that does to the keys that need it."""
    if need.switch in effects.settings:
        return effects.settings[need.switch], "turns off" if need.off else "takes the place of"
    drop = effects.drops.get(need.switch)
    return (drop.cause, drop.verb) if drop else (None, "")


def find_problems(effects: Effects, broken: set[str]) -> None:
    """What is still idle, and pairs that are left, are mistakes; each key is named in one."""
    flagged: set[str] = set()
    for idle, need in list_idle(effects.settings, broken):
        if idle.key not in flagged:
            effects.problems.append(Problem(explain_idle(idle, need, effects.settings), (idle.key,)))
            flagged.add(idle.key)
    for one, other in EXCLUSIVE:
        if not flagged & {one, other} and excludes((one, other), effects.settings):
            effects.problems.append(Problem(explain_pair(effects.settings[one], effects.settings[other]), (one, other)))
            flagged.add(other)


def list_idle(settings: dict[str, Setting], broken: set[str]) -> Iterator[tuple[Setting, Need]]:
    """Each setting without effect, with the need that it lacks."""
    for need in NEEDS:
        if need.switch not in broken and is_off(need, settings):
            yield from ((settings[key], need) for key in need.keys if key in settings)


def has_effect(key: str, settings: dict[str, Setting]) -> bool:
    """Whether the key's value, given or default, does something beside these settings."""
    if any(key in need.keys and is_off(need, settings) for need in NEEDS):
        return False
    return not any(key in pair and is_given(pair[pair[0] == key], settings) and not names_no_model(pair, settings) for pair in EXCLUSIVE)


def excludes(pair: tuple[str, str], settings: dict[str, Setting]) -> bool:
    """Whether both keys of a pair are given, and exclude each other."""
    return all(is_given(key, settings) for key in pair) and not names_no_model(pair, settings)


def names_no_model(pair: tuple[str, str], settings: dict[str, Setting]) -> bool:
    """Whether a pair is of weights that do not say what model they are, so that [model] must."""
    path = settings.get("checkpoint.initial_load_path")
    return "checkpoint.initial_load_path" in pair and path is not None and has_no_config(str(path.value))


WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")


def has_no_config(path: str) -> bool:
    """Whether a path is weights (a file, or a folder with a DCP's .metadata or files of torch.save) without a config.json or params.json."""
    folder = path if os.path.isdir(path) else os.path.dirname(path) or "."
    if not os.path.exists(path) or any(os.path.isfile(os.path.join(folder, name)) for name in ("config.json", "params.json")):
        return False
    try:
        return os.path.isfile(path) or any(name == ".metadata" or name.endswith(WEIGHT_SUFFIXES) for name in os.listdir(folder))
    except OSError:
        return False  # the run will say so


def explain_idle(idle: Setting, need: Need, settings: dict[str, Setting]) -> str:
    if not need.off:
        return f"{idle}: has no effect beside [[{need.switch}]] ({settings[need.switch].origin}); write it inside its tables"
    switch = settings.get(need.switch)
    value, place = (switch.value, str(switch.origin)) if switch else (default_of(need.switch), "the default")
    state = "is not given" if is_unset(value) else f"is {show_value(value)} ({place})"
    return f"{idle}: has no effect while {need.switch} {state}; {advise(need, idle)}, or remove this"


def explain_pair(one: Setting, other: Setting) -> str:
    place = one.origin if one.origin.file else one.written
    is_lost = one.key == "checkpoint.initial_load_path" and not os.path.exists(str(one.value))
    return f"{other}: excludes {one.key} = {show_value(one.value)} ({place}){', where nothing lies' if is_lost else ''}; keep one of the two"


def advise(need: Need, idle: Setting) -> str:
    """How to switch it on, where the idle setting stands."""
    switch = (FIELDS | TABLE_FIELDS)[need.switch]
    choices = [choice for choice in switch.choices if choice not in need.off]
    if switch.kind == "bool":
        on = show_value(True not in need.off)
        return f"set {need.switch} = {on}" if idle.origin.file else f"add {switch.flag}" + (" false" if on == "false" else "")
    is_degree = need.off == (1,)
    if not idle.origin.file:
        return f"add {switch.flag}" + (f" {' or '.join(choices)}" if choices else " 2" if is_degree else "")
    if is_degree:
        return f"set {need.switch} = 2"
    if choices:
        return f"set {need.switch} = {' or '.join(show_value(choice) for choice in choices)}"
    return f"give {need.switch}"


def is_off(need: Need, settings: dict[str, Setting]) -> bool:
    value = settings[need.switch].value if need.switch in settings else default_of(need.switch)
    return value in need.off if need.off else not is_unset(value)


def default_of(key: str) -> object:
    return (FIELDS | TABLE_FIELDS)[key].default


def is_given(key: str, settings: dict[str, Setting]) -> bool:
    return key in settings and not is_unset(settings[key].value)
