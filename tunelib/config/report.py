"""Settings for people: the table that ``python -m tunelib.config`` prints, and the page ``docs/config.md``."""

from tunelib.config.effect import has_effect
from tunelib.config.fields import AUTO, FIELDS, SECTIONS, TABLE_FIELDS, TABLE_SECTIONS, TABLES, is_unset, read_meanings, show_type, show_value
from tunelib.config.load import LoadedConfig, read_value

DOCS_HEADER = """# Settings

<!-- Written by `python -m tunelib.config --docs` from tunelib/config/schema.py. -->

Every key may stand in the TOML file under its section, or on the command line as `--section.key value`. An unknown key, a wrong type
or a key without effect stops the run; `python -m tunelib.config FILE [--section.key value …]` checks a file and shows where each value
comes from. `base = "other.toml"` above the sections takes another file's settings as the start, relative to the file that names it;
tables are merged, lists replaced. The order is default < base < file < command line.
"""


def show_settings(loaded: LoadedConfig) -> str:
    """One line per key: the value, and where it came from."""
    rows = {key: show_setting(loaded, key) for key in FIELDS}
    width = min(max(len(value) for value, _ in rows.values()), 48)
    names = max(len(field.name) for field in FIELDS.values())
    lines = []
    for section in SECTIONS:
        lines += ["", f"[{section}]"]
        lines += [f"{field.name:{names}} = {rows[key][0]:{width}}  {rows[key][1]}" for key, field in FIELDS.items() if field.section == section]
    return "\n".join(lines[1:])


def show_setting(loaded: LoadedConfig, key: str) -> tuple[str, str]:
    value = read_value(loaded.config, key)
    origin = str(loaded.origins[key]) + ("" if is_unset(value) or has_effect(key, loaded.settings) else ", without effect here")
    return "unset" if is_unset(value) else show_value(value, limit=1000), origin


def render_docs() -> str:
    """The text of docs/config.md."""
    meanings = read_meanings()
    text = DOCS_HEADER
    for section in (*SECTIONS, *TABLE_SECTIONS):
        title = f"[[{section}]]" if section in TABLES else f"[{section}]"
        text += f"\n## {title}\n\n{meanings[section]}\n\n| key | type | default | meaning |\n|---|---|---|---|\n"
        for key, field in (FIELDS | TABLE_FIELDS).items():
            if field.section == section:
                unset = f'`"{AUTO}"`' if field.kind == "bool" else ""
                default = unset if is_unset(field.default) else f"`{show_value(field.default)}`"
                cells = [f"`{field.name}`", show_type(field), default, meanings[key]]
                text += "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"
    return text
