"""No setting without effect: every field of the schema has a case that shows what it changes (law 5).

A case is a function registered with the keys that it is for. It uses a lab, which runs tiny trainings, and asserts on something
that a person or another program could see: a file, a number, a message, the state of torch.
"""

import dataclasses
import gzip
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, TOKENIZER, Run, forks_that, run_processes, write_chats, write_toml
from hub_server import hub_environment, serve_hub
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from tunelib.config import Config, load_config, resolve_dump_folder
from tunelib.config.schema import Columns
from tunelib.data.chat import CHATML
from tunelib.data.tokenizer import Tokenizer
from tunelib.errors import CheckpointError, ConfigError, DataError, FormatError, NumbersError, SaveError

Check = Callable[["Lab"], None]
CASES: dict[str, Check] = {}


def shows(*keys: str) -> Callable[[Check], Check]:
    """Register a case for settings; it runs once, and until it passes for each of them."""

    def register(check: Check) -> Check:
        passed = False

        def check_once(lab: Lab) -> None:
            nonlocal passed
            if not passed:
                check(lab)
            passed = True

        for key in keys:
            assert key not in CASES
            CASES[key] = check_once
        return check

    return register


def field_keys(section: type, prefix: str = "") -> Iterator[str]:
    """The dotted keys of a dataclass of settings, those of its lists of tables among them."""
    hints = get_type_hints(section)
    for field in dataclasses.fields(section):
        inner = next((kind for kind in (hints[field.name], *get_args(hints[field.name])) if dataclasses.is_dataclass(kind)), None)
        if inner is not None:
            yield from field_keys(inner, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


@dataclasses.dataclass
class Lab:
    """Tiny runs of three steps, the plain one made once."""

    folder: Path
    train: Callable[..., Run]
    read_output: Callable[[], str]
    shared: dict[str, Run]

    @property
    def data(self) -> Path:
        return self.folder / "chats.jsonl"

    @property
    def toml(self) -> Path:
        return self.folder / "tiny.toml"

    def bare(self) -> Path:
        """A config of one step that does not say what the model is."""
        path = self.folder / "bare.toml"
        path.write_text(f'[model]\ntokenizer_path = "{TOKENIZER}"\n[dataset]\npath = "{self.data}"\n[training]\nsteps = 1\nseq_len = 128\n')
        return path

    def run(self, *words: str, folder: Path | None = None) -> Run:
        """Three steps of the plain config with these words."""
        steps = [] if any(word.startswith(("--training.steps", "--training.epochs")) for word in words) else ["--training.steps", "3"]
        return self.train(self.toml, *steps, *words, folder=folder)

    def plain(self, *words: str) -> Run:
        """The same run as `run`, made once for all cases."""
        key = " ".join(words)
        if key not in self.shared:
            self.shared[key] = self.run(*words, folder=self.folder / f"plain-{len(self.shared)}")
        return self.shared[key]

    def refusal(self, *words: str, world_size: int = 1) -> str:
        """What the config check says against these words."""
        with pytest.raises(ConfigError) as error:
            load_config([str(self.toml), "--training.steps", "3", *words], world_size=world_size)
        return str(error.value)

    def changes(self, column: str, *words: str, given: tuple[str, ...] = ()) -> None:
        """Assert that a column of metrics.jsonl is another one with these words."""
        plain, changed = self.plain(*given).series(column), self.run(*given, *words).series(column)
        assert len(plain) > 0
        assert plain != changed, f"{words} left {column} as it was"


@pytest.fixture(scope="module")
def shared() -> dict[str, Run]:
    return {}


@pytest.fixture(scope="module")
def lab_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("settings")
    write_toml(folder / "tiny.toml", write_chats(folder / "chats.jsonl", 60))
    return folder


@pytest.fixture
def lab(lab_folder: Path, train: Callable[..., Run], capsys: pytest.CaptureFixture, shared: dict[str, Run]) -> Lab:
    return Lab(lab_folder, train, lambda: capsys.readouterr().out, shared)


def test_every_setting_has_a_case() -> None:
    assert sorted(CASES) == sorted(field_keys(Config))


@pytest.mark.parametrize("key", sorted(field_keys(Config)))
def test_setting_has_an_effect(lab: Lab, key: str) -> None:
    assert key in CASES, f"{key} has no case: nothing shows that it does anything"
    CASES[key](lab)


def export_config(run: Run) -> dict[str, Any]:
    return json.loads((run.folder / "export/config.json").read_text())


def steps_saved(run: Run) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run.folder / "checkpoint").iterdir())


# [job]


@shows("job.config_file", "job.dump_folder")
def _(lab: Lab) -> None:
    named = load_config([str(lab.toml), "--training.steps", "1"])
    assert resolve_dump_folder(named.config) == Path.cwd() / "outputs/tiny"
    assert (lab.run(folder=lab.folder / "elsewhere").folder / "metrics.jsonl").is_file()


@shows("job.description")
def _(lab: Lab) -> None:
    lab.run("--job.description", "a line with = and spaces")
    assert "a line with = and spaces" in lab.read_output()


# [model]


@shows("model.flavor")
def _(lab: Lab) -> None:
    run = lab.run("--model.flavor", "smollm2-135m", "--model.num_hidden_layers", "1")
    assert export_config(run)["rope_theta"] == 100000.0
    assert export_config(run)["hidden_size"] == 32, "a field replaces the size's"


@shows("model.tokenizer_path")
def _(lab: Lab) -> None:
    with pytest.raises(DataError, match=r"has no tokenizer\.json"):
        lab.run("--model.tokenizer_path", str(lab.folder))


@shows("model.resize_embeddings")
def _(lab: Lab) -> None:
    template = lab.folder / "new.jinja"
    template.write_text(CHATML.replace("im_end", "new_end"))
    given = ("--dataset.chat_template", str(template))
    with pytest.raises(DataError, match=r"writes <\|new_end\|>, which are no tokens of the tokenizer"):
        lab.run(*given)
    assert export_config(lab.run(*given, "--model.resize_embeddings"))["vocab_size"] == Tokenizer(TOKENIZER).vocab_size + 2


@shows(*(f"model.{name}" for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads", "head_dim")))
def _(lab: Lab) -> None:
    words = {"vocab_size": 1100, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 3, "num_key_value_heads": 1, "head_dim": 16}
    run = lab.run(*(word for name, value in words.items() for word in (f"--model.{name}", str(value))))
    assert export_config(run).items() >= words.items()
    shapes = {name: tuple(weight.shape) for name, weight in run.weights().items()}
    assert shapes["model.embed_tokens.weight"] == (1100, 48)
    assert shapes["model.layers.2.mlp.up_proj.weight"] == (40, 48)
    assert shapes["model.layers.2.self_attn.q_proj.weight"] == (64, 48)
    assert shapes["model.layers.2.self_attn.k_proj.weight"] == (16, 48)


@shows("model.num_attention_heads")
def _(lab: Lab) -> None:
    lab.changes("loss", "--model.num_attention_heads", "2")


@shows("model.max_position_embeddings")
def _(lab: Lab) -> None:
    assert export_config(lab.run("--model.max_position_embeddings", "300"))["max_position_embeddings"] == 300


@shows("model.rms_norm_eps")
def _(lab: Lab) -> None:
    lab.changes("loss", "--model.rms_norm_eps", "0.01")


@shows("model.rope_theta")
def _(lab: Lab) -> None:
    lab.changes("loss", "--model.rope_theta", "50")


@shows("model.tie_word_embeddings")
def _(lab: Lab) -> None:
    assert "lm_head.weight" in lab.plain().weights()
    assert "lm_head.weight" not in lab.run("--model.tie_word_embeddings").weights()


@shows("model.initializer_range")
def _(lab: Lab) -> None:
    lab.changes("loss", "--model.initializer_range", "0.2")


STRETCHED = ("--model.rope_scaling.rope_type", "llama3", "--model.rope_scaling.original_max_position_embeddings", "32")


@shows("model.rope_scaling.rope_type")
def _(lab: Lab) -> None:
    lab.changes("loss", *STRETCHED)
    assert export_config(lab.plain(*STRETCHED))["rope_scaling"]["rope_type"] == "llama3"


@shows("model.rope_scaling.factor")
def _(lab: Lab) -> None:
    lab.changes("loss", "--model.rope_scaling.factor", "32", given=STRETCHED)


@shows("model.rope_scaling.low_freq_factor")
def _(lab: Lab) -> None:
    lab.changes("loss", "--model.rope_scaling.low_freq_factor", "0.1", given=STRETCHED)


@shows("model.rope_scaling.high_freq_factor")
def _(lab: Lab) -> None:
    lab.changes("loss", "--model.rope_scaling.high_freq_factor", "40", given=STRETCHED)


@shows("model.rope_scaling.original_max_position_embeddings")
def _(lab: Lab) -> None:
    lab.changes("loss", *STRETCHED[:2], "--model.rope_scaling.original_max_position_embeddings", "64", given=())


# [dataset]


@shows("dataset.path")
def _(lab: Lab) -> None:
    lab.changes("loss", "--dataset.path", str(write_chats(lab.folder / "others.jsonl", 60, seed=1)))


TURN = [{"role": "user", "content": "say it"}, {"role": "assistant", "content": "it"}]


def write_rows(lab: Lab, rows: list[dict[str, Any]]) -> str:
    """The path of a new data file."""
    path = lab.folder / f"rows-{len(list(lab.folder.glob('rows-*')))}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@shows("dataset.format", "dataset.columns.text")
def _(lab: Lab) -> None:
    lines = [{"messages": json.loads(line)["messages"], "body": "a document"} for line in lab.data.read_text().splitlines()]
    both = lab.folder / "both.jsonl"
    both.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ("--dataset.path", str(both), "--dataset.columns.text", "body")
    with pytest.raises(DataError, match=r"fit chat and text: choose one with dataset\.format"):
        lab.run(*words)
    lab.run(*words, "--dataset.format", "text")
    assert "60 documents, " in (said := lab.read_output())
    assert "100% trained" in said


def renamed_column(lab: Lab, rows: list[dict[str, Any]], key: str, name: str) -> None:
    """Rows whose column is called ``name`` are read only with the setting."""
    path = lab.folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"dataset\.columns names other columns"):
        lab.run("--dataset.path", str(path))
    lab.run("--dataset.path", str(path), f"--dataset.columns.{key}", name)


@shows("dataset.columns.messages")
def _(lab: Lab) -> None:
    renamed_column(lab, [{"talk": json.loads(line)["messages"]} for line in lab.data.read_text().splitlines()], "messages", "talk")


@shows("dataset.columns.instruction")
def _(lab: Lab) -> None:
    renamed_column(lab, [{"ask": f"say {n}", "output": str(n)} for n in range(60)], "instruction", "ask")


@shows("dataset.columns.output")
def _(lab: Lab) -> None:
    renamed_column(lab, [{"instruction": f"say {n}", "answer": str(n)} for n in range(60)], "output", "answer")


@shows("dataset.columns.input")
def _(lab: Lab) -> None:
    path = lab.folder / "material.jsonl"
    path.write_text("".join(json.dumps({"instruction": "repeat", "material": f"{n} sage", "output": f"{n} sage"}) + "\n" for n in range(60)))
    without, with_it = (lab.run("--dataset.path", str(path), *words) for words in ([], ["--dataset.columns.input", "material"]))
    assert with_it.series("tokens")[-1] != without.series("tokens")[-1]


@shows("dataset.chat_template")
def _(lab: Lab) -> None:
    template = lab.folder / "plain.jinja"
    template.write_text("{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}<|im_end|>\n{% endfor %}")
    lab.changes("loss", "--dataset.chat_template", str(template))


@shows("dataset.train_on")
def _(lab: Lab) -> None:
    lab.changes("loss", "--dataset.train_on", "all")
    path = write_rows(lab, [{"messages": [*TURN, *TURN]}] * 60)
    lab.changes("loss", "--dataset.train_on", "last", given=("--dataset.path", path))


@shows("dataset.parse_special_tokens")
def _(lab: Lab) -> None:
    path = write_rows(lab, [{"text": f"<|im_start|>user\nsay {n}<|im_end|>"} for n in range(60)])
    lab.changes("tokens", "--dataset.parse_special_tokens", given=("--dataset.path", path))


@shows("dataset.columns.tools", "dataset.columns.system")
def _(lab: Lab) -> None:
    template = lab.folder / "tools.jinja"
    template.write_text("{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML)
    path = write_rows(lab, [{"messages": TURN, "sys": "be brief", "functions": [{"name": "look"}]}] * 60)
    given = ("--dataset.path", path, "--dataset.chat_template", str(template))
    for name, column in (("tools", "functions"), ("system", "sys")):
        lab.changes("tokens", f"--dataset.columns.{name}", column, given=given)


@shows("dataset.columns.prompt", "dataset.columns.completion")
def _(lab: Lab) -> None:
    renamed_column(lab, [{"ask": f"say {n}", "completion": str(n)} for n in range(60)], "prompt", "ask")
    renamed_column(lab, [{"prompt": f"say {n}", "answer": str(n)} for n in range(60)], "completion", "answer")


@shows("dataset.columns.input_ids", "dataset.columns.labels", "dataset.columns.mask")
def _(lab: Lab) -> None:
    renamed_column(lab, [{"ids": [5, 6, 7, 8 + n]} for n in range(60)], "input_ids", "ids")
    path = write_rows(lab, [{"input_ids": [5, 6, 7, 8], "targets": [-100, -100, 7, 8], "trained": [0, 0, 0, 1]}] * 60)
    for name, column in (("labels", "targets"), ("mask", "trained")):
        lab.changes("loss", f"--dataset.columns.{name}", column, given=("--dataset.path", path))


@shows("dataset.last_batch")
def _(lab: Lab) -> None:
    filled, dropped = (lab.run("--training.epochs", "1", *words) for words in ([], ["--dataset.last_batch", "drop"]))
    assert len(dropped.series("loss")) < len(filled.series("loss"))
    assert dropped.series("epoch")[-1] == 1.0


@shows("dataset.cache_folder")
def _(lab: Lab) -> None:
    lab.run("--dataset.cache_folder", str(lab.folder / "own-cache"))
    assert [path.name for path in (lab.folder / "own-cache/index").iterdir() if path.is_dir()]


def mixed(lab: Lab, *tables: str) -> Run:
    """Three steps on several sources."""
    toml = lab.folder / "mix.toml"
    toml.write_text(lab.toml.read_text().replace(f'path = "{lab.data}"', "\n".join(f"[[dataset.mix]]\n{table}" for table in tables)))
    return lab.train(toml, "--training.steps", "3")


@shows(*(f"dataset.mix.{name}" for name in ("path", "format", "weight", "repeats", *(f"columns.{column}" for column in vars(Columns())))))
def _(lab: Lab) -> None:
    rows = {
        "chat": {"messages": TURN, "tools": [{"name": "look"}], "system": "be brief"},
        "prompt_completion": {"prompt": "say it", "completion": "it"},
        "instruct": {"instruction": "say it", "input": "now", "output": "it"},
        "text": {"text": "it was said"},
        "tokens": {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]},
    }
    tables = []
    for format, row in rows.items():
        columns = ", ".join(f'{name} = "my_{name}"' for name in row)
        path = write_rows(lab, [{f"my_{name}": value for name, value in row.items()}] * 30)
        tables.append(f'path = "{path}"\nformat = "{format}"\ncolumns = {{ {columns} }}\n')
    masked = write_rows(lab, [{"input_ids": [5, 6, 7, 8], "my_mask": [0, 0, 1, 1]}] * 30)
    tables.append(f'path = "{masked}"\ncolumns = {{ mask = "my_mask" }}\n')
    mixed(lab, *tables)
    said = lab.read_output()
    assert "180 documents" in said
    assert f"{masked}: read as 'tokens'" in said
    assert "1 times its 30 documents" in said
    mixed(lab, *(f"{table}repeats = {number}\n" for number, table in enumerate(tables, start=1)))
    assert "6 times its 30 documents" in lab.read_output()
    mixed(lab, *(f"{table}weight = {number}\n" for number, table in enumerate(tables, start=1)))
    assert f"{masked}: 28.6% of the tokens" in lab.read_output()


HUB_KEYS = [f"{section}.{name}" for section in ("dataset", "dataset.mix") for name in ("hub", "subset", "split", "revision")]


@shows(*HUB_KEYS, "dataset.streaming", "validation.split")
def _(lab: Lab) -> None:
    toml, home = lab.folder / "hub.toml", lab.folder / "home"
    runs = {
        "plain": 'hub = "someone/chats"',
        "split": 'hub = "someone/chats"\nsplit = "train[:50%]"',
        "revision": 'hub = "someone/chats"\nrevision = "v1"',
        "subset": 'hub = "someone/pair"\nsubset = "large"',
        "no subset": 'hub = "someone/pair"\nsubset = "middle"',
        "streaming": 'hub = "someone/chats"\nstreaming = true',
        "mix": '[[dataset.mix]]\nhub = "someone/pair"\nsubset = "small"\n[[dataset.mix]]\nhub = "someone/chats"\nsplit = "test"\nrevision = "v1"',
    }
    said = {}
    with serve_hub() as endpoint:
        for name, source in runs.items():
            toml.write_text(lab.toml.read_text().replace(f'path = "{lab.data}"', source))
            held_out = ["--validation.enable", "--validation.split", "test"] if name == "plain" else []
            words = ["--training.steps", "1", "--training.global_batch_size", "1", "--job.dump_folder", str(lab.folder / "hub-run"), *held_out]
            (ended,) = forks_that("default").run([str(toml), *words], timeout=120, environment=hub_environment(endpoint, home))
            said[name] = ended.said
            assert ended.code == (2 if name == "no subset" else 0), said[name]
    assert "600 documents" in said["plain"]
    assert "validation loss" in said["plain"]
    assert "300 documents" in said["split"]
    assert "600 documents" in said["revision"]
    assert "600 documents" in said["subset"]
    assert "set dataset.subset to one of 'small', 'large'" in said["no subset"]
    assert "someone/chats: streamed; the order depends on the number of data ranks" in said["streaming"]
    assert "2 documents" in said["mix"]
    assert len(list((home / "hub/datasets--someone--chats/snapshots").iterdir())) == 2, "both revisions were asked for"


@shows("dataset.packing")
def _(lab: Lab) -> None:
    lab.changes("tokens", "--dataset.no-packing")


@shows("dataset.too_long")
def _(lab: Lab) -> None:
    with pytest.raises(DataError, match=r"chats\.jsonl:\d+: \d+ tokens do not fit"):
        lab.run("--dataset.too_long", "error", "--training.seq_len", "32")
    lab.changes("tokens", "--dataset.too_long", "drop", given=("--training.seq_len", "32"))


# [training]


@shows("training.steps")
def _(lab: Lab) -> None:
    assert len(lab.run("--training.steps", "2").series("loss")) == 2


@shows("training.epochs")
def _(lab: Lab) -> None:
    epochs = lab.run("--training.epochs", "2").series("epoch")
    assert epochs[-2] < 2 <= epochs[-1]


@shows("training.global_batch_size")
def _(lab: Lab) -> None:
    lab.changes("tokens", "--training.global_batch_size", "4")


@shows("training.local_batch_size")
def _(lab: Lab) -> None:
    forwards = []
    from tunelib.model.decoder import Decoder

    original = Decoder.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "forward", lambda self, tokens, *a, **k: (forwards.append(len(tokens)), original(self, tokens, *a, **k))[1])
        lab.run("--training.local_batch_size", "2", "--checkpoint.verify_export", "false")  # which calls the model once more
    assert forwards == [2] * 12


@shows("training.seq_len")
def _(lab: Lab) -> None:
    lab.changes("tokens", "--training.seq_len", "64")


@shows("training.max_norm")
def _(lab: Lab) -> None:
    lab.changes("loss", "--training.max_norm", "1e-9")
    assert lab.plain().series("grad_norm")[0] > 0.1, "what is logged is the norm before clipping"


@shows("training.seed")
def _(lab: Lab) -> None:
    lab.changes("loss", "--training.seed", "5")
    lab.changes("tokens", "--training.seed", "5")


@shows("training.deterministic")
def _(lab: Lab) -> None:
    lab.run("--training.deterministic")
    assert torch.are_deterministic_algorithms_enabled()
    lab.run()
    assert not torch.are_deterministic_algorithms_enabled()


@shows("training.enable_cpu_offload")
def _(lab: Lab) -> None:
    """What it does is shown in tests/unit/parallel/test_fsdp.py, as far as there is no GPU."""
    with pytest.raises(ConfigError, match="there is no GPU here whose memory it would save"):
        lab.run("--training.enable_cpu_offload")


@shows("training.dtype")
def _(lab: Lab) -> None:
    run = lab.run("--training.dtype", "float64")
    assert {weight.dtype for weight in run.weights().values()} == {torch.float64}
    assert export_config(run)["dtype"] == "float64"


@shows("training.mixed_precision_param")
def _(lab: Lab) -> None:
    lab.changes("loss", "--training.mixed_precision_param", "bfloat16")


@shows("training.mixed_precision_reduce")
def _(lab: Lab) -> None:
    names = [lab.folder / "reduce-float32", lab.folder / "reduce-bfloat16"]
    common = [str(lab.toml), "--training.steps", "3"]
    run_processes([[*common, "--job.dump_folder", str(n), "--training.mixed_precision_reduce", n.name[7:]] for n in names], 2)
    exact, rounded = (Run(name).series("grad_norm") for name in names)
    assert exact != rounded
    assert exact == pytest.approx(rounded, rel=0.05)


# [optimizer]


@shows("optimizer.name", "optimizer.momentum")
def _(lab: Lab) -> None:
    lab.changes("loss", "--optimizer.name", "SGD")
    wide = ("--model.hidden_size", "64", "--model.num_key_value_heads", "4")
    with torch.compiler.set_stance("force_eager"):  # what is shown costs no compiling
        lab.changes("loss", "--optimizer.name", "AdamW8bit", given=wide)
    lab.changes("loss", "--optimizer.momentum", "0.9", given=("--optimizer.name", "SGD"))


@shows("optimizer.lr")
def _(lab: Lab) -> None:
    assert lab.run("--optimizer.lr", "0.002").series("lr") == [0.002] * 3
    lab.changes("loss", "--optimizer.lr", "0.002")


@shows("optimizer.beta1")
def _(lab: Lab) -> None:
    lab.changes("loss", "--optimizer.beta1", "0.1")


@shows("optimizer.beta2")
def _(lab: Lab) -> None:
    lab.changes("loss", "--optimizer.beta2", "0.1")


@shows("optimizer.eps")
def _(lab: Lab) -> None:
    lab.changes("loss", "--optimizer.eps", "1.0")


@shows("optimizer.weight_decay")
def _(lab: Lab) -> None:
    lab.changes("loss", "--optimizer.weight_decay", "10")


# [lr_scheduler]


@shows("lr_scheduler.warmup_steps")
def _(lab: Lab) -> None:
    assert lab.run("--lr_scheduler.warmup_steps", "2").series("lr") == [0.005, 0.01, 0.01]


@shows("lr_scheduler.decay_type", "lr_scheduler.decay_ratio", "lr_scheduler.min_lr_factor")
def _(lab: Lab) -> None:
    linear = ("--lr_scheduler.decay_type", "linear")
    assert lab.run(*linear).series("lr") == pytest.approx([0.0075, 0.005, 0.0025])
    assert lab.run(*linear, "--lr_scheduler.decay_ratio", "0.34").series("lr") == pytest.approx([0.01, 0.01, 0.005])
    assert lab.run(*linear, "--lr_scheduler.min_lr_factor", "0.2").series("lr") == pytest.approx([0.008, 0.006, 0.004])


# [parallelism]


@shows(
    "parallelism.data_parallel_replicate_degree",
    "parallelism.context_parallel_degree",
    "parallelism.tensor_parallel_degree",
    "parallelism.pipeline_parallel_degree",
)
def _(lab: Lab) -> None:
    """What they do is shown where there are processes: tests/integration/test_layouts.py."""
    for name in ("data_parallel_replicate", "context_parallel", "tensor_parallel", "pipeline_parallel"):
        assert f"parallelism.{name}_degree" in lab.refusal(f"--parallelism.{name}_degree", "2", world_size=3)


@shows("parallelism.pipeline_parallel_schedule", "parallelism.pipeline_parallel_split_points")
def _(lab: Lab) -> None:
    from tunelib.config.schema import Parallelism
    from tunelib.formats.load import find_weights
    from tunelib.model.decoder import build_on_meta
    from tunelib.parallel.pipeline import plan_stages

    config = load_config([str(lab.toml), "--training.steps", "1", "--model.num_hidden_layers", "8"]).config
    model = build_on_meta(find_weights(config.model, "", 640, 128).config, torch.float32)
    stages = {
        section: [len(layers) for layers in plan_stages(model, section, 128)]
        for section in (
            Parallelism(pipeline_parallel_degree=2),
            Parallelism(pipeline_parallel_degree=2, pipeline_parallel_schedule="Interleaved1F1B"),
            Parallelism(pipeline_parallel_degree=2, pipeline_parallel_split_points=("layers.1",)),
        )
    }
    two, four, uneven = stages.values()
    assert (len(two), len(four), uneven) == (2, 4, [1, 7])
    assert sum(two) == sum(four) == 8


@shows("parallelism.enable_async_tensor_parallel")
def _(lab: Lab) -> None:
    """On CUDA it is the compiler's; here it is refused once there are processes, and before that without a compiler."""
    from tunelib.parallel.tensor import overlap_products

    words = ("--parallelism.tensor_parallel_degree", "2", "--parallelism.enable_async_tensor_parallel")
    assert "set compile.enable = true" in lab.refusal(*words, world_size=2)
    with pytest.raises(ConfigError, match="it works between GPUs, and this run is on cpu"):
        overlap_products(SimpleNamespace(device_type="cpu"))  # type: ignore[arg-type]


@shows("parallelism.data_parallel_shard_degree")
def _(lab: Lab) -> None:
    assert "parallelism.data_parallel_shard_degree" in lab.refusal("--parallelism.data_parallel_shard_degree", "4", world_size=2)


@shows("parallelism.fsdp_reshard_after_forward")
def _(lab: Lab) -> None:
    from tunelib.config.schema import ActivationCheckpoint, Comm, Parallelism, Training
    from tunelib.formats.load import find_weights, give_weights
    from tunelib.model.decoder import build_on_meta
    from tunelib.parallel.apply import spread_model
    from tunelib.parallel.mesh import build_layout
    from tunelib.parallel.runtime import start

    config = load_config([str(lab.toml), "--training.steps", "1"]).config
    with start(Training(mixed_precision_param="bfloat16"), Comm()) as runtime:
        for choice, gathered in (("always", False), ("never", True)):
            section = Parallelism(fsdp_reshard_after_forward=choice)
            weights = find_weights(config.model, "", 64, 128)
            model = build_on_meta(weights.config, runtime.param_dtype)
            spread_model(model, section, ActivationCheckpoint(), build_layout(section, runtime), runtime)
            give_weights(model, weights, 0)
            tokens = torch.zeros((1, 4), dtype=torch.int64)
            model(tokens, torch.arange(4)[None], (4,), labels=tokens)
            assert isinstance(model.model.layers["0"].mlp.up_proj.weight, DTensor) is not gathered


# [checkpoint]

SAVING = "--checkpoint.enable_checkpoint"


@shows("checkpoint.enable_checkpoint", "checkpoint.folder", "checkpoint.interval")
def _(lab: Lab) -> None:
    assert not (lab.plain().folder / "checkpoint").exists()
    run = lab.run(SAVING, "--checkpoint.interval", "2")
    assert steps_saved(run) == [2, 3]
    assert (lab.run(SAVING, "--checkpoint.folder", "states").folder / "states/step-3/manifest.json").is_file()


@shows("checkpoint.interval_type")
def _(lab: Lab) -> None:
    by_epoch = lab.run("--training.epochs", "3", SAVING, "--checkpoint.interval", "1", "--checkpoint.interval_type", "epochs", "--dataset.no-packing")
    assert steps_saved(by_epoch) == [8, 15, 23], "60 documents in batches of 8: epochs end in steps 8, 15 and 23"
    import train as program

    def slow_step(*words: Any) -> tuple[float, float]:
        time.sleep(0.6)
        return original(*words)

    original = program.train_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "train_step", slow_step)
        assert steps_saved(lab.run(SAVING, "--checkpoint.interval", "1", "--checkpoint.interval_type", "seconds")) == [2, 3]


@shows("checkpoint.keep_every_n")
def _(lab: Lab) -> None:
    words = (SAVING, "--checkpoint.interval", "1", "--checkpoint.keep_latest_k", "1")
    assert (steps_saved(lab.run(*words)), steps_saved(lab.run(*words, "--checkpoint.keep_every_n", "2"))) == ([3], [2, 3])


@shows("checkpoint.keep_best")
def _(lab: Lab) -> None:
    validation = ("--validation.enable", "--validation.fraction", "0.2", "--validation.freq", "1", "--optimizer.lr", "1.0")
    run = lab.run(SAVING, "--checkpoint.interval", "1", "--checkpoint.keep_latest_k", "1", *validation, "--checkpoint.keep_best")
    losses = run.series("validation_loss")[1:]
    assert steps_saved(run) == sorted({losses.index(min(losses)) + 1, 3})


@shows("checkpoint.load_best_at_end", "validation.patience")
def _(lab: Lab) -> None:
    """What is exported, and where a run ends, is shown in tests/integration/test_best_and_early.py."""
    words = (
        SAVING,
        "--validation.enable",
        "--validation.fraction",
        "0.2",
        "--validation.freq",
        "1",
        "--optimizer.lr",
        "1.5",
        "--lr_scheduler.warmup_steps",
        "3",  # better after the first step, much worse after the others
        "--checkpoint.keep_best",
    )
    run, best = lab.run(*words), lab.run(*words, "--checkpoint.load_best_at_end")
    assert run.series("validation_loss") == best.series("validation_loss")
    assert any(not torch.equal(tensor, best.weights()[name]) for name, tensor in run.weights().items())
    assert len(lab.run(*words, "--validation.patience", "1").series("validation_loss")) < len(run.series("validation_loss"))


@shows("checkpoint.async_mode", "checkpoint.max_failed_saves")
def _(lab: Lab) -> None:
    """What saves in the background hold, and how many may fail, is shown in tests/integration/test_recovery.py."""
    from tunelib.checkpoint import manager

    started = []
    start = manager.Background.start

    def noted(self: manager.Background, *words: Any) -> None:
        started.append(len(words[0]))
        start(self, *words)

    def fail(*_: object) -> None:
        raise SaveError("no space")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manager.Background, "start", noted)
        lab.run(SAVING, "--checkpoint.interval", "1")
        assert not started
        assert steps_saved(lab.run(SAVING, "--checkpoint.interval", "1", "--checkpoint.async_mode", "async")) == [1, 2, 3]
        assert len(started) == 2  # the last one is not in the background
        patch.setattr(manager, "save_tensors", fail)
        for allowed, done in ((0, 1), (1, 2)):
            with pytest.raises(SaveError, match="no space"):
                lab.run(SAVING, "--checkpoint.interval", "1", "--checkpoint.max_failed_saves", str(allowed), folder=lab.folder / f"failed-{allowed}")
            assert len(Run(lab.folder / f"failed-{allowed}").series("loss")) == done


@shows("checkpoint.sha256")
def _(lab: Lab) -> None:
    from tunelib.files import find_damage, read_manifest

    for words in ([], ["--checkpoint.sha256"]):
        folder = lab.run(SAVING, *words).folder / "checkpoint/step-3"
        listed = read_manifest(folder)["files"]
        expected = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in listed} if words else {}
        assert {name: entry["sha256"] for name, entry in listed.items() if "sha256" in entry} == expected
        assert find_damage(folder, listed, listed) == []
        for entry in listed.values():
            entry |= {"sha256": "0" * 64} if words else {}
        assert len(find_damage(folder, listed, listed)) == len(listed) * len(words)


@shows("checkpoint.grace_seconds")
def _(lab: Lab) -> None:
    from tunelib.checkpoint.manager import CheckpointManager
    from tunelib.checkpoint.state import RunState
    from tunelib.config.schema import Checkpoint

    said = {}
    for seconds in (10, 1000):
        section = Checkpoint(enable_checkpoint=True, grace_seconds=seconds)
        manager = CheckpointManager(section, lab.folder / f"grace-{seconds}", True, "", "{}")
        manager.save({"w": torch.ones(3)}, RunState(1, 10, 1, "cpu", {}))
        manager._seconds = 60.0  # as a larger one takes
        said[seconds] = manager.save_in_time({"w": torch.ones(3)}, RunState(2, 20, 1, "cpu", {}), lambda: 0.0)
    assert "not saved, since a save takes about 60 s, and 10 s are left" in said[10]
    assert said[1000] == "and saved; the same command goes on from there"


@shows("training.on_nonfinite", "training.max_nonfinite_steps")
def _(lab: Lab) -> None:
    """With real faults in tests/integration/test_recovery.py."""
    import train as program

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "clip_gradients", lambda *_: torch.tensor(math.nan))
        with pytest.raises(NumbersError, match="step 1: loss"):
            lab.run()
        skipped = lab.run("--training.on_nonfinite", "skip")
        assert [row["step"] for row in skipped.rows() if row.get("passed_over")] == [1, 2, 3]
        with pytest.raises(NumbersError, match=r"after 2 steps were passed over \(training\.max_nonfinite_steps\)"):
            lab.run("--training.on_nonfinite", "skip", "--training.max_nonfinite_steps", "2")
    assert "there is nothing to go back to" in lab.refusal("--training.on_nonfinite", "rollback")


@shows("checkpoint.keep_latest_k")
def _(lab: Lab) -> None:
    assert steps_saved(lab.run(SAVING, "--checkpoint.interval", "1", "--checkpoint.keep_latest_k", "2")) == [2, 3]
    assert steps_saved(lab.run(SAVING, "--checkpoint.interval", "1", "--checkpoint.keep_latest_k", "0")) == [1, 2, 3]


@shows("checkpoint.load_step", "checkpoint.resume")
def _(lab: Lab) -> None:
    run = lab.run(SAVING, "--checkpoint.interval", "1")
    lab.read_output()
    lab.run(SAVING, "--checkpoint.interval", "1", "--checkpoint.load_step", "2", folder=run.folder)
    assert lab.read_output().startswith("resuming after step 2")
    lab.run(SAVING, "--checkpoint.resume", "never", folder=run.folder)
    assert lab.read_output().startswith("starting fresh: checkpoint.resume is 'never'")
    with pytest.raises(CheckpointError, match="holds steps 3"):
        lab.run(SAVING, "--checkpoint.load_step", "1", folder=run.folder)


@shows("checkpoint.initial_load_path")
def _(lab: Lab) -> None:
    bare = lab.bare()
    export = lab.plain().folder / "export"
    first = lab.train(bare, "--checkpoint.initial_load_path", str(export)).series("loss")[0]
    assert first < lab.plain().series("loss")[0]
    with pytest.raises(FormatError, match="does not exist"):
        lab.train(bare, "--checkpoint.initial_load_path", str(lab.folder / "nowhere"))


@shows("checkpoint.model_weights_only", "checkpoint.export_dtype")
def _(lab: Lab) -> None:
    run = lab.run(SAVING, "--checkpoint.model_weights_only", "--checkpoint.export_dtype", "float16")
    assert json.loads((run.folder / "checkpoint/step-3/manifest.json").read_text())["kind"] == "model"
    assert {weight.dtype for weight in run.weights().values()} == {torch.float16}


@shows("checkpoint.export_format")
def _(lab: Lab) -> None:
    run = lab.run("--checkpoint.export_format", "meta")
    assert {path.name for path in (run.folder / "export").iterdir()} >= {"consolidated.00.pth", "params.json"}


@shows("checkpoint.verify_export")
def _(lab: Lab) -> None:
    assert (lab.plain().folder / "export_check.json").is_file()
    assert not (lab.run("--checkpoint.verify_export", "false").folder / "export_check.json").exists()


@shows("checkpoint.create_seed_checkpoint")
def _(lab: Lab) -> None:
    run = lab.run(SAVING, "--checkpoint.create_seed_checkpoint")
    assert steps_saved(run) == [0]
    assert not (run.folder / "metrics.jsonl").exists()


# [activation_checkpoint]


@shows("activation_checkpoint.mode", "activation_checkpoint.selective_ac_option")
def _(lab: Lab) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    work = []
    every_second = ("--activation_checkpoint.mode", "selective", "--activation_checkpoint.selective_ac_option", "2")
    for words in ((), ("--activation_checkpoint.mode", "full"), every_second):
        with FlopCounterMode(display=False) as counter:
            lab.run(*words)
        work.append(counter.get_total_flops())
    assert work[0] < work[2] < work[1]


# [compile]


@shows("compile.enable")
def _(lab: Lab) -> None:
    """What it computes is compared in tests/integration/test_compile.py."""
    from tunelib.parallel.compile import choose_compile

    cpu, cuda, day = torch.device("cpu"), torch.device("cuda"), 1e16 * torch.get_num_threads()

    def choose(told: bool | None, by: str, device: torch.device, before: bool | None, flops: float = 0.0) -> bool:
        return choose_compile(told, by, device, before, flops).compiled

    assert choose(False, "", cuda, None, day) is False
    assert choose(None, "", cpu, None) is False
    assert choose(None, "", cuda, False, day) is False  # as the run that is resumed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tunelib.parallel.compile._find_missing", lambda device: "")
        assert choose(True, "", cpu, None) is True
        assert (choose(None, "", cuda, None), choose(None, "x.y", cuda, None)) == (True, False)
        assert (choose(None, "", cpu, None, day), choose(None, "x.y", cpu, None, day)) == (True, False)
        assert (choose(None, "", cpu, True), choose(None, "x.y", cpu, True)) == (True, False)
        assert choose_compile(None, "", cpu, None, day).why == "a run of about 46.3 hours wins it back"
    with torch._inductor.config.patch("cpp.cxx", ("no-such-compiler",)):
        with pytest.raises(ConfigError, match=r"compile\.enable = true: torch\.compile needs a C\+\+ compiler such as g\+\+, and finds none"):
            choose(True, "", cpu, None)
        with pytest.raises(ConfigError, match="the run that is resumed was compiled"):
            choose(None, "", cpu, True)
        assert choose_compile(None, "", cpu, None, day).why == "torch.compile needs a C++ compiler such as g++, and finds none"


# [lora]

LORA = ("--lora.enable", "--lora.rank", "4")


def adapter_tensors(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.folder / "adapter/adapter_model.safetensors")


@shows("lora.enable")
def _(lab: Lab) -> None:
    assert not (lab.plain().folder / "adapter").exists()
    assert len(adapter_tensors(lab.plain(*LORA))) == 2 * 7 * 2  # A and B of seven layers in two blocks


@shows("lora.rank")
def _(lab: Lab) -> None:
    ranks = {tensor.shape[0] for name, tensor in adapter_tensors(lab.run("--lora.enable", "--lora.rank", "3")).items() if "lora_A" in name}
    assert ranks == {3}


@shows("lora.alpha")
def _(lab: Lab) -> None:
    lab.changes("loss", "--lora.alpha", "2", given=LORA)


@shows("lora.dropout")
def _(lab: Lab) -> None:
    lab.changes("loss", "--lora.dropout", "0.5", given=LORA)


@shows("lora.target_modules")
def _(lab: Lab) -> None:
    names = adapter_tensors(lab.run(*LORA, "--lora.target_modules", "q_proj", "v_proj"))
    assert {name.split(".")[-3] for name in names} == {"q_proj", "v_proj"}


@shows("lora.use_rslora")
def _(lab: Lab) -> None:
    lab.changes("loss", "--lora.use_rslora", given=LORA)


@shows("lora.use_dora")
def _(lab: Lab) -> None:
    assert any(name.endswith("lora_magnitude_vector") for name in adapter_tensors(lab.run(*LORA, "--lora.use_dora")))


@shows("lora.train_lm_head", "lora.train_embeddings")
def _(lab: Lab) -> None:
    names = adapter_tensors(lab.run(*LORA, "--lora.train_lm_head", "--lora.train_embeddings"))
    assert {name for name in names if "lora_" not in name} == {"base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"}


@shows("lora.quantize_base")
def _(lab: Lab) -> None:
    wide = ("--model.hidden_size", "64", "--model.num_key_value_heads", "4")
    lab.changes("loss", "--lora.quantize_base", "nf4", given=(*LORA, *wide))


@shows("lora.adapter_path")
def _(lab: Lab) -> None:
    lab.changes("loss", "--lora.adapter_path", str(lab.plain(*LORA).folder / "adapter"), given=LORA)


@shows("lora.save_adapter_weights_only")
def _(lab: Lab) -> None:
    bare = lab.bare()
    run = lab.train(bare, "--checkpoint.initial_load_path", str(lab.plain().folder / "export"), *LORA, "--lora.save_adapter_weights_only")
    assert (run.folder / "adapter").is_dir()
    assert not (run.folder / "export").exists()


# [metrics], [validation], [comm]


@shows("metrics.log_freq")
def _(lab: Lab) -> None:
    assert [row["step"] for row in lab.run("--metrics.log_freq", "2").rows()] == [2, 3]


@shows("profiling.enable_profiling", "profiling.profile_freq", "profiling.save_traces_folder")
def _(lab: Lab) -> None:
    run = lab.run("--profiling.enable_profiling", "--profiling.profile_freq", "2", "--profiling.save_traces_folder", "where")
    assert [path.name for path in (run.folder / "where").iterdir()] == ["step-2"]
    table = (run.folder / "where/step-2/where_time_went.txt").read_text()
    assert table.startswith("step 2: ")
    assert {line.split()[0] for line in table.splitlines()[1:]} == {"data", "forward", "backward", "optimizer", "rest"}
    assert table.splitlines()[1] in lab.read_output()
    with gzip.open(run.folder / "where/step-2/rank-0.json.gz") as trace:
        names = {event.get("name") for event in json.load(trace)["traceEvents"]}
    assert {"tunelib: forward", "tunelib: backward", "tunelib::document_attention"} <= names


@shows("profiling.enable_memory_snapshot")
def _(lab: Lab) -> None:
    with pytest.raises(ConfigError, match="snapshots are of a GPU's memory, and there is none here"):
        lab.run("--profiling.enable_profiling", "--profiling.enable_memory_snapshot")


@shows("metrics.enable_tensorboard", "metrics.save_tb_folder")
def _(lab: Lab) -> None:
    assert not (lab.plain().folder / "tb").exists()
    run = lab.run("--metrics.enable_tensorboard", "--metrics.save_tb_folder", "events/all")
    assert len(list((run.folder / "events/all").iterdir())) == 1


@shows("metrics.enable_wandb", "metrics.wandb_mode", "metrics.wandb_project", "metrics.wandb_name")
def _(lab: Lab) -> None:
    """What is in the rows there is shown in tests/integration/test_watch.py."""
    from unit.observe.readers import read_wandb

    assert not (lab.plain().folder / "wandb").exists()
    run = lab.run("--metrics.enable_wandb", "--metrics.wandb_mode", "offline", "--metrics.wandb_project", "village", "--metrics.wandb_name", "tiny")
    (found,) = read_wandb(run.folder)
    assert (found.project, found.name) == ("village", "tiny")


@shows("validation.enable", "validation.freq", "validation.path")
def _(lab: Lab) -> None:
    assert lab.plain().series("validation_loss") == []
    held_out = write_chats(lab.folder / "held_out.jsonl", 10, seed=3)
    run = lab.run("--validation.enable", "--validation.path", str(held_out), "--validation.freq", "1")
    assert [row["step"] for row in run.rows() if "validation_loss" in row] == [0, 1, 2, 3]
    assert len(lab.run("--validation.enable", "--validation.path", str(held_out)).series("validation_loss")) == 2


@shows("validation.fraction", "validation.prompts", "validation.max_new_tokens")
def _(lab: Lab) -> None:
    words = (
        "--validation.enable",
        "--validation.fraction",
        "0.2",
        "--validation.prompts",
        "say sage",
        "say kelp",
        "--validation.max_new_tokens",
        "3",
    )
    run = lab.run(*words)
    assert [(row["step"], row["prompt"]) for row in run.samples()] == [(0, "say sage"), (0, "say kelp"), (3, "say sage"), (3, "say kelp")]
    tokenizer = Tokenizer(TOKENIZER)
    assert all(len(tokenizer.encode(row["answer"], add_special_tokens=False).ids) <= 3 for row in run.samples())
    assert any(row["answer"] for row in run.samples())
    assert lab.run(*words[:2], "0.4").series("validation_loss")[0] != run.series("validation_loss")[0]


@shows("validation.tasks", "validation.task_path", "validation.task_limit", "validation.task_chat_template")
def _(lab: Lab) -> None:
    """That the figures are lm-eval's is shown in tests/parity/test_lm_eval.py."""
    held_out = ("--validation.enable", "--validation.fraction", "0.2")
    words = (*held_out, "--validation.tasks", "larkhaven_choice", "--validation.task_path", str(ROOT / "train_configs/tasks"))
    scored = lab.run(*words, "--validation.task_limit", "4")
    assert [row["step"] for row in scored.rows() if "tasks/larkhaven_choice/acc" in row] == [0, 3]
    assert all(score * 4 in range(5) for score in scored.series("tasks/larkhaven_choice/acc"))
    with pytest.raises(ConfigError, match="knows no task 'larkhaven_choice'"):
        lab.run(*words[:-2])
    asked: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "tunelib.infer.harness.Answers.log_likelihoods", lambda self, pairs: asked.extend(map(str, pairs)) or [(0.0, True)] * len(pairs)
        )
        lab.run(*words)
        assert len(asked) == 2 * 40 * 8
        assert "<|im_start|>" not in asked[0]
        lab.run(*words, "--validation.task_chat_template")
        assert "<|im_start|>user" in asked[-1]


@shows("comm.init_timeout_seconds", "comm.train_timeout_seconds")
def _(lab: Lab) -> None:
    """That a step which does not end is ended is shown in tests/integration/test_recovery.py."""
    from tunelib.config.schema import Comm, Training
    from tunelib.parallel.runtime import start
    from tunelib.parallel.watchdog import COLLECTIVES_LAST_LONGER, Watchdog

    def limit() -> float:
        return dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout.total_seconds() - COLLECTIVES_LAST_LONGER

    comm = Comm(init_timeout_seconds=77, train_timeout_seconds=33)
    with start(Training(mixed_precision_param="bfloat16"), comm) as runtime, Watchdog(comm, lab.folder, runtime) as watchdog:
        with watchdog.step(1, is_first=True):
            assert limit() == 77
        with watchdog.step(2, is_first=False):
            assert limit() == 33
        assert limit() == 77
        with watchdog.watch("a save"):
            assert limit() == 77
