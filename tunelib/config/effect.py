"""Which settings do something: what each key needs to have an effect, and which keys exclude each other.

Within one layer a key without effect, or two keys that exclude each other, are a mistake. Across layers the higher one wins: what a
lower layer said is dropped, with one notice, so that one flag can switch off a section of a shipped file.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields

from tunelib.config.fields import FIELDS, TABLE_FIELDS, is_unset, show_value
from tunelib.config.schema import FORMAT_COLUMNS, Columns
from tunelib.config.settings import Problem, Setting


@dataclass(frozen=True)
class Need:
    """``keys`` have an effect unless ``switch`` has one of the values ``off``."""

    keys: tuple[str, ...]
    switch: str
    off: tuple[object, ...]


def keys_of(section: str, *without: str) -> tuple[str, ...]:
    """Every key of a section and of the sections inside it."""
    return tuple(key for key in FIELDS if key.startswith(f"{section}.") and key not in without)


WITHOUT_CHECKPOINTS = ("checkpoint.enable_checkpoint", "checkpoint.initial_load_path", "checkpoint.export_dtype")
"""Keys of [checkpoint] that work while nothing is saved during training."""


def needs_of_source(section: str) -> Iterator[Need]:
    """A column needs a format that has it; what chooses a part of a Hub data set needs the data set's name."""
    for column in dict.fromkeys(column for columns in FORMAT_COLUMNS.values() for column in columns):
        yield Need((f"{section}.columns.{column}",), f"{section}.format", tuple(name for name, own in FORMAT_COLUMNS.items() if column not in own))
    yield Need((f"{section}.subset", f"{section}.split", f"{section}.revision"), f"{section}.hub", ("",))


NEEDS = (
    Need(keys_of("checkpoint", *WITHOUT_CHECKPOINTS), "checkpoint.enable_checkpoint", (False,)),
    Need(("checkpoint.load_step",), "checkpoint.resume", ("never",)),
    Need(keys_of("validation", "validation.enable"), "validation.enable", (False,)),
    Need(("validation.max_new_tokens",), "validation.prompts", ((),)),
    Need(("optimizer.beta1", "optimizer.beta2", "optimizer.eps"), "optimizer.name", ("SGD",)),
    Need(("optimizer.momentum",), "optimizer.name", ("AdamW",)),
    Need(("lr_scheduler.decay_ratio", "lr_scheduler.min_lr_factor"), "lr_scheduler.decay_type", ("constant",)),
    Need(keys_of("model.rope_scaling", "model.rope_scaling.rope_type"), "model.rope_scaling.rope_type", ("default",)),
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
    *(("dataset.mix", f"dataset.{name}") for name in ("path", "hub", "format", *(f"columns.{field.name}" for field in fields(Columns)))),
    *(("checkpoint.initial_load_path", key) for key in keys_of("model", "model.tokenizer_path", "model.resize_embeddings")),
)
"""Pairs of which at most one may be given."""


@dataclass
class Effects:
    """The settings that stand, what is wrong, and what was dropped."""

    settings: dict[str, Setting]
    problems: list[Problem] = field(default_factory=list)
    dropped: list[tuple[Setting, Setting, str]] = field(default_factory=list)
    """(cause, dropped, why) each."""

    @property
    def notices(self) -> list[str]:
        """One line per cause."""
        causes: dict[tuple[str, str], list[str]] = {(str(cause), why): [] for cause, _, why in self.dropped}
        for cause, gone, why in self.dropped:
            causes[str(cause), why].append(f"{gone.key} ({gone.origin})")
        return [f"{cause}: {why} {', '.join(gone)}" for (cause, why), gone in causes.items()]


def resolve_effects(settings: dict[str, Setting], broken: set[str]) -> Effects:
    """Settings without those that a higher layer made idle; ``broken`` keys have an unknown value and judge nothing."""
    effects = Effects(dict(settings))
    flagged: set[str] = set()
    for need in NEEDS:
        for key in need.keys:
            if key in effects.settings and key not in flagged and need.switch not in broken and is_off(need, effects.settings):
                flagged |= settle_idle(key, need, effects)
    for one, other in EXCLUSIVE:
        if not flagged & {one, other} and is_given(one, effects.settings) and is_given(other, effects.settings):
            flagged |= settle_excluded(one, other, effects)
    return effects


def has_effect(key: str, settings: dict[str, Setting]) -> bool:
    """Whether the key's value, given or default, does something beside these settings."""
    if any(key in need.keys and is_off(need, settings) for need in NEEDS):
        return False
    return not any(key in pair and is_given(pair[pair[0] == key], settings) for pair in EXCLUSIVE)


def settle_idle(key: str, need: Need, effects: Effects) -> set[str]:
    """Drops the key if a higher layer turned it off; else it is a problem, and the key is returned."""
    idle, switch = effects.settings[key], effects.settings.get(need.switch)
    if switch and switch.origin.layer > idle.origin.layer:
        effects.dropped.append((switch, effects.settings.pop(key), "turns off"))
        return set()
    value, place = (switch.value, str(switch.origin)) if switch else (default_of(need.switch), "the default")
    state = "is not given" if is_unset(value) else f"is {show_value(value)} ({place})"
    effects.problems.append(Problem(f"{idle}: has no effect while {need.switch} {state}; {advise(need, idle)}, or remove this", (key,)))
    return {key}


def settle_excluded(one: str, other: str, effects: Effects) -> set[str]:
    """Drops the key of the lower layer; in one layer it is a problem, and the later key is returned."""
    low, high = sorted((effects.settings[one], effects.settings[other]), key=lambda setting: setting.origin.layer)
    if low.origin.layer < high.origin.layer:
        effects.dropped.append((high, effects.settings.pop(low.key), "takes the place of"))
        return set()
    place = low.origin if low.origin.file else low.written
    effects.problems.append(Problem(f"{high}: excludes {low.key} = {show_value(low.value)} ({place}); keep one of the two", (one, other)))
    return {other}


def advise(need: Need, idle: Setting) -> str:
    """How to switch it on, where the idle setting stands."""
    switch = (FIELDS | TABLE_FIELDS)[need.switch]
    choices = [choice for choice in switch.choices if choice not in need.off]
    if switch.kind == "bool":
        on = show_value(True not in need.off)
        return f"set {need.switch} = {on}" if idle.origin.file else f"add {switch.flag}" + (" false" if on == "false" else "")
    if not idle.origin.file:
        return f"add {switch.flag}" + (f" {' or '.join(choices)}" if choices else "")
    if choices:
        return f"set {need.switch} = {' or '.join(show_value(choice) for choice in choices)}"
    return f"give {need.switch}"


def is_off(need: Need, settings: dict[str, Setting]) -> bool:
    value = settings[need.switch].value if need.switch in settings else default_of(need.switch)
    return value in need.off


def default_of(key: str) -> object:
    return (FIELDS | TABLE_FIELDS)[key].default


def is_given(key: str, settings: dict[str, Setting]) -> bool:
    return key in settings and not is_unset(settings[key].value)
