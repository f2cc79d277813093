"""A folder exists once it is committed, and then says of every file whether it is still as it was."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tunelib import files
from tunelib.errors import CheckpointError, ConfigError


def commit(final: Path, contents: dict[str, str], **facts: Any) -> None:
    staging = files.make_staging(final)
    for name, content in contents.items():
        (staging / name).parent.mkdir(parents=True, exist_ok=True)
        files.write_file(staging / name, content)
    files.commit_folder(staging, final, files.describe_files(staging, files.list_files(staging)), **facts)


def damage_of(folder: Path) -> list[str]:
    manifest = files.read_manifest(folder)
    return files.find_damage(folder, manifest["files"], sorted(manifest["files"]))


def write_manifest(folder: Path, content: Any) -> None:
    folder.mkdir(exist_ok=True)
    (folder / files.MANIFEST).write_text(content if isinstance(content, str) else json.dumps(content))


def test_committed_folder_holds_its_files_and_facts_and_no_staging(tmp_path: Path) -> None:
    commit(tmp_path / "step-1", {"a": "one", "deep/er/b": "two"}, kind="full", step=1)
    manifest = files.read_manifest(tmp_path / "step-1")
    assert (manifest["kind"], manifest["step"]) == ("full", 1)
    assert manifest["files"].keys() == {"a", "deep/er/b"}
    assert manifest["files"]["a"] == {"size": 3, "crc32": files.crc32_of(tmp_path / "step-1/a")}
    assert damage_of(tmp_path / "step-1") == []
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_folder_has_no_final_name_before_it_is_committed(tmp_path: Path) -> None:
    staging = files.make_staging(tmp_path / "step-1")
    (staging / "a").write_text("half")
    assert not (tmp_path / "step-1").exists()
    assert staging.name.startswith(".")


def test_new_staging_folder_is_empty_whatever_was_left_there(tmp_path: Path) -> None:
    (files.make_staging(tmp_path / "step-1") / "half").write_text("x")
    assert list(files.make_staging(tmp_path / "step-1").iterdir()) == []


@pytest.mark.parametrize("exchange_works", [True, False])
def test_commit_replaces_an_existing_folder_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange_works: bool) -> None:
    if not exchange_works:
        monkeypatch.setattr(files.sys, "platform", "elsewhere")
    commit(tmp_path / "export", {"old": "1", "both": "old"})
    commit(tmp_path / "export", {"new": "2", "both": "new"})
    assert files.list_files(tmp_path / "export") == ["both", "new"]
    assert (tmp_path / "export/both").read_text() == "new"
    assert damage_of(tmp_path / "export") == []
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_replaced_file_is_the_old_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.toml"
    files.replace_file(path, "old")
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("the power went")))
    with pytest.raises(OSError, match="the power went"):
        files.replace_file(path, "new, and longer")
    assert path.read_text() == "old"
    monkeypatch.undo()
    files.replace_file(path, "new")
    assert path.read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.toml"]


def test_every_damaged_file_is_named_with_its_damage(tmp_path: Path) -> None:
    folder = tmp_path / "step-3"
    commit(folder, dict.fromkeys(("good", "truncated", "longer", "flipped", "missing", "folder"), "0123456789"))
    (folder / "truncated").write_text("01234")
    (folder / "longer").write_text("0123456789+")
    (folder / "flipped").write_text("012345678 ")
    (folder / "missing").unlink()
    (folder / "folder").unlink()
    (folder / "folder").mkdir()
    problems = {name: [problem for problem in damage_of(folder) if str(folder / name) in problem] for name in files.read_manifest(folder)["files"]}
    assert problems.pop("good") == []
    assert all(len(found) == 1 for found in problems.values()), problems
    assert "5 bytes instead of 10" in problems["truncated"][0]
    assert "11 bytes instead of 10" in problems["longer"][0]
    assert "checksum" in problems["flipped"][0]
    assert "is missing" in problems["missing"][0]


def test_zeroed_page_is_found_at_the_same_size(tmp_path: Path) -> None:
    commit(tmp_path / "step-1", {"shard": "x" * 9000})
    with open(tmp_path / "step-1/shard", "r+b") as file:
        file.seek(4096)
        file.write(bytes(4096))
    assert len(damage_of(tmp_path / "step-1")) == 1


def test_only_the_named_files_are_looked_at(tmp_path: Path) -> None:
    commit(tmp_path / "step-1", {"a": "1", "b": "2"})
    (tmp_path / "step-1/b").unlink()
    described = files.read_manifest(tmp_path / "step-1")["files"]
    assert files.find_damage(tmp_path / "step-1", described, ["a"]) == []
    assert len(files.find_damage(tmp_path / "step-1", described, ["a", "b"])) == 1


def test_folder_without_manifest_was_never_finished(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="never finished"):
        files.read_manifest(tmp_path)


GOOD = {"size": 1, "crc32": 1}
HOSTILE = {
    "empty": "",
    "not JSON": "{",
    "not UTF-8": b"\xff\xfe".decode("latin-1"),
    "deep": "[" * 100_000,
    "list": [],
    "number": 3,
    "no files": {"format": 1},
    "files a list": {"format": 1, "files": ["a"]},
    "other format": {"format": 2, "files": {}},
    "parent": {"format": 1, "files": {"../a": GOOD}},
    "deep parent": {"format": 1, "files": {"a/../../b": GOOD}},
    "absolute": {"format": 1, "files": {"/etc/passwd": GOOD}},
    "entry a number": {"format": 1, "files": {"a": 3}},
    "no checksum": {"format": 1, "files": {"a": {"size": 1}}},
    "size a text": {"format": 1, "files": {"a": {"size": "1", "crc32": 1}}},
    "crc32 null": {"format": 1, "files": {"a": {"size": 1, "crc32": None}}},
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_manifest_is_refused_by_name(tmp_path: Path, content: Any) -> None:
    write_manifest(tmp_path / "step-1", content)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        files.read_manifest(tmp_path / "step-1")


@pytest.mark.parametrize(
    ("said", "instead"), [('"step": 6', '"step": 7'), ("true", "null"), ('"full"', '"seed"'), ('"a"', '"b"'), ('"format": 2', '"format": 3')]
)
def test_manifest_whose_words_were_changed_is_refused(tmp_path: Path, said: str, instead: str) -> None:
    commit(tmp_path / "step-6", {"a": "1"}, kind="full", step=6, finite=True)
    content = (tmp_path / "step-6" / files.MANIFEST).read_text()
    assert content.count(said) == 1
    write_manifest(tmp_path / "step-6", content.replace(said, instead))
    with pytest.raises(CheckpointError, match=r"manifest\.json is (damaged|not a manifest)"):
        files.read_manifest(tmp_path / "step-6")


def test_manifest_without_a_checksum_of_its_own_is_one_of_the_earlier_format(tmp_path: Path) -> None:
    write_manifest(tmp_path / "old", {"format": files.OLDER_FORMAT, "files": {"a": GOOD}})
    assert files.read_manifest(tmp_path / "old")["files"] == {"a": GOOD}
    write_manifest(tmp_path / "new", {"format": files.MANIFEST_FORMAT, "files": {"a": GOOD}})
    with pytest.raises(CheckpointError, match="its checksum is not the one at its end"):
        files.read_manifest(tmp_path / "new")


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "", "."], ids=["nul", "too long", "empty", "dot"])
def test_name_that_is_no_file_is_damage_or_refused(tmp_path: Path, name: str) -> None:
    write_manifest(tmp_path / "step-1", {"format": 1, "files": {name: GOOD}})
    try:
        problems = damage_of(tmp_path / "step-1")
    except CheckpointError as error:
        problems = [str(error)]
    assert len(problems) == 1


def test_folder_is_set_aside_under_the_first_free_number(tmp_path: Path) -> None:
    new_names = []
    for content in "abc":
        (tmp_path / "step-5").mkdir()
        (tmp_path / "step-5/file").write_text(content)
        new_names.append(files.set_aside(tmp_path / "step-5", "damaged").name)
    assert new_names == ["step-5.damaged-0", "step-5.damaged-1", "step-5.damaged-2"]
    assert [(tmp_path / name / "file").read_text() for name in new_names] == ["a", "b", "c"]


def test_interrupted_removal_leaves_nothing_under_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(tmp_path / "step-1", {"a": "1"})
    monkeypatch.setattr(files.shutil, "rmtree", lambda _: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        files.remove_folder(tmp_path / "step-1")
    assert not (tmp_path / "step-1").exists()
    monkeypatch.undo()
    commit(tmp_path / "step-1", {"a": "2"})
    files.remove_folder(tmp_path / "step-1")
    assert list(tmp_path.iterdir()) == []


def test_removing_what_is_not_there_is_no_error(tmp_path: Path) -> None:
    files.remove_folder(tmp_path / "step-1")


def test_debris_goes_and_everything_else_stays(tmp_path: Path) -> None:
    for name in (".step-1.tunelib-staging", ".step-2.tunelib-removed", ".mine", ".mine.old", ".mine.staging", "step-3", "step-4.damaged-0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    (tmp_path / ".note.tunelib-staging").write_text("a file, not a folder")
    files.remove_debris(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        ".mine",
        ".mine.old",
        ".mine.staging",
        "step-3",
        "step-4.damaged-0",
        ".note.tunelib-staging",
    }


def test_folder_has_one_writer_at_a_time(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with files.lock_folder(run), pytest.raises(ConfigError, match="another run is writing"), files.lock_folder(run):
        pytest.fail("two writers")
    with files.lock_folder(tmp_path / "run"):
        pass


def test_lock_goes_with_its_process(tmp_path: Path) -> None:
    program = f"import os, pathlib, tunelib.files as f; lock = f.lock_folder(pathlib.Path({str(tmp_path)!r})); lock.__enter__(); os._exit(7)"
    assert subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], check=False).returncode == 7
    assert (tmp_path / ".lock").exists()
    with files.lock_folder(tmp_path):
        pass


def test_pipe_in_the_place_of_a_file_is_damage_and_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a")
    assert files.find_damage(tmp_path, {"a": {"size": 0, "crc32": 0}}, ["a"]) == [f"{tmp_path / 'a'} is not a file"]
