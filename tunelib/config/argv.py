"""Reads the command line into settings, keeping the words as typed, and spells settings as tyro expects them.

Booleans may be ``--x.flag``, ``--x.flag=true``, ``--x.flag false`` and ``--x.no-flag``; a list takes several words, or the flag again.
"""

from dataclasses import dataclass, field

from tunelib.config.fields import FIELDS, TABLES, Field, convert_value, find_fault, is_unset, parse_words, show_value
from tunelib.config.renamed import RENAMED
from tunelib.config.settings import COMMAND_LINE_LAYER, Origin, Problem, Setting, explain_stranger

COMMAND_LINE = Origin(COMMAND_LINE_LAYER)
HELP_FLAGS = ("-h", "--help")


@dataclass
class CommandLine:
    """The command line as read."""

    file: str = ""
    settings: list[Setting] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    wants_help: bool = False


@dataclass(frozen=True)
class Flag:
    """One flag and the words that followed it."""

    name: str
    words: list[str]
    joined: bool
    """Its first word came behind an equals sign."""

    def __str__(self) -> str:
        words = [word if word.isprintable() and word and " " not in word else show_value(word) for word in self.words]
        return f"--{self.name}={words[0]}" if self.joined else " ".join([f"--{self.name}", *words])


def read_argv(argv: list[str]) -> CommandLine:
    """Settings of ``FILE --section.key value …``; every problem is collected, none raised."""
    found = CommandLine(wants_help=any(word in HELP_FLAGS for word in argv))
    words = [word for word in argv if word not in HELP_FLAGS]
    if words and not words[0].startswith("-"):
        found.file = words.pop(0)
        found.settings.append(Setting("job.config_file", found.file, COMMAND_LINE, found.file))
    flags, strays = split_flags(words)
    for word in strays:
        found.problems.append(Problem(f"command line: {show_value(word)} belongs to no flag; the config file comes first, a value after its flag"))
    for flag in flags:
        read_flag(flag, found)
    found.file = str(next((setting.value for setting in found.settings if setting.key == "job.config_file"), ""))
    return found


def split_flags(words: list[str]) -> tuple[list[Flag], list[str]]:
    """Flags with the words after them, and the words before any flag."""
    flags: list[Flag] = []
    strays: list[str] = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            flags.append(Flag(name, [value] if equals else [], bool(equals)))
        else:
            (flags[-1].words if flags else strays).append(word)
    return flags, strays


def read_flag(flag: Flag, found: CommandLine) -> None:
    name, negated = split_negation(flag.name)
    key = RENAMED.get(name, name)
    schema_field = FIELDS.get(key)
    table = next((table for table in TABLES if key == table or key.startswith(f"{table}.")), None)
    if table:
        found.problems.append(Problem(f"command line: {flag}: {table} is a list of tables, which only a file can hold", (table,)))
        return
    if schema_field is None:
        stranger = flag.words[0] if len(flag.words) == 1 else tuple(flag.words) or True
        section, _, name = flag.name.rpartition(".")
        found.problems.append(explain_stranger(section, name, stranger, "command line", str(flag)))
        return
    if name in RENAMED:
        found.notices.append(f"command line: --{flag.name} is an older spelling of {schema_field.flag}, which was set")
    problem = find_shape_fault(schema_field, flag, negated)
    if problem:
        found.problems.append(Problem(f"command line: {flag}: {problem}", (key,)))
        return
    value: object = (not negated) if not flag.words and schema_field.kind == "bool" else parse_words(schema_field, flag.words)
    fault = find_fault(schema_field, value)
    if fault:
        found.problems.append(Problem(f"command line: {flag}: {fault}", (key,)))
        return
    add_setting(Setting(key, convert_value(schema_field, value), COMMAND_LINE, str(flag)), schema_field, found)


def split_negation(name: str) -> tuple[str, bool]:
    """The dotted name of a flag, and whether it was the ``no-`` form of a boolean."""
    section, _, last = name.rpartition(".")
    positive = f"{section}.{last[3:]}"
    target = FIELDS.get(RENAMED.get(positive, positive))
    negated = last.startswith(("no-", "no_")) and target is not None and target.kind == "bool"
    return (positive, True) if negated else (name, False)


def find_shape_fault(schema_field: Field, flag: Flag, negated: bool) -> str | None:
    """What is wrong with the number of words after the flag, if anything."""
    if negated and flag.words:
        return f"takes no value; write {schema_field.flag} or {schema_field.flag} false"
    if schema_field.kind == "words" or (schema_field.kind == "bool" and not flag.words):
        return None
    if not flag.words:
        return f"needs a value after it: {schema_field.flag} {schema_field.choices[0] if schema_field.choices else schema_field.kind.upper()}"
    if len(flag.words) > 1:
        return f"takes one value, and {show_value(flag.words[1])} is left over; put quotes around a value with spaces, or a pattern"
    return None


def add_setting(setting: Setting, schema_field: Field, found: CommandLine) -> None:
    """Adds it; a list that is given again grows, anything else may stand once."""
    earlier = next((index for index, other in enumerate(found.settings) if other.key == setting.key), None)
    if earlier is None:
        found.settings.append(setting)
    elif schema_field.kind == "words":
        before = found.settings[earlier]
        found.settings[earlier] = Setting(setting.key, before.value + setting.value, COMMAND_LINE, f"{before.written} {setting.written}")  # type: ignore[operator]  # two tuples
    else:
        message = f"command line: {found.settings[earlier].written} and {setting.written}: {setting.key} is given twice; keep one"
        found.problems.append(Problem(message, (setting.key,)))


def spell_for_tyro(setting: Setting) -> str | None:
    """The setting as the one word that tyro reads without a doubt; None for an empty text and for lists, whose items may look like flags."""
    schema_field = FIELDS[setting.key]
    if schema_field.kind == "bool" and not schema_field.optional:
        return schema_field.flag if setting.value else f"--{schema_field.section}.no-{schema_field.name}"
    if is_unset(setting.value) or schema_field.kind in ("words", "tables"):
        return None
    return f"{schema_field.flag}={setting.value}"
