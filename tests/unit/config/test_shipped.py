"""What the shipped configs say of themselves, and copies of them."""

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT

from tunelib.config.load import load_config
from tunelib.config.schema import Config
from tunelib.config.shipped import copy_shipped, list_shipped
from tunelib.config.sizes import SIZES
from tunelib.errors import ConfigError

SHIPPED = list_shipped()
MODELS = ["llama2_7b", "llama2_13b", "llama2_70b", "llama3_8b", "llama3_70b", "llama3_405b", "llama3_2_1b", "llama3_2_3b", "smollm2_1_7b"]


def check(path: Path, *words: str, world_size: int) -> Config:
    config = load_config([str(path), *words], world_size=world_size).config
    return replace(config, job=replace(config.job, config_file=""))


@pytest.mark.parametrize("shipped", SHIPPED, ids=lambda shipped: shipped.name)
def test_config_passes_the_check_on_its_machine(shipped, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows divide by the data ranks, as the file is and with the size that its weights have in place of them."""
    monkeypatch.chdir(ROOT)
    assert shipped.description
    check(shipped.path, world_size=shipped.num_processes)
    if "--model.flavor" in shipped.words:
        flavor = shipped.words[shipped.words.index("--model.flavor") + 1]
        config = check(shipped.path, "--model.flavor", flavor, "--model.tokenizer_path", "any", world_size=shipped.num_processes)
        assert config.training.seq_len <= SIZES[flavor]["max_position_embeddings"]


def test_every_model_has_all_three_ways() -> None:
    names = {shipped.name for shipped in SHIPPED}
    assert {f"{model}_{way}" for model in MODELS for way in ("full", "lora", "qlora")} <= names
    assert {"smollm2_135m_full", "smollm2_135m_lora", "smollm2_360m_full", "smollm2_360m_lora", "llama2_7b_lora_distributed"} <= names
    processes = {shipped.name: shipped.num_processes for shipped in SHIPPED}
    assert [processes[f"llama2_7b_{way}"] for way in ("full", "lora", "lora_distributed")] == [2, 1, 2]


def test_copy_means_what_the_original_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    paths = copy_shipped("llama3_405b_qlora", tmp_path / "a/b")
    assert [path.name for path in paths][:2] == ["llama3_405b_qlora.toml", "llama3_70b_qlora.toml"]
    assert len(paths) >= 4
    assert check(paths[0], world_size=8) == check(ROOT / "train_configs/llama3_405b_qlora.toml", world_size=8)
    assert copy_shipped("llama3_405b_qlora.toml", tmp_path / "a/b") == paths  # the same files again are no conflict


def test_copy_replaces_nothing(tmp_path: Path) -> None:
    (tmp_path / "llama2_7b_full.toml").write_text("# mine\n")
    with pytest.raises(ConfigError, match=r"llama2_7b_full\.toml exists, and is another file"):
        copy_shipped("llama2_7b_lora", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["llama2_7b_full.toml"]


def test_wrong_name_is_guessed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config llama2_7b_laura is shipped; did you mean llama2_7b_lora\?"):
        copy_shipped("llama2_7b_laura", tmp_path)


def test_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/a: no folder can be made there: Not a directory; give another one"):
        copy_shipped("debug_model", tmp_path / "file/a")


def test_config_without_its_line_is_said(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text("[training]\nsteps = 1\n")
    with pytest.raises(ConfigError, match="has no line '# For MACHINE"):
        list_shipped(tmp_path)
