"""The schema as flat data: one ``Field`` per key, and the rules that a single value keeps.

The same rules hold for a file and for the command line, whose words ``parse_words`` first turns into TOML's types.
"""

import ast
import difflib
import inspect
import itertools
import json
import math
import re
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass

from tunelib.config.schema import Bounds, Config, IsPath, OneOrMore

AUTO = "auto"
"""What a switch may be set to whose default is to choose by itself."""
LARGEST_INTEGER = 2**63 - 1
HALF_PRECISION = ("float16", "fp16", "half")
EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text in quotes",
    "words": "a list of texts",
    "tables": "tables",
}


@dataclass(frozen=True)
class Field:
    """One setting: its dotted key, and what its value may be."""

    key: str
    kind: str
    """A key of EXPECTED."""
    optional: bool
    """None is its default, and means unset."""
    choices: tuple[str, ...]
    bounds: Bounds
    path: IsPath | None
    default: object
    single: bool = False
    """Whether a list of texts may be written as one text."""

    @property
    def section(self) -> str:
        return self.key.rpartition(".")[0]

    @property
    def name(self) -> str:
        return self.key.rpartition(".")[2]

    @property
    def flag(self) -> str:
        return f"--{self.key}"


def is_unset(value: object) -> bool:
    """Whether a value says "nothing": None, an empty text or an empty list."""
    return value is None or value == "" or value == () or value == []


def convert_value(field: Field, value: object) -> object:
    """A value that passed ``find_fault``, in the type that the dataclass holds: 1 → 1.0 for a float, a list → a tuple."""
    if field.kind == "float" and not is_unset(value):
        return float(typing.cast(float, value))
    if field.kind == "bool" and value == AUTO:
        return None
    if field.kind == "words":
        return (value,) if isinstance(value, str) else tuple(typing.cast(list, value))
    return value


def find_fault(field: Field, value: object) -> str | None:
    """What is wrong with a value of TOML's types, as the end of a sentence; None when it may stand."""
    if field.kind == "tables":
        return None if isinstance(value, list) and all(isinstance(item, dict) for item in value) else f"expected tables, each under [[{field.key}]]"
    if field.kind == "words" and field.single and isinstance(value, str):
        return find_text_fault(field, value)
    if field.kind == "words":
        if not isinstance(value, (list, tuple)):
            return f"expected {EXPECTED['words']}, such as [{show_value(str(value))}]"
        return next((fault for item in value if (fault := find_text_fault(field, item))), None)
    if field.kind == "str":
        return find_text_fault(field, value)
    if field.kind == "bool":
        if isinstance(value, bool) or (field.optional and value == AUTO):
            return None
        expected = f'true, false or "{AUTO}"' if field.optional else EXPECTED["bool"]
        return f"expected {expected}{without_quotes(field, value)}"
    return find_number_fault(field, value)


def find_number_fault(field: Field, value: object) -> str | None:
    expected = f"expected {EXPECTED[field.kind]}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return expected + without_quotes(field, value)
    if isinstance(value, float) and field.kind == "int":
        return expected + (f"; write {int(value)}" if math.isfinite(value) and value.is_integer() and abs(value) <= LARGEST_INTEGER else "")
    if isinstance(value, float) and not math.isfinite(value):
        return "expected a finite number"
    if isinstance(value, int) and not -LARGEST_INTEGER - 1 <= value <= LARGEST_INTEGER:
        return f"does not fit in 64 bits; the largest whole number is {LARGEST_INTEGER}"
    return None if keeps_bounds(field.bounds, value) else f"must be {show_bounds(field.bounds)}"


def find_text_fault(field: Field, value: object) -> str | None:
    if not isinstance(value, str):
        wanted = f"one of {show_choices(field)}" if field.choices else "text"
        example = f': write "{show_value(value)}"' if isinstance(value, (bool, int, float)) and not field.choices else ""
        return f"expected {wanted}, in quotes{example}"
    if field.choices and value not in field.choices:
        if value.lower() in HALF_PRECISION and "bfloat16" in field.choices and "float16" not in field.choices:
            return 'float16 would need loss scaling, which is not done here; use "bfloat16", which has the range of float32'
        near = find_nearest(value, field.choices)
        return f"expected one of {show_choices(field)}" + (f'; did you mean "{near}"?' if near else "")
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        return "holds a character that no file name or text can have; remove it"
    if value == "" and field.default:
        return f"must not be empty; the default is {show_value(field.default)}"
    if field.path and value.startswith("~"):
        return "'~' is not expanded here; write the whole path"
    return None


def without_quotes(field: Field, value: object) -> str:
    """A hint where text in quotes would be right without them."""
    if isinstance(value, str) and not isinstance(parsed := parse_word(field, value), str) and find_fault(field, parsed) is None:
        return f", without quotes: {field.name} = {show_value(parsed)}"
    return ""


def keeps_bounds(bounds: Bounds, value: float) -> bool:
    low = (bounds.minimum is None or value >= bounds.minimum) and (bounds.above is None or value > bounds.above)
    return (low and (bounds.maximum is None or value <= bounds.maximum)) or value in bounds.also


def show_bounds(bounds: Bounds) -> str:
    """ "at least 1, or -1" and the like."""
    limits = {"above": bounds.above, "at least": bounds.minimum, "at most": bounds.maximum}
    parts = [f"{word} {limit:g}" for word, limit in limits.items() if limit is not None]
    return " and ".join(parts) + "".join(f", or {value:g}" for value in bounds.also)


def show_choices(field: Field) -> str:
    return ", ".join(f'"{choice}"' for choice in field.choices)


def show_type(field: Field) -> str:
    """The type for people: 'int, at least 1', '"steps" | "seconds"'."""
    if field.choices:
        return " | ".join(f'"{choice}"' for choice in field.choices)
    names = {"words": "list of str", "str": "path" if field.path and not field.path.suffix else "str"}
    name = f'bool or "{AUTO}"' if field.kind == "bool" and field.optional else names.get(field.kind, field.kind)
    return f"{name}, {show_bounds(field.bounds)}" if field.bounds != Bounds() else name


def show_value(value: object, limit: int = 60) -> str:
    """A value as TOML writes it, shortened for a message where it is longer than ``limit`` characters."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value) if value.bit_length() < 200 else f"<a number of {value.bit_length()} bits>"
    if isinstance(value, str):
        text = json.dumps(value if len(value) <= limit else value[:limit] + "…", ensure_ascii=False)
        return text.replace("\x7f", "\\u007f").encode(errors="backslashreplace").decode()
    if isinstance(value, (list, tuple)):
        if any(isinstance(item, (list, dict)) or is_dataclass(item) for item in value):
            return "[…]"
        text = "[" + ", ".join(show_value(item, limit) for item in value) + "]"
        return text if len(text) <= 2 * limit else text[: 2 * limit] + "…"
    return "{…}" if isinstance(value, dict) else str(value)


def parse_words(field: Field, words: list[str]) -> object:
    """The words after a flag in TOML's types; a word that does not fit stays text, for ``find_fault`` to name."""
    return list(words) if field.kind == "words" else parse_word(field, words[0])


def parse_word(field: Field, word: str) -> object:
    if field.kind == "bool":
        return {"true": True, "false": False}.get(word.lower(), word)
    if field.kind in ("int", "float"):
        try:
            return int(word) if re.fullmatch(r"[+-]?[0-9](_?[0-9])*", word) else float(word)
        except ValueError:
            return word
    return word


def find_nearest(word: str, names: Iterable[str]) -> str | None:
    """The name that was probably meant, if any is close."""
    plain = {name.replace("_", "").replace("-", "").lower(): name for name in names}
    matches = difflib.get_close_matches(word.replace("_", "").replace("-", "").lower(), list(plain), n=1, cutoff=0.6)
    return plain[matches[0]] if matches else None


def read_meanings() -> dict[str, str]:
    """Dotted key → the docstring under the field, and section → its class's docstring, from the source of the schema."""
    tree = ast.parse(inspect.getsource(sys.modules[Config.__module__]))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    meanings = {}
    for section, kind in (SECTIONS | TABLE_SECTIONS).items():
        meanings[section] = " ".join((ast.get_docstring(classes[kind.__name__]) or "").split())
        body = [line for base in reversed(kind.__mro__[:-1]) for line in classes[base.__name__].body]
        for line, after in itertools.pairwise(body):
            if isinstance(line, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                meanings[f"{section}.{typing.cast(ast.Name, line.target).id}"] = " ".join(str(after.value.value).split())
    return meanings


def fill_section(section: str, sections: dict[str, type], values: Mapping[str, object]) -> object:
    """The dataclass of a section and of the sections inside it, with these values by dotted key, and defaults elsewhere."""
    inner = {name.rpartition(".")[2]: fill_section(name, sections, values) for name in sections if name.rpartition(".")[0] == section}
    own = {name: values[f"{section}.{name}"] for name in typing.get_type_hints(sections[section]) if f"{section}.{name}" in values}
    return sections[section](**own, **inner)


def list_sections(kind: type, prefix: str) -> Iterator[tuple[str, type]]:
    for name, hint in typing.get_type_hints(kind).items():
        if is_dataclass(hint):
            yield prefix + name, typing.cast(type, hint)
            yield from list_sections(typing.cast(type, hint), f"{prefix}{name}.")


def list_tables(sections: dict[str, type]) -> Iterator[tuple[str, type]]:
    for section, kind in sections.items():
        for name, hint in typing.get_type_hints(kind).items():
            if item := read_table_type(hint):
                yield f"{section}.{name}", item


def read_table_type(hint: object) -> type | None:
    """The dataclass of a list of tables, None for any other type."""
    item = typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else None
    return typing.cast(type, item) if is_dataclass(item) else None


def list_fields(section: str, kind: type) -> Iterator[Field]:
    hints = typing.get_type_hints(kind, include_extras=True)
    for item in fields(kind):
        if not is_dataclass(hints[item.name]):
            yield build_field(f"{section}.{item.name}", hints[item.name], item.default)


def build_field(key: str, hint: object, default: object) -> Field:
    optional = typing.get_origin(hint) in (typing.Union, types.UnionType)
    if optional:
        hint = next(arg for arg in typing.get_args(hint) if arg is not types.NoneType)
    marks: tuple = ()
    if typing.get_origin(hint) is typing.Annotated:
        hint, *rest = typing.get_args(hint)
        marks = tuple(rest)
    choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
    if typing.get_origin(hint) is tuple:
        kind = "tables" if read_table_type(hint) else "words"
    else:
        kind = "str" if choices else typing.cast(type, hint).__name__
    assert kind in EXPECTED, (key, hint)
    bounds = next((mark for mark in marks if isinstance(mark, Bounds)), Bounds())
    path = next((mark for mark in marks if isinstance(mark, IsPath)), None)
    return Field(key, kind, optional, choices, bounds, path, default, any(isinstance(mark, OneOrMore) for mark in marks))


SECTIONS: dict[str, type] = dict(list_sections(Config, ""))
"""Dotted name → dataclass, outer before inner."""
FIELDS: dict[str, Field] = {field.key: field for section, kind in SECTIONS.items() for field in list_fields(section, kind)}
TABLES: dict[str, type] = dict(list_tables(SECTIONS))
"""Dotted name → dataclass of each table, for the fields that are lists of tables."""
TABLE_SECTIONS: dict[str, type] = {name: kind for table, item in TABLES.items() for name, kind in ((table, item), *list_sections(item, f"{table}."))}
"""The tables and the sections inside them, outer before inner."""
TABLE_FIELDS: dict[str, Field] = {field.key: field for section, kind in TABLE_SECTIONS.items() for field in list_fields(section, kind)}
"""Dotted key, without the number of the table → each setting inside a list of tables."""
