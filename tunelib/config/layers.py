"""Reads a TOML file and the files it is based on into settings with their lines; every problem is collected, none raised."""

import json
import os
import re
import sys
import typing
from dataclasses import dataclass, field, replace
from pathlib import Path

from tunelib.config.effect import resolve_effects
from tunelib.config.fields import (
    FIELDS,
    LARGEST_INTEGER,
    SECTIONS,
    TABLE_FIELDS,
    TABLE_SECTIONS,
    TABLES,
    convert_value,
    fill_section,
    find_fault,
    find_nearest,
    show_value,
)
from tunelib.config.renamed import RENAMED, REPLACED, UNBUILT
from tunelib.config.settings import Origin, Problem, Setting, explain_stranger
from tunelib.config.toml_lines import TomlLines, find_lines

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

EVERY_KEY = tuple(FIELDS)
SHIPPED_CONFIGS = Path(__file__).parents[2] / "train_configs"
SYNTAX_HINTS = {
    "invalid value": "text needs quotes; true and false are lower case",
    "after a key": "a line is 'key = value', a section is '[name]'",
    "invalid statement": "a line is 'key = value', a section is '[name]'",
    "after a statement": "one 'key = value' per line; text needs quotes",
    "illegal character": "a text ends on its line with the quote it began with",
    "unescaped": "write \\\\ for one backslash, or put the text in single quotes",
}


@dataclass
class Files:
    """What the config file and its bases say, the lowest layer first."""

    settings: list[Setting] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


@dataclass(frozen=True)
class Document:
    """One TOML file as read."""

    file: str
    data: dict
    lines: TomlLines

    def place(self, *names: str | int) -> str:
        return f"{self.file}:{self.lines.lines.get(names, 1)}"


def read_files(file: str) -> Files:
    """The settings of the file and of its chain of bases, each with its layer."""
    found = Files()
    documents: list[Document] = []
    chain: list[str] = []
    asked_by = "command line"
    next_file: str | None = file
    while next_file:
        if "\0" in next_file:
            found.problems.append(Problem(f"{asked_by}: {show_value(next_file)} cannot be the name of a file", EVERY_KEY))
            break
        chain.append(next_file)
        if os.path.realpath(next_file) in map(os.path.realpath, chain[:-1]):
            message = f"{asked_by}: base: these files are based on each other: {' → '.join(chain)}; remove one of the 'base' lines"
            found.problems.append(Problem(message, EVERY_KEY))
            break
        document = read_document(next_file, asked_by, found.problems)
        if document is None:
            break
        documents.append(document)
        next_file, asked_by = read_base(document, found.problems), document.place("base")
    for layer, document in enumerate(reversed(documents), start=1):
        read_table(document, document.data, (), layer, found)
    return found


def read_document(file: str, asked_by: str, problems: list[Problem]) -> Document | None:
    """The parsed file, or None with a problem that says why there is none."""
    content, text = b"", ""
    try:
        content = Path(file).read_bytes()
        text = content.decode().removeprefix("\ufeff").replace("\r\n", "\n")
        return Document(file, tomllib.loads(text), find_lines(text))
    except FileNotFoundError:
        message = f"{asked_by}: there is no config file {file}{suggest_file(file)}"
    except OSError as error:
        message = f"{asked_by}: the config file {file} cannot be read: {error.strerror or error}"
    except UnicodeDecodeError as error:
        line, byte = content.count(b"\n", 0, error.start) + 1, content[error.start]
        message = f"{file}:{line}: not UTF-8: byte 0x{byte:02x} at offset {error.start}; save the file as UTF-8"
    except RecursionError:
        message = f"{file}: brackets are nested too deeply to be read; no setting needs more than three levels"
    except ValueError as error:
        message = f"{file}:{explain_syntax(text, str(error))}"
    problems.append(Problem(message, EVERY_KEY))
    return None


def explain_syntax(text: str, complaint: str) -> str:
    """The line and what is wrong with it, in tomllib's words; a key that stands twice is named with both lines."""
    lines = text.split("\n")
    if any(word in complaint for word in ("overwrite", "twice", "uplicate", "mutate")):
        found = find_lines(text)
        for path, line in found.repeated:
            name = ".".join(map(str, path))
            what = f"section [{name}]" if lines[line - 1].lstrip().startswith("[") else f"key '{name}'"
            return f"{line}: {what} is given twice, first in line {found.lines[path]}; keep one"
    position = re.search(r" \(at (?:line (\d+), column \d+|end of document)\)", complaint)
    if position is None:  # Python's own limit on the digits of a number, which is no TOML error
        line = next((number for number, source in enumerate(lines, start=1) if re.search(r"[0-9_]{1000}", source)), 1)
        return f"{line}: a number has too many digits; the largest whole number is {LARGEST_INTEGER}"
    line, words = int(position[1] or len(text.rstrip().split("\n"))), complaint[: position.start()]
    if not position[1]:
        return f"{line}: not valid TOML: the file ends before {show_value(lines[line - 1].strip())} is complete; close its bracket or quotes"
    hint = next((f"; {hint}" for fragment, hint in SYNTAX_HINTS.items() if fragment in words.lower()), "")
    return f"{line}: not valid TOML: {words[:1].lower() + words[1:]} in {show_value(lines[line - 1].strip())}{hint}"


def suggest_file(file: str) -> str:
    """A config near by that may be meant: one of the same name that is shipped, or a near miss in the same folder."""
    folder, name = os.path.split(file)
    stem = name.removesuffix(".toml")
    shipped = {path.stem: os.path.relpath(path) for path in SHIPPED_CONFIGS.glob("*.toml")}
    beside = {path.stem: os.path.join(folder, path.name) for path in sorted(Path(folder or ".").glob("*.toml"))}
    for names in (beside, shipped):
        near = find_nearest(stem, names)
        if near:
            return f"; did you mean {names[near]}?"
    return "; give the path of a TOML file"


def read_base(document: Document, problems: list[Problem]) -> str | None:
    base = document.data.get("base", "")
    if isinstance(base, str) and ("base" not in document.data or base):
        return os.path.normpath(os.path.join(os.path.dirname(document.file), base)) if base else None
    message = f'{document.place("base")}: base = {show_value(base)}: expected the name of a TOML file, such as base = "other.toml"'
    problems.append(Problem(message, EVERY_KEY))
    return None


def read_table(document: Document, table: dict, above: tuple[str, ...], layer: int, found: Files) -> None:
    for name, value in table.items():
        path = (*above, name)
        place = document.place(*path)
        key = ".".join(map(spell_name, path))
        if key == "base":
            continue
        if key in SECTIONS and isinstance(value, dict):
            read_table(document, value, path, layer, found)
        elif key in SECTIONS:
            shown = f"[[{key}]]" if isinstance(value, list) and value and isinstance(value[0], dict) else f"{key} = {show_value(value)}"
            message = f"{place}: {shown} is not a table; write [{key}] and its keys on the lines below"
            found.problems.append(Problem(message, tuple(k for k, item in FIELDS.items() if f"{item.section}.".startswith(f"{key}."))))
        elif key in FIELDS:
            setting = Setting(key, value, Origin(layer, document.file, document.lines.lines.get(path, 1)))
            if key in TABLES and find_fault(FIELDS[key], value) is None:
                read_list_of_tables(document, setting, path, found)
            else:
                read_value(setting, found)
        else:
            found.problems += list_strangers(document, key, path, value)


def read_value(setting: Setting, found: Files) -> None:
    schema_field = FIELDS[setting.key] if setting.key in FIELDS else TABLE_FIELDS[setting.key]
    if setting.key == "job.config_file":
        found.problems.append(Problem(f"{setting}: the config file is named on the command line, never in a file; remove this line"))
        return
    fault = find_fault(schema_field, setting.value)
    if fault:
        found.problems.append(Problem(f"{setting}: {fault}", (setting.key,)))
    else:
        found.settings.append(Setting(setting.key, convert_value(schema_field, setting.value), setting.origin))


def read_list_of_tables(document: Document, setting: Setting, path: tuple[str, ...], found: Files) -> None:
    """One value of all tables, each judged by itself: an unknown key, a bad value, a key without effect."""
    tables, places, num_problems = [], [], len(found.problems)
    for number, table in enumerate(typing.cast(list, setting.value)):
        inner = Files()
        read_entry(document, table, setting.key, (*path, number), setting.origin.layer, inner)
        broken = {key for problem in inner.problems for key in problem.keys}
        effects = resolve_effects({item.key: item for item in inner.settings if item.key not in broken}, broken)
        found.problems += [Problem(problem.message, (setting.key,)) for problem in [*inner.problems, *effects.problems]]
        tables.append(fill_section(setting.key, TABLE_SECTIONS, {key: item.value for key, item in effects.settings.items()}))
        places.append(replace(setting.origin, line=document.lines.lines.get((*path, number), setting.origin.line)))
    if len(found.problems) == num_problems:
        found.settings.append(replace(setting, value=tuple(tables), tables=tuple(places)))


def read_entry(document: Document, table: dict, section: str, path: tuple[str | int, ...], layer: int, inner: Files) -> None:
    for name, value in table.items():
        key, place = f"{section}.{spell_name(name)}", document.place(*path, name)
        if key in TABLE_SECTIONS and isinstance(value, dict):
            read_entry(document, value, key, (*path, name), layer, inner)
        elif key in TABLE_FIELDS:
            read_value(Setting(key, value, Origin(layer, document.file, document.lines.lines.get((*path, name), 1))), inner)
        else:
            names = [item.name for item in TABLE_FIELDS.values() if item.section == section]
            names += [inner.rpartition(".")[2] for inner in TABLE_SECTIONS if inner.rpartition(".")[0] == section]
            near = find_nearest(name, names)
            hint = f"did you mean {near!r}?" if near else f"its keys are {', '.join(names)}"
            shown = f"[[{section}]]" if section in TABLES else f"[{section}]"
            message = f"{place}: {shown} has no key {name!r} (= {show_value(value)}); {hint}"
            inner.problems.append(Problem(message, (f"{section}.{near}",) if near else ()))


def list_strangers(document: Document, key: str, path: tuple[str, ...], value: object) -> list[Problem]:
    """The problems of a key or table that the schema does not have; keys of another era are named one by one."""
    section, name = key.removesuffix(spell_name(path[-1])).rstrip("."), spell_name(path[-1])
    if not isinstance(value, dict) or key in UNBUILT:
        return [explain_stranger(section, name, value, document.place(*path))]
    known = [inner for inner in value if f"{key}.{inner}" in (RENAMED.keys() | REPLACED.keys() | UNBUILT.keys())]
    problems = [explain_stranger(key, inner, value[inner], document.place(*path, inner)) for inner in known]
    if len(known) < len(value) or not value:
        problems.append(explain_stranger(section or key, name if section else "", value, document.place(*path)))
    return problems


def spell_name(name: str) -> str:
    """A name as a dotted key holds it: in quotes where it is not plain, so that "a.b" is no key b of a section a."""
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name, ensure_ascii=False)
