"""torchtune's recipe configs: written here, with the keys that those have."""

from pathlib import Path

import pytest

from tunelib.config.foreign import Imported, import_config
from tunelib.config.load import load_config
from tunelib.config.schema import Config
from tunelib.errors import ConfigError

FULL = """\
# To launch on 2 devices:
#   tune run --nnodes 1 --nproc_per_node 2 full_finetune_distributed --config mine
output_dir: /runs/full
tokenizer:
  _component_: torchtune.models.llama2.llama2_tokenizer
  path: /models/Llama-2-7b-hf/tokenizer.model
  max_seq_len: null
dataset:
  _component_: torchtune.datasets.alpaca_dataset
  packed: False
seed: null
shuffle: True
model:
  _component_: torchtune.models.llama2.llama2_7b
checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: /models/Llama-2-7b-hf
  checkpoint_files: [a.bin, b.bin]
  recipe_checkpoint: null
  output_dir: ${output_dir}
  model_type: LLAMA2
resume_from_checkpoint: False
batch_size: 2
epochs: 3
optimizer:
  _component_: torch.optim.AdamW
  fused: True
  lr: 2e-5
optimizer_in_bwd: False
loss:
  _component_: torchtune.modules.loss.CEWithChunkedOutputLoss
max_steps_per_epoch: null
gradient_accumulation_steps: 4
clip_grad_norm: null
compile: False
device: cuda
enable_activation_checkpointing: True
enable_activation_offloading: False
dtype: bf16
metric_logger:
  _component_: torchtune.training.metric_logging.DiskLogger
  log_dir: ${output_dir}/logs
log_every_n_steps: 5
profiler:
  _component_: torchtune.training.setup_torch_profiler
  enabled: False
  output_dir: ${output_dir}/profile
"""
LORA = FULL.replace(
    "torchtune.models.llama2.llama2_7b\n",
    """torchtune.models.llama3_1.lora_llama3_1_8b
  lora_attn_modules: ['q_proj', 'k_proj', 'output_proj']
  apply_lora_to_mlp: True
  apply_lora_to_output: False
  lora_rank: 8
  lora_alpha: 16
  lora_dropout: 0.05
save_adapter_weights_only: True
lr_scheduler:
  _component_: torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup
  num_warmup_steps: 100
""",
).replace("llama2.llama2_tokenizer", "llama3.llama3_tokenizer")
DATA = "  _component_: torchtune.datasets.alpaca_dataset\n  packed: False\n"


def read(text: str, folder: Path, *overrides: str, **others: int) -> tuple[Imported, Config]:
    """The import of a file of this text, and the config that it gives."""
    (folder / "recipe.yaml").write_text(text)
    imported = import_config(str(folder / "recipe.yaml"), overrides, **others)
    assert imported.problems == ()
    (folder / "ours.toml").write_text(imported.text)
    return imported, load_config([str(folder / "ours.toml")], world_size=imported.translation.world_size).config


@pytest.mark.parametrize("text", [FULL, LORA], ids=["full", "lora"])
def test_every_key_ends_in_a_line_or_among_what_is_left_out(text: str, tmp_path: Path) -> None:
    imported, _ = read(text, tmp_path)
    for key in imported.translation.source.values:
        assert f"{key} = " in imported.text, key
    body, _, _ = imported.text.partition("\n# What ")
    assert all("  # " in line for line in body.splitlines() if " = " in line)


def test_full_recipe(tmp_path: Path) -> None:
    imported, config = read(FULL, tmp_path)
    assert imported.translation.world_size == 2
    assert (config.training.local_batch_size, config.training.global_batch_size, config.training.epochs) == (2, 16, 3)
    assert (config.training.dtype, config.training.max_norm, config.training.seq_len) == ("bfloat16", 1e9, 2048)
    assert (config.optimizer.lr, config.optimizer.weight_decay, config.optimizer.beta2) == (2e-5, 0.01, 0.999)
    assert (config.dataset.hub, config.dataset.train_on, config.dataset.packing, config.dataset.chat_template) == (
        "tatsu-lab/alpaca",
        "all",
        False,
        "llama2",
    )
    assert (config.checkpoint.initial_load_path, config.model.tokenizer_path) == ("/models/Llama-2-7b-hf", "")
    assert (config.checkpoint.enable_checkpoint, config.checkpoint.interval, config.checkpoint.interval_type) == (True, 1, "epochs")
    assert (config.activation_checkpoint.mode, config.compile.enable, config.metrics.log_freq) == ("full", False, 5)
    assert (config.lora.enable, config.lr_scheduler.decay_type, config.job.dump_folder) == (False, "constant", "/runs/full")
    assert imported.translation.lost == {}


def test_lora_recipe(tmp_path: Path) -> None:
    _, config = read(LORA, tmp_path)
    assert config.lora.target_modules == ("q_proj", "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout, config.lora.quantize_base) == (8, 16.0, 0.05, "none")
    assert (config.lora.save_adapter_weights_only, config.dataset.chat_template) == (True, "llama3")
    assert (config.lr_scheduler.warmup_steps, config.lr_scheduler.decay_type) == (100, "cosine")


def test_qlora_and_dora(tmp_path: Path) -> None:
    _, config = read(LORA.replace(".lora_llama", ".qlora_llama"), tmp_path, "model.use_dora=True")
    assert (config.lora.quantize_base, config.lora.use_dora) == ("nf4", True)
    assert read(LORA, tmp_path, "model.quantize_base=True")[1].lora.quantize_base == "nf4"
    imported, _ = read(LORA, tmp_path, "model.apply_lora_to_output=True")
    assert list(imported.translation.lost.values()) == ["the head gets no adapter; lora.train_lm_head trains it in full"]


@pytest.mark.parametrize(
    ("component", "name", "others"),
    [
        ("bitsandbytes.optim.PagedAdamW8bit", "AdamW8bit", {"weight_decay": 0.01, "beta2": 0.999}),
        ("bitsandbytes.optim.PagedAdamW", "AdamW", {"weight_decay": 0.01}),
        ("torchao.optim.AdamW8bit", "AdamW8bit", {}),
        ("torch.optim.SGD", "SGD", {"weight_decay": 0.0, "momentum": 0.0}),
        ("torch.optim.Adam", "AdamW", {"weight_decay": 0.0}),
    ],
)
def test_optimizers(component: str, name: str, others: dict[str, float], tmp_path: Path) -> None:
    _, config = read(FULL, tmp_path, f"optimizer={component}")
    assert config.optimizer.name == name
    assert {key: getattr(config.optimizer, key) for key in others} == others


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ("instruct_dataset\n  source: me/data\n  column_map: {input: q, output: a}", {"format": "prompt_completion", "hub": "me/data"}),
        ("chat_dataset\n  source: json\n  data_files: my.json\n  conversation_column: talk\n  conversation_style: sharegpt", {"path": "my.json"}),
        ("text_completion_dataset\n  source: text\n  data_files: 'b*.txt'\n  packed: True", {"format": "text", "packing": True, "too_long": "auto"}),
        ("text_completion_dataset\n  source: me/books\n  column: body", {"format": "text", "too_long": "truncate", "hub": "me/books"}),
        ("alpaca_cleaned_dataset\n  train_on_input: False\n  split: train[:5%]", {"hub": "yahma/alpaca-cleaned", "train_on": "assistant"}),
        ("cnn_dailymail_articles_dataset", {"subset": "3.0.0", "format": "text"}),
    ],
)
def test_data_sets(dataset: str, expected: dict[str, object], tmp_path: Path) -> None:
    imported, config = read(FULL.replace(DATA, f"  _component_: torchtune.datasets.{dataset}\n"), tmp_path)
    assert {key: getattr(config.dataset, key) for key in expected} == expected
    columns = config.dataset.columns
    if "instruct" in dataset:
        assert (columns.prompt, columns.completion, config.dataset.train_on) == ("q", "a", "assistant")
    if "chat" in dataset:
        assert columns.messages == "talk"
    assert [reason for what, reason in imported.translation.lost.items() if what.startswith("dataset.")] == [
        reason
        for word, reason in {
            "conversation_style": "the layout of messages is seen from the rows",
            "train[": "a split is taken whole; take rows out of a file of your own",
        }.items()
        if word in dataset
    ]


def test_several_data_sets_become_a_mix(tmp_path: Path) -> None:
    several = "dataset:\n  - _component_: torchtune.datasets.alpaca_dataset\n  - _component_: torchtune.datasets.samsum_dataset\n"
    _, config = read(FULL.replace(f"dataset:\n{DATA}", several), tmp_path)
    assert [(source.hub, source.format) for source in config.dataset.mix] == [
        ("tatsu-lab/alpaca", "instruct"),
        ("Samsung/samsum", "prompt_completion"),
    ]
    assert config.dataset.mix[1].columns.prompt == "dialogue"


def test_words_of_the_command_line_go_before_the_file(tmp_path: Path) -> None:
    words = ("batch_size=8", "epochs=1", "max_steps_per_epoch=20", "~loss", "compile=true", "clip_grad_norm=1.0", "output_dir=/other")
    imported, config = read(FULL, tmp_path, *words, ngpu=4)
    assert (config.training.local_batch_size, config.training.global_batch_size, config.training.steps) == (8, 128, 20)
    assert (config.compile.enable, config.training.max_norm, config.job.dump_folder) == (True, 1.0, "/other")
    assert not any(key.startswith("loss") for key in imported.translation.source.values)


def test_what_is_on_and_not_built_is_told(tmp_path: Path) -> None:
    words = ("optimizer_in_bwd=true", "enable_activation_offloading=true", "shuffle=false", "resume_from_checkpoint=true")
    imported, _ = read(FULL, tmp_path, *words)
    assert [what.partition(" = ")[0] for what in imported.translation.lost] == [
        "shuffle",
        "resume_from_checkpoint",
        "optimizer_in_bwd",
        "enable_activation_offloading",
    ]


def test_value_that_cannot_be_read_does_not_pass(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(FULL)
    imported = import_config(str(tmp_path / "recipe.yaml"), ("optimizer.lr=fast",))
    assert imported.problems == (f'{tmp_path / "recipe.yaml"}: optimizer.lr = "fast": expected a number',)


def test_unknown_key_of_the_model_is_left_out_and_said(tmp_path: Path) -> None:
    imported, _ = read(FULL, tmp_path, "model.lora_rnk=9")
    assert imported.translation.lost["model.lora_rnk = 9"] == "no parameter of torchtune's models that is known here"


def test_seed_that_is_drawn_is_said_to_be_another_here(tmp_path: Path) -> None:
    imported, config = read(FULL, tmp_path)
    assert config.training.seed == 0
    assert "here training.seed is 0" in imported.translation.needless["seed = null"]


def test_what_another_key_stands_for_keeps_its_type(tmp_path: Path) -> None:
    words = ("rows=4", "is_packed=false", "batch_size=${rows}", "dataset.packed=${is_packed}")
    _, config = read(FULL, tmp_path, *words)
    assert config.training.local_batch_size == 4
    assert not config.dataset.packing


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("optimizer:\n", "other:\n"), "is no recipe of torchtune: it lacks optimizer._component_"),
        (("modules.loss.CEWithChunkedOutputLoss", "rlhf.loss.DPOLoss"), "this recipe is preference training"),
        (("seed: null", "teacher_model: {_component_: x.y}"), r"this recipe distils a teacher into a student \('teacher_model'\)"),
        (("llama2.llama2_7b", "t5.t5_v1_1_xxl_encoder"), "tunelib trains .*LlamaForCausalLM.*, and this is none of them"),
        (("alpaca_dataset", "hh_rlhf_helpful_dataset"), 'the data set "hh_rlhf_helpful_dataset" has no counterpart here'),
        (("batch_size: 2", "batch_size: two"), 'batch_size = "two": expected a whole number of at least 1'),
        (("output_dir: ${output_dir}", "output_dir: ${runs}"), r"checkpointer\.output_dir = .* runs is no key of the file"),
        (("output_dir: /runs/full", "output_dir: ${output_dir}"), "output_dir stands for itself"),
        (("  checkpoint_dir: /models/Llama-2-7b-hf\n", ""), r"there is no checkpointer\.checkpoint_dir"),
    ],
)
def test_what_cannot_be_imported_is_said(change: tuple[str, str], message: str, tmp_path: Path) -> None:
    assert change[0] in FULL
    with pytest.raises(ConfigError, match=message):
        read(FULL.replace(*change), tmp_path)
