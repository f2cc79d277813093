"""What was written, by whom and where: the vocabulary that the readers of files and of the command line share."""

from dataclasses import dataclass

from tunelib.config.fields import FIELDS, SECTIONS, Field, find_nearest, show_value
from tunelib.config.renamed import RENAMED, REPLACED, UNBUILT

DEFAULT_LAYER, COMMAND_LINE_LAYER = 0, 1_000_000


@dataclass(frozen=True)
class Origin:
    """Where a value came from. A higher ``layer`` wins: default < base < file < command line."""

    layer: int = DEFAULT_LAYER
    file: str = ""
    line: int = 0

    def __str__(self) -> str:
        if self.layer == DEFAULT_LAYER:
            return "default"
        return "command line" if self.layer == COMMAND_LINE_LAYER else f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Setting:
    """One value that someone wrote."""

    key: str
    value: object
    origin: Origin
    written: str = ""
    """The words on the command line, as typed."""
    tables: tuple[Origin, ...] = ()
    """Where each table of a list of tables stands."""

    def __str__(self) -> str:
        """Its place and what stands there, as messages begin."""
        return f"{self.origin}: {self.written or f'{self.key} = {show_value(self.value)}'}"


@dataclass(frozen=True)
class Problem:
    """A message, and the keys whose value is unknown because of it: nothing further is said about those."""

    message: str
    keys: tuple[str, ...] = ()


def explain_stranger(section: str, name: str, value: object, place: str, flag: str = "") -> Problem:
    """The problem of a key that the schema does not have, in a file or on the command line (``flag``: the words as typed)."""
    key = f"{section}.{name}" if section else name
    unbuilt = next((part for part in (key, section, section.partition(".")[0]) if part in UNBUILT), None)
    if unbuilt:
        what = f"[{unbuilt}]" if "." not in unbuilt else unbuilt
        return Problem(f"{place}: {flag or what}: {UNBUILT[unbuilt]} is not built yet; remove {'it' if flag else 'this'}")
    if key in REPLACED:
        return Problem(f"{place}: {flag or f'{key} = {show_value(value)}'}: has no counterpart here: {REPLACED[key]}; remove it")
    if key in RENAMED:
        today = FIELDS[RENAMED[key]]
        return Problem(f"{place}: {key} is an older spelling; write '{today.name} = {show_value(value)}' under [{today.section}]", (today.key,))
    if section in SECTIONS:
        return explain_strange_name(section, name, value, place, flag)
    return explain_strange_section(section, name, value, place, flag)


def explain_strange_name(section: str, name: str, value: object, place: str, flag: str) -> Problem:
    start = f"{place}: {flag}: [{section}] has no key '{name}'" if flag else f"{place}: [{section}] has no key '{name}' (= {show_value(value)})"
    names = [field.name for field in FIELDS.values() if field.section == section]
    inner = {key.rpartition(".")[2]: key for key in SECTIONS if key.startswith(f"{section}.")}
    if isinstance(value, dict) and (table := find_nearest(name, inner)):
        return Problem(f"{start}; did you mean [{inner[table]}]?")
    near = find_nearest(name, names)
    homes = find_homes(name)
    if homes and not (near and len(homes) > 1):
        return Problem(f"{start}; {point_to(homes, flag)}", (homes[0].key,))
    if near:
        field = FIELDS[f"{section}.{near}"]
        return Problem(f"{start}; did you mean {field.flag if flag else repr(near)}?", (field.key,))
    nearest = find_homes(find_nearest(name, [field.name for field in FIELDS.values()]))
    if nearest:
        return Problem(f"{start}; {point_to(nearest, flag, guess=True)}", tuple(field.key for field in nearest))
    return Problem(f"{start}; its keys are {', '.join(names)}")


def explain_strange_section(section: str, name: str, value: object, place: str, flag: str) -> Problem:
    """A table that is no section, or a key that stands outside of every section."""
    if name in SECTIONS:
        return Problem(f"{place}: {flag}: [{name}] is a section; a flag names one of its keys, such as {find_first_key(name).flag}")
    if not section:
        homes = find_homes(name)
        guesses = homes or find_homes(find_nearest(name, [field.name for field in FIELDS.values()]))
        hint = point_to(guesses, flag, guess=not homes) if guesses else "--help shows the keys there are"
        return Problem(f"{place}: {flag or f'{name} = {show_value(value)}'} names no section; {hint}", tuple(field.key for field in guesses))
    near = find_nearest(section, SECTIONS)
    hint = f"did you mean [{near}]?" if near else f"the sections are {', '.join(SECTIONS)}"
    start = f"{place}: {flag}: there is no section [{section}]" if flag else f"{place}: there is no section [{section}]"
    return Problem(f"{start}; {hint}", tuple(key for key, field in FIELDS.items() if near and field.section == near))


def find_homes(name: str | None) -> list[Field]:
    """The settings of this name, in any section."""
    return [field for field in FIELDS.values() if field.name == name]


def find_first_key(section: str) -> Field:
    return next(field for field in FIELDS.values() if field.section == section)


def point_to(fields: list[Field], flag: str, guess: bool = False) -> str:
    """Where to go instead: flags on the command line; in a file the section, with the key where it is a guess."""
    if flag:
        return f"did you mean {' or '.join(field.flag for field in fields)}?"
    if guess:
        return f"did you mean {' or '.join(f'{field.name!r} of [{field.section}]' for field in fields)}?"
    return f"it belongs to {' or '.join(f'[{field.section}]' for field in fields)}"
