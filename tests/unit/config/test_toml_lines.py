"""The line scanner against tomllib, which knows the keys but not where they stand."""

import sys
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunelib.config.toml_lines import Path, find_lines

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

EXAMPLE = '''\
a = 1  # b = 2
"b.c" = """
[x]
q = 2 \\" """"
d.'e f'.g = {h = 1, i.j = [ {k = 1}, # c = 3
  {k = 2, l = '#'}]}
[t] # ]
u = 'a = ["'
[[l]]
x = 1
[l.m]
y = 2
[[l]]
x = 3
[[l.n]]
z = [1,
  2]
["\\u00e9\\t"]
w = 1979-05-27T07:32:00Z
'''


def test_example_has_the_lines_that_a_reader_counts() -> None:
    lines = find_lines(EXAMPLE).lines
    expected = {("a",): 1, ("b.c",): 2, ("d", "e f", "g", "h"): 5, ("d", "e f", "g", "i", "j", 1, "k"): 6, ("t",): 7, ("t", "u"): 8}
    expected |= {("l", 0, "m", "y"): 12, ("l", 1, "x"): 14, ("l", 1, "n", 0, "z"): 16, ("é\t", "w"): 19}
    assert {path: lines.get(path) for path in expected} == expected
    assert all(path in lines for path in list_paths(tomllib.loads(EXAMPLE)))


@pytest.mark.parametrize(
    ("text", "repeated"),
    [
        ("a = 1\na = 2", [(("a",), 2)]),
        ("[t]\na = 1\n[t]", [(("t",), 3)]),
        ("t = {a = 1, a = 2}", [(("t", "a"), 1)]),
        ("[t.u]\n[t]\na = 1\n[[v]]\nb = 1\n[[v]]\nb = 2", []),
    ],
)
def test_keys_given_twice_are_found(text: str, repeated: list[tuple[Path, int]]) -> None:
    assert find_lines(text).repeated == repeated


def test_windows_line_ends_count_once() -> None:
    assert find_lines("a = 1\r\nb = 2\r\n").lines == {("a",): 1, ("b",): 2}


NAMES = st.one_of(
    st.text("abc1-_", min_size=1, max_size=3),
    st.text("ab.\"'#= \t\\[é", max_size=4),
)
PLAIN_VALUES = st.one_of(
    st.integers(-5, 5).map(str),
    st.sampled_from(
        ["true", "1e5", "nan", "0x1F", "1979-05-27 07:32:00", '""', "''", '""""""', "'''''' # [c]", '"""\na = 1\\\n"""', "'''\n[x]\n'''"]
    ),
    st.text("ab\"'#=]}\\\t,é", max_size=6).map(lambda text: quote(text)),
    st.text('ab#=[\n"', max_size=6).map(lambda text: f"'''{text}'''"),
    st.text('ab"\n#=', max_size=6).map(lambda text: '"""' + text.replace('"', '\\"') + '"""'),
)


def quote(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\t", "\\t")
    return f'"{escaped}"'


@st.composite
def toml_values(draw: st.DrawFn, depth: int = 2) -> str:
    kind = draw(st.sampled_from(["plain", "plain", "list", "table"])) if depth else "plain"
    if kind == "list":
        items = draw(st.lists(toml_values(depth=depth - 1), max_size=3))
        break_line = draw(st.sampled_from([" ", "\n", " # ] , [\n"]))
        return "[" + break_line + f",{break_line}".join(items) + break_line + "]"
    if kind == "table":
        keys = draw(st.lists(toml_keys(), max_size=3))
        return "{" + ", ".join(f"{key} = {draw(toml_values(depth=0))}" for key in keys) + "}"
    return draw(PLAIN_VALUES)


@st.composite
def toml_keys(draw: st.DrawFn) -> str:
    names = draw(st.lists(NAMES, min_size=1, max_size=3))
    return draw(st.sampled_from([".", " . "])).join(name if name and set(name) <= set("abc1-_") else quote(name) for name in names)


@st.composite
def toml_texts(draw: st.DrawFn) -> str:
    lines = []
    for _ in range(draw(st.integers(1, 8))):
        kind = draw(st.sampled_from(["pair", "pair", "pair", "table", "list", "comment"]))
        if kind == "pair":
            lines.append(f"{draw(toml_keys())} = {draw(toml_values())}")
        else:
            lines.append({"table": "[{}]", "list": "[[ {} ]]", "comment": "# {} ="}[kind].format(draw(toml_keys())))
    return draw(st.sampled_from(["\n", "\n\n", " # c\n", "\r\n"])).join(lines) + "\n"


@settings(max_examples=600, deadline=None)
@given(toml_texts())
def test_every_key_of_tomllib_has_a_line(text: str) -> None:
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        find_lines(text)  # must end without an exception
        return
    found = find_lines(text)
    assert found.repeated == []
    for path in list_paths(data):
        line = text.replace("\r\n", "\n").split("\n")[found.lines[path] - 1]
        name = str(path[-1])
        assert isinstance(path[-1], int) or name in line or quote(name)[1:-1] in line


@settings(max_examples=300, deadline=None)
@given(st.text("ab=.[]{}\"'#,\n\\ 1", max_size=30))
def test_any_text_is_survived(text: str) -> None:
    find_lines(text)


def list_paths(value: object, path: Path = ()) -> Iterator[Path]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield (*path, name)
            yield from list_paths(inner, (*path, name))
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from list_paths(inner, (*path, place))
