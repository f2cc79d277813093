"""What a right config gives: layers, forms of the command line, notices, the resolved TOML."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from config_cases import GOOD
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunelib.config import LoadedConfig, load_config, load_or_exit, resolve_dump_folder, resolve_local_batch_size, resolve_shard_degree, resolved_toml
from tunelib.config.effect import has_effect, is_given
from tunelib.config.fields import FIELDS, TABLES, Field, is_unset, show_value
from tunelib.config.load import read_value
from tunelib.config.schema import Dataset, Parallelism, Training
from tunelib.errors import ConfigError

SEED_COMMAND = (
    "--checkpoint.enable_checkpoint --checkpoint.create_seed_checkpoint --training.data_parallel_replicate_degree 1"
    " --training.data_parallel_shard_degree 1 --training.tensor_parallel_degree 1 --experimental.pipeline_parallel_degree 1"
    " --experimental.context_parallel_degree 1"
)
"""The words of torchtitan's checkpoint page."""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(text: str = GOOD, *words: str, world_size: int = 1, **bases: str) -> LoadedConfig:
    """Loads run.toml with this text; ``base="…"`` writes base.toml beside it."""
    Path("run.toml").write_text(text)
    for name, base in bases.items():
        Path(f"{name}.toml").write_text(base)
    return load_config(["run.toml", *words], world_size=world_size)


def test_layers_win_in_order_and_origins_say_so() -> None:
    base = "[training]\nsteps = 1\nseq_len = 16\nseed = 3\n[validation]\nenable = true\nfraction = 0.1\nprompts = ['a', 'b']\n"
    text = 'base = "base.toml"\n' + GOOD + "seq_len = 32\n[validation]\nprompts = ['c']\n"
    loaded = load(text, "--training.steps", "99", base=base)
    training = loaded.config.training
    assert (training.steps, training.seq_len, training.seed, training.max_norm) == (99, 32, 3, 1.0)
    assert loaded.config.validation.prompts == ("c",)
    places = {key: str(loaded.origins[key]) for key in ("training.steps", "training.seq_len", "training.seed", "training.max_norm")}
    assert list(places.values()) == ["command line", "run.toml:11", "base.toml:4", "default"]
    assert loaded.origins.keys() == FIELDS.keys()
    assert loaded.notices == []


def test_base_is_relative_to_the_file_that_names_it() -> None:
    Path("configs/shared").mkdir(parents=True)
    Path("configs/shared/root.toml").write_text(GOOD)
    Path("configs/shared/middle.toml").write_text('base = "root.toml"\n[training]\nseed = 1\n')
    Path("configs/leaf.toml").write_text('base = "shared/middle.toml"\n[training]\nseq_len = 8\n')
    loaded = load_config(["--job.config_file", "configs/leaf.toml"])
    assert (loaded.config.training.steps, loaded.config.training.seed, loaded.config.training.seq_len) == (10, 1, 8)
    assert str(loaded.origins["training.steps"]) == "configs/shared/root.toml:9"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--training.deterministic"], True),
        (["--training.deterministic=true"], True),
        (["--training.deterministic", "True"], True),
        (["--training.deterministic", "false"], False),
        (["--training.deterministic=False"], False),
        (["--training.no-deterministic"], False),
        (["--training.no_deterministic"], False),
    ],
)
def test_forms_of_a_boolean(words: list[str], expected: bool) -> None:
    loaded = load(GOOD.replace("steps = 10", f"steps = 10\ndeterministic = {show_value(not expected)}"), *words)
    assert loaded.config.training.deterministic is expected


def test_forms_of_values() -> None:
    words = ["--job.description=a = b --c", "--training.local_batch_size", "-1", "--optimizer.lr", "1", "--optimizer.eps=1e-9"]
    words += ["--training.seed", "1_000", "--model.tie_word_embeddings", "false", "--model.rope_theta", "500000"]
    words += ["--validation.enable", "--validation.fraction", ".5", "--validation.prompts", "two words", "x=y", "--validation.prompts=--flag like"]
    config = load(GOOD, *words).config
    assert config.job.description == "a = b --c"
    assert config.training.local_batch_size == -1
    assert (config.optimizer.lr, type(config.optimizer.lr), config.optimizer.eps) == (1.0, float, 1e-9)
    assert config.training.seed == 1000
    assert (config.model.tie_word_embeddings, config.model.rope_theta) == (False, 500000.0)
    assert config.validation.prompts == ("two words", "x=y", "--flag like")


def test_empty_text_on_the_command_line_unsets() -> None:
    assert load(GOOD + '[job]\ndescription = "x"\n', "--job.description=").config.job.description == ""


def test_seed_command_of_torchtitan_runs_as_it_stands() -> None:
    loaded = load(GOOD, *SEED_COMMAND.split())
    assert loaded.config.checkpoint.create_seed_checkpoint
    assert loaded.config.parallelism.data_parallel_shard_degree == 1
    assert len(loaded.notices) == 5
    assert all("older spelling" in notice for notice in loaded.notices)


def test_negated_flag_in_an_older_spelling_gets_its_notice() -> None:
    loaded = load(GOOD, "--checkpoint.no-enable")
    assert loaded.notices == ["command line: --checkpoint.no-enable is an older spelling of --checkpoint.enable_checkpoint, which was set"]


def test_seed_checkpoint_needs_no_data_length_or_tokenizer() -> None:
    assert load('[model]\nflavor = "smollm2-135m"\n', *SEED_COMMAND.split()).config.training.steps is None


def test_dotted_keys_inline_tables_and_quoted_keys_are_the_same_setting() -> None:
    loaded = load(GOOD + 'seed = 0\n[dataset.columns]\ntext = "body"\n')
    inline = load('training = {"steps" = 10, seed = 0}\ndataset = {path = "data.jsonl", columns.text = "body"}\n' + GOOD.partition("[dataset]")[0])
    assert loaded.config == inline.config
    assert str(inline.origins["dataset.columns.text"]) == "run.toml:2"


def test_byte_order_mark_is_no_problem() -> None:
    assert load("\ufeff" + GOOD).config.training.steps == 10


VALIDATION = "[validation]\nenable = true\nfraction = 0.1\nfreq = 5\nprompts = ['a']\nmax_new_tokens = 3\n"


def test_higher_layer_switches_a_section_off_with_one_notice() -> None:
    loaded = load(GOOD + VALIDATION, "--validation.no-enable")
    assert loaded.notices == [
        "command line: --validation.no-enable: turns off validation.freq (run.toml:13), validation.fraction (run.toml:12),"
        " validation.prompts (run.toml:14), validation.max_new_tokens (run.toml:15)"
    ]
    assert (loaded.config.validation.freq, str(loaded.origins["validation.freq"])) == (100, "default")


def test_higher_layer_switches_on_what_a_base_prepared() -> None:
    base = VALIDATION.replace("enable = true", "enable = true\n# prepared")
    loaded = load('base = "base.toml"\n' + GOOD + "[validation]\nenable = false\n", "--validation.enable", base=base)
    assert loaded.config.validation.freq == 5
    assert loaded.notices == []


def test_excluding_key_of_a_higher_layer_takes_the_place() -> None:
    loaded = load(GOOD, "--training.epochs", "2")
    assert (loaded.config.training.steps, loaded.config.training.epochs) == (None, 2)
    assert loaded.notices == ["command line: --training.epochs 2: takes the place of training.steps (run.toml:9)"]


def test_weights_on_the_command_line_take_the_place_of_the_model() -> None:
    loaded = load(GOOD.replace("tokenizer_path", "hidden_size = 64\ntokenizer_path"), "--checkpoint.initial_load_path", "weights")
    assert (loaded.config.model.flavor, loaded.config.model.hidden_size, loaded.config.model.tokenizer_path) == ("", None, "tok")
    assert loaded.notices == [
        "command line: --checkpoint.initial_load_path weights: takes the place of model.flavor (run.toml:2), model.hidden_size (run.toml:3)"
    ]


def test_whether_paths_exist_is_not_asked() -> None:
    load('[checkpoint]\ninitial_load_path = "no/such"\n[dataset]\npath = "nothing.jsonl"\n[training]\nepochs = 1\n')


def test_world_size_shapes_nothing_but_the_check() -> None:
    assert load(GOOD, world_size=4).config == load(GOOD, world_size=1).config
    with pytest.raises(ConfigError, match="is not a multiple of 3 processes"):
        load(GOOD, world_size=3)


def test_derived_values() -> None:
    assert resolve_dump_folder(load().config) == Path.cwd() / "outputs" / "run"
    assert resolve_dump_folder(load(GOOD, "--job.dump_folder", "here").config) == Path.cwd() / "here"
    assert resolve_shard_degree(Parallelism(), 6) == 6
    assert resolve_shard_degree(Parallelism(tensor_parallel_degree=2), 6) == 3
    assert resolve_shard_degree(Parallelism(data_parallel_shard_degree=2), 6) == 2
    batches = [resolve_local_batch_size(Training(global_batch_size=size), Parallelism(), 2) for size in (2, 8, 24, 14, 22)]
    assert batches == [1, 4, 6, 7, 1]


def test_resolved_toml_holds_no_derived_value_and_absolute_paths() -> None:
    loaded = load(GOOD + '[checkpoint]\nenable_checkpoint = true\n[job]\ndescription = "\\u007f \\" é"\n')
    text = resolved_toml(loaded)
    assert 'description = "\\u007f \\" é"\n' in text
    assert "local_batch_size = -1\n" in text
    assert f"dump_folder = {show_value(str(Path.cwd() / 'outputs/run'), limit=999)}\n" in text
    assert f"tokenizer_path = {show_value(str(Path.cwd() / 'tok'), limit=999)}\n" in text
    assert 'folder = "checkpoint"\n' in text
    for absent in ("config_file", "freq = 100", "max_new_tokens", "momentum", "epochs", "vocab_size", "rope_scaling.factor", "min_lr_factor"):
        assert f"\n{absent}" not in text


def test_chat_template_is_a_path_only_when_it_is_a_file() -> None:
    assert f'chat_template = "{Path.cwd()}/t.jinja"' in resolved_toml(load(GOOD, "--dataset.chat_template", "t.jinja"))
    assert 'chat_template = "chatml"' in resolved_toml(load(GOOD, "--dataset.chat_template", "chatml"))


def values_of(field: Field) -> st.SearchStrategy:
    if field.choices:
        return st.sampled_from(field.choices)
    if field.kind == "bool":
        return st.booleans()
    if field.kind == "words":
        return st.lists(st.text(max_size=5), max_size=3)
    if field.kind == "str":
        return st.text(max_size=8)
    whole = st.integers(min_value=-1, max_value=9)
    return whole if field.kind == "int" else st.one_of(whole, st.floats(0, 1), st.floats(allow_nan=False))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_resolved_toml_passes_and_resolves_to_itself(data: st.DataObject) -> None:
    keys = data.draw(st.lists(st.sampled_from([key for key in FIELDS if key != "job.config_file"]), max_size=12, unique=True))
    chosen = {key: data.draw(values_of(FIELDS[key]), label=key) for key in keys}
    base = {"dataset.path": "d", "checkpoint.initial_load_path": "w"}
    lines = [f"{key} = {show_value(value, limit=999)}\n" for key, value in {**base, **chosen}.items()]
    Path("run.toml").write_text("".join(lines))
    words = data.draw(st.sampled_from(["--training.steps=3", "--training.steps=3 --model.flavor=llama2-7b --validation.no-enable"]))
    try:
        loaded = load_config(["run.toml", *words.split()])
    except ConfigError:
        return
    text = resolved_toml(loaded)
    Path("resolved.toml").write_text(text)
    again = load_config(["resolved.toml"])
    assert resolved_toml(again) == text
    assert again.notices == []
    for key, field in FIELDS.items():
        if not field.path and has_effect(key, loaded.settings):
            assert read_value(again.config, key) == read_value(loaded.config, key)
    assert all(has_effect(key, loaded.settings) for key in loaded.settings if is_given(key, loaded.settings))


def test_problems_leave_through_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.toml").write_text(GOOD.replace("steps = 10", "step = 10\nlr = 1"))
    with pytest.raises(SystemExit) as caught:
        load_or_exit(["run.toml"])
    assert caught.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 2
    with pytest.raises(SystemExit):
        load_or_exit(["run.toml"], speak=False)
    assert capsys.readouterr().err == ""


def test_help_shows_every_key_with_the_value_in_force(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as caught:
        load(GOOD, "--training.seed", "7", "--help")
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"--{key}" in shown for key in FIELDS if key not in TABLES)
    words = " ".join(shown.replace("│", " ").split())
    assert "Optimizer steps of the whole run. Give this or training.epochs. (default: 10)" in words
    assert "follow from it. (default: 7)" in words


def test_empty_values_are_the_unset_ones() -> None:
    assert [is_unset(value) for value in (None, "", (), [], 0, False, 0.0)] == [True, True, True, True, False, False, False]
    assert os.path.isabs(resolve_dump_folder(load().config))


def test_warmup_as_long_as_the_run_is_said_and_not_passed_over() -> None:
    schedule = '[lr_scheduler]\nwarmup_steps = 5\ndecay_type = "cosine"\n'
    assert load(GOOD + schedule).notices == []
    assert load(GOOD + schedule, "--training.steps", "5").notices == [
        "run.toml:11: lr_scheduler.warmup_steps = 5: the run has 5 steps, so the learning rate only rises and never decays"
    ]


def test_tables_of_a_mix_are_read_and_written_again() -> None:
    mix = '[[dataset.mix]]\npath = "a.jsonl"\nweight = 2\ncolumns = {messages = "m"}\n[[dataset.mix]]\nhub = "o/n"\nsplit = "test"\nweight = 1\n'
    loaded = load(GOOD.replace('path = "data.jsonl"\n', mix))
    first, second = loaded.config.dataset.mix
    assert (first.path, first.weight, first.columns.messages, first.columns.text) == ("a.jsonl", 2.0, "m", "text")
    assert (second.hub, second.split, second.weight, second.repeats) == ("o/n", "test", 1.0, None)
    again = load(resolved_toml(loaded))
    assert resolved_toml(again) == resolved_toml(loaded)
    assert again.config.dataset.mix[0].path == os.path.abspath("a.jsonl")


def test_tables_of_a_mix_replace_those_of_the_base() -> None:
    Path("base.toml").write_text(GOOD.replace('path = "data.jsonl"', '[[dataset.mix]]\npath = "a"\n[[dataset.mix]]\npath = "b"'))
    assert [source.path for source in load('base = "base.toml"\n[[dataset.mix]]\npath = "c"\n').config.dataset.mix] == ["c"]
    notices = load('base = "base.toml"\n', "--dataset.path", "d.jsonl").notices
    assert notices == ["command line: --dataset.path d.jsonl: takes the place of dataset.mix (base.toml:6)"]


HUB = GOOD.replace('path = "data.jsonl"', 'hub = "a/b"\nsubset = "x"\nsplit = "part"\nstreaming = true')
MIX = GOOD.replace('path = "data.jsonl"', '[[dataset.mix]]\npath = "/a.jsonl"')
PARTS = "dataset.hub (run.toml:6), dataset.subset (run.toml:7), dataset.split (run.toml:8), dataset.streaming (run.toml:9)"


def test_what_needs_a_dropped_key_is_dropped_with_it() -> None:
    loaded = load(HUB, "--dataset.path", "/d.jsonl")
    assert loaded.notices == [f"command line: --dataset.path /d.jsonl: takes the place of {PARTS}"]
    dataset = loaded.config.dataset
    assert (dataset.path, dataset.hub, dataset.subset, dataset.split, dataset.streaming) == ("/d.jsonl", "", "", "train", False)


def test_validation_split_goes_with_the_hub_and_another_way_to_hold_out_may_stand() -> None:
    text = HUB + '[validation]\nenable = true\nsplit = "test"\n'
    loaded = load(text, "--dataset.path", "/d.jsonl", "--validation.path", "/v.jsonl")
    assert (loaded.config.validation.path, loaded.config.validation.split) == ("/v.jsonl", "")
    loaded = load(text, "--dataset.path=/d.jsonl", "--validation.no-enable")
    assert (loaded.config.validation.enable, loaded.config.validation.split) == (False, "")


def test_what_a_dropped_key_had_turned_off_may_stand() -> None:
    base = HUB.replace("streaming = true", "").replace("steps = 10", "")
    text = 'base = "base.toml"\n[dataset]\nstreaming = true\n[training]\nsteps = 10\n'
    assert load(text, base=base).config.dataset.streaming
    loaded = load(text, "--dataset.path=/d.jsonl", "--training.epochs=2", base=base)
    assert (loaded.config.dataset.streaming, loaded.config.training.steps, loaded.config.training.epochs) == (False, None, 2)


def test_a_key_that_is_dropped_itself_drops_nothing() -> None:
    base = GOOD.replace('path = "data.jsonl"', 'hub = "a/b"')
    loaded = load('base = "base.toml"\n[training]\nepochs = 2\n', "--dataset.streaming", base=base)
    assert (loaded.config.training.steps, loaded.config.training.epochs) == (10, None)
    assert loaded.notices == ["command line: --dataset.streaming: turns off training.epochs (run.toml:3)"]


def test_mix_of_a_higher_layer_takes_the_place_of_a_source_and_of_how_it_was_read() -> None:
    base = HUB.replace("streaming = true", 'streaming = true\nformat = "text"\ncolumns = {text = "body"}')
    loaded = load('base = "base.toml"\n[[dataset.mix]]\npath = "/c"\n', base=base)
    gone = PARTS.replace("run.toml", "base.toml").split(", ")
    gone += ["dataset.format (base.toml:10)", "dataset.columns.text (base.toml:11)"]
    (notice,) = loaded.notices
    start, _, named = notice.partition(": takes the place of ")
    assert (start, sorted(named.split(", "))) == ("run.toml:2: dataset.mix = […]", sorted(gone))
    assert replace(loaded.config.dataset, mix=()) == Dataset()


def test_format_goes_with_the_source_that_displaces_a_mix() -> None:
    loaded = load(MIX, "--dataset.path", "/d.jsonl", "--dataset.format", "text", "--dataset.columns.text", "body")
    assert (loaded.config.dataset.mix, loaded.config.dataset.format, loaded.config.dataset.columns.text) == ((), "text", "body")
    assert loaded.notices == ["command line: --dataset.path /d.jsonl: takes the place of dataset.mix (run.toml:6)"]


def test_only_a_source_displaces_a_mix() -> None:
    for words in ("--dataset.format text", "--dataset.columns.text body", "--dataset.subset x", "--dataset.split x", "--dataset.revision x"):
        with pytest.raises(ConfigError, match=r"has no effect beside \[\[dataset.mix\]\] \(run.toml:6\); write it inside its tables"):
            load(MIX, *words.split())


LAYERED: dict[str, object] = {
    "dataset.path": "/d", "dataset.hub": "a/b", "dataset.mix": [{"path": "/m"}], "dataset.subset": "x", "dataset.split": "y",
    "dataset.streaming": True, "dataset.format": "text", "dataset.columns.text": "body", "dataset.last_batch": "drop",
    "training.steps": 3, "training.epochs": 2, "validation.enable": True, "validation.path": "/v", "validation.split": "z",
    "validation.fraction": 0.5, "checkpoint.enable_checkpoint": True, "checkpoint.interval_type": "epochs",
}  # fmt: skip
"""Keys that need or exclude each other, with a value that says something."""


BASES = (
    "dataset.hub dataset.subset dataset.split dataset.streaming dataset.format training.steps validation.enable validation.split",
    "dataset.path dataset.format dataset.columns.text training.epochs checkpoint.enable_checkpoint checkpoint.interval_type",
    "dataset.mix training.steps dataset.last_batch validation.enable validation.fraction",
)
"""Keys that go together."""


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(BASES), st.dictionaries(st.sampled_from(list(LAYERED)), st.integers(min_value=1, max_value=2), max_size=4))
def test_config_in_memory_is_that_of_the_resolved_toml_whatever_the_layers(base: str, above: dict[str, int]) -> None:
    layers = {**dict.fromkeys(base.split(), 0), **above}
    texts = [GOOD.replace("[dataset]", "").replace('path = "data.jsonl"', "").replace("steps = 10", ""), 'base = "0.toml"\n', 'base = "1.toml"\n']
    for number, text in enumerate(texts):
        tables: dict[str, str] = {}
        for key in (key for key, layer in layers.items() if layer == number):
            section, _, name = key.rpartition(".")
            value = '[{path = "/m"}]' if name == "mix" else show_value(LAYERED[key])
            tables[section] = tables.get(section, "") + f"{name} = {value}\n"
        text = text.replace("[training]", "") + "".join(f"[{section}]\n{lines}" for section, lines in tables.items())
        Path(f"{number}.toml").write_text(text)
    try:
        loaded = load_config(["2.toml", "--job.dump_folder=/runs"])
    except ConfigError:
        return
    Path("resolved.toml").write_text(resolved_toml(loaded))
    again = load_config(["resolved.toml"])
    assert again.notices == []
    for key in (key for key in FIELDS if key not in ("job.config_file", "model.tokenizer_path")):
        assert read_value(again.config, key) == read_value(loaded.config, key), key
