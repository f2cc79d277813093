"""The house of DESIGN.md §2: a room imports only from the floors below it, and nothing imports the roof."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "tunelib"
ROOF = ("train.py", "scripts", "benchmarks")

FLOORS: dict[str, int] = {
    **dict.fromkeys(("errors", "files", "config"), 0),
    **dict.fromkeys(("batch", "data", "model", "adapters", "quantize", "schedule", "flops"), 1),
    **dict.fromkeys(("optimizer", "parallel"), 2),
    **dict.fromkeys(("checkpoint", "formats", "observe", "infer"), 3),
}
"""Room → its floor."""
NEIGHBOURS = {
    "files": {"errors"},
    "config": {"errors"},
    "data": {"batch"},
    "model": {"batch"},
    **{room: {"model"} for room in ("quantize", "flops")},
    "adapters": {"model", "quantize"},
    "parallel": {"optimizer"},
}
"""Rooms of the same floor that a room may see."""
SINGLE_IMPORTS = {("formats", "tunelib.checkpoint.dcp_reader")}
"""(room, module): the one safe reader of DCP folders."""
SECTIONS_OF = {
    "data": {"Dataset", "Source", "MixedSource", "Columns", "FORMAT_COLUMNS"},
    "model": {"Model", "RopeScaling"},
    "adapters": {"Lora"},
    "schedule": {"LrScheduler"},
}
"""What a room of floor 1 may take from the config: its own section."""


@dataclass(frozen=True)
class Import:
    """One import statement, as ``module`` and the ``names`` taken from it."""

    file: Path
    line: int
    module: str
    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line} imports {', '.join(self.names)} of {self.module}"

    @property
    def room(self) -> str:
        """The room of tunelib that it enters, or ""."""
        parts = self.module.split(".")
        if parts[0] != "tunelib":
            return ""
        return parts[1] if len(parts) > 1 else self.names[0]


def find_imports(file: Path) -> Iterator[Import]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(file, node.lineno, alias.name, ())
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: imports are written in full"
            yield Import(file, node.lineno, node.module or "", tuple(alias.name for alias in node.names))


def python_files(*places: str) -> list[Path]:
    found = [path for place in places for path in ([ROOT / place] if place.endswith(".py") else sorted((ROOT / place).rglob("*.py")))]
    return [path for path in found if path.exists()]


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


LIBRARY = [file for file in python_files("tunelib") if file != PACKAGE / "__init__.py"]
IMPORTS = [found for file in LIBRARY for found in find_imports(file)]


def test_every_room_is_in_the_plan() -> None:
    assert {room_of(file) for file in LIBRARY} <= FLOORS.keys()


def test_rooms_import_downwards_only() -> None:
    def is_allowed(found: Import) -> bool:
        here, there = room_of(found.file), found.room
        if not there or here == there or FLOORS[there] < FLOORS[here]:
            return not (here == "parallel" and there == "data")
        return there in NEIGHBOURS.get(here, ()) or (here, found.module) in SINGLE_IMPORTS

    assert [str(found) for found in IMPORTS if not is_allowed(found)] == []


def test_rooms_of_the_first_floor_see_their_own_config_section_only() -> None:
    wrong = [
        str(found)
        for found in IMPORTS
        if found.room == "config"
        and FLOORS[room_of(found.file)] == 1
        and not (found.module == "tunelib.config.schema" and set(found.names) <= SECTIONS_OF.get(room_of(found.file), set()))
    ]
    assert wrong == []


def test_whole_config_is_handed_to_no_component() -> None:
    takers = {room_of(found.file) for found in IMPORTS if found.module.startswith("tunelib.config") and {"Config", "LoadedConfig"} & set(found.names)}
    assert takers <= {"config", "observe"}  # the opening lines tell of the whole run


def test_ground_floor_does_not_know_torch() -> None:
    heavy = ("torch", "numpy", "transformers", "tokenizers", "safetensors", "huggingface_hub", "jinja2", "datasets")
    ground = [found for found in IMPORTS if FLOORS[room_of(found.file)] == 0]
    assert [str(found) for found in ground if found.module.split(".")[0] in heavy] == []
    outside = {"tyro", "tomli"}
    assert [str(found) for found in ground if found.module.split(".")[0] in outside and room_of(found.file) != "config"] == []


def test_importing_the_ground_floor_does_not_import_torch() -> None:
    program = "import sys, tunelib.errors, tunelib.files, tunelib.config; sys.exit(1 if {'torch', 'numpy'} & sys.modules.keys() else 0)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


def test_first_floor_does_not_know_other_processes() -> None:
    assert [str(found) for found in IMPORTS if FLOORS[room_of(found.file)] == 1 and found.module.startswith("torch.distributed")] == []
    used = [
        node for file in LIBRARY if FLOORS[room_of(file)] == 1 for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute)
    ]
    assert [ast.unparse(node) for node in used if ast.unparse(node).startswith(("torch.distributed", "dist."))] == []


def test_roof_is_imported_by_no_one() -> None:
    roof = {path.removesuffix(".py") for path in ROOF}
    assert [str(found) for file in [*LIBRARY, *python_files(*ROOF)] for found in find_imports(file) if found.module.split(".")[0] in roof] == []


def test_modules_do_not_import_each_other_in_circles() -> None:
    modules = {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in python_files("tunelib")}
    edges: dict[str, set[str]] = {}
    for name, file in modules.items():
        targets = {found.module for found in find_imports(file)}
        targets |= {f"{found.module}.{part}" for found in find_imports(file) for part in found.names}
        edges[name] = {target for target in targets & modules.keys() if target != name and not name.startswith(f"{target}.")}
    done: set[str] = set()

    def walk(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a circle: {' → '.join((*path[path.index(name) :], name))}"
        if name not in done:
            for target in sorted(edges[name]):
                walk(target, (*path, name))
            done.add(name)

    for name in sorted(modules):
        walk(name, ())


@pytest.mark.parametrize("name", ["utils", "util", "helpers", "misc", "common", "components"])
def test_there_is_no_drawer(name: str) -> None:
    assert [str(path) for path in PACKAGE.rglob("*") if path.stem == name and "__pycache__" not in path.parts] == []


def test_every_room_has_its_tests_and_every_test_its_room() -> None:
    tests = ROOT / "tests/unit"
    rooms = {room_of(file) for file in LIBRARY}
    folders = {path.name for path in tests.iterdir() if path.is_dir() and any(path.glob("test_*.py"))}
    files = {path.stem.removeprefix("test_") for path in tests.glob("test_*.py")}
    assert folders | files == rooms
    assert folders == {room for room in rooms if (PACKAGE / room).is_dir()}


def test_unit_tests_are_named_after_what_they_test() -> None:
    wrong = []
    for file in (ROOT / "tests/unit").glob("*/test_*.py"):
        room = PACKAGE / file.parent.name
        subjects = (
            {path.stem.removeprefix("_") for path in room.rglob("*.py")} | {path.name for path in room.iterdir() if path.is_dir()} | {room.name}
        )
        if not any(file.stem.removeprefix("test_").startswith(subject) for subject in subjects):
            wrong.append(str(file.relative_to(ROOT)))
    assert wrong == []


def test_no_two_tests_have_the_same_name() -> None:
    """pytest imports a test by the name of its file alone."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted({name for name in names if names.count(name) > 1}) == []


def test_train_py_can_be_read_in_one_sitting() -> None:
    assert len((ROOT / "train.py").read_text().splitlines()) <= 400
