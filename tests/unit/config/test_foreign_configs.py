"""Which trainer a file is of, and what is said where it is none's."""

from pathlib import Path

import pytest

from tunelib.config.foreign import import_config
from tunelib.config.load import load_config
from tunelib.errors import ConfigError

BAD = {
    "nothing.toml": (None, "there is no file {file}; give a TOML file of torchtitan's (up to 0.2.2), or a YAML file of torchtune's"),
    "config_registry.py": ("x = 1", "{file}: torchtitan's configs after 0.2.2 are Python programs, which are not read here; write its values"),
    "notes.txt": ("x", "{file}: is neither .toml nor .yaml; give a TOML file"),
    "ours.toml": (
        "[dataset]\npath = 'x'\n",
        "{file}: is a config of tunelib already ('dataset.path'); check it with: python -m tunelib.config {file}",
    ),
    "short.toml": ("[training]\nsteps = 3\n", "{file}: is a config of tunelib already; check it with"),
    "poetry.toml": ("[tool.x]\na = 1\n", "{file}: is no config of torchtitan's, none of whose keys it has; give one of its TOML files"),
    "broken.toml": ("[model\n", "{file}: not valid TOML: "),
    "list.yaml": ("- 1\n- 2\n", "{file}: holds no keys; give a recipe config of torchtune's"),
    "empty.yaml": ("", "{file}: holds no keys"),
    "broken.yaml": ("a: [1\n", "{file}: not valid YAML: "),
    "compose.yaml": ("services: {a: {image: x}}\n", "{file}: is no recipe of torchtune: it lacks model._component_, optimizer._component_, dataset."),
    "object.yaml": ("a: !!python/object/apply:os.getcwd []\n", "{file}: not valid YAML: could not determine a constructor"),
}


@pytest.mark.parametrize("name", BAD)
def test_file_of_nobody_is_told_what_to_do(name: str, tmp_path: Path) -> None:
    text, message = BAD[name]
    file = tmp_path / name
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        import_config(str(file))
    assert str(caught.value).startswith(message.format(file=file))
    assert "\n" not in str(caught.value)


def test_missing_file_is_guessed(tmp_path: Path) -> None:
    (tmp_path / "llama3_8b.toml").write_text("")
    with pytest.raises(ConfigError, match=r"there is no file .*llama3_8.toml; did you mean .*llama3_8b\.toml\?"):
        import_config(str(tmp_path / "llama3_8.toml"))


@pytest.mark.parametrize(
    ("word", "message"),
    [("batch_size", "expected key=value"), ("a..b=1", "expected key=value"), ("~x.y", "the file has no such key"), ("a=[1", "not valid YAML")],
)
def test_wrong_word_is_said(word: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: 1\n")
    with pytest.raises(ConfigError, match=f"command line: .*{message}"):
        import_config(str(tmp_path / "a.yaml"), [word])


def test_words_beside_a_toml_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('[model]\nname = "llama3"\n')
    with pytest.raises(ConfigError, match=r"command line: a=1: key=value is for torchtune's files"):
        import_config(str(tmp_path / "a.toml"), ["a=1"])


def test_import_that_does_not_pass_says_what_the_check_says(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('[model]\nname = "llama3"\nflavor = "8B"\n[training]\nseq_len = 100000\n')
    problems = import_config(str(tmp_path / "a.toml"), name="mine.toml").problems
    assert len(problems) == 1
    assert problems[0].startswith("mine.toml:")
    assert "training.seq_len = 100000: the model takes at most 8192 tokens" in problems[0]


def test_comment_cannot_leave_its_line(tmp_path: Path) -> None:
    """A value with line breaks, a quote and a control character is text, and adds no key."""
    value = 'x\\n[lora]\\nenable = true\\u0007 \\"'
    (tmp_path / "a.toml").write_text(f'[job]\ndescription = "{value}"\n[model]\nname = "llama3"\n[odd]\nkey = "{value}"\n')
    imported = import_config(str(tmp_path / "a.toml"))
    assert imported.problems == ()
    (tmp_path / "ours.toml").write_text(imported.text)
    config = load_config([str(tmp_path / "ours.toml")]).config
    assert config.job.description == 'x\n[lora]\nenable = true\a "'
    assert not config.lora.enable
