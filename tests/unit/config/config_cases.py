"""Bad inputs by name: the files beside each other, the words of the command line, the number of processes."""

from dataclasses import dataclass, field

GOOD = """\
[model]
flavor = "smollm2-135m"
tokenizer_path = "tok"

[dataset]
path = "data.jsonl"

[training]
steps = 10
"""
"""The shortest config that passes; cases add to its end."""


@dataclass(frozen=True)
class Case:
    """``text`` is what run.toml holds; ``others`` are further files."""

    text: str | bytes
    words: tuple[str, ...] = ()
    others: dict[str, str] = field(default_factory=dict)
    world_size: int = 1
    file: str = "run.toml"


def add(lines: str, *words: str, **others: object) -> Case:
    return Case(GOOD + "\n" + lines + "\n", words, **others)  # type: ignore[arg-type]  # world_size, others


def replace(old: str, new: str, *words: str, **others: object) -> Case:
    assert old in GOOD
    return Case(GOOD.replace(old, new), words, **others)  # type: ignore[arg-type]  # world_size, others


def say(*words: str, **others: object) -> Case:
    return Case(GOOD, words, **others)  # type: ignore[arg-type]  # world_size, others


WEIGHTS = '[dataset]\npath = "d.jsonl"\n[training]\nsteps = 1\n[checkpoint]\ninitial_load_path = "weights"\n'
PIPELINE = ("--parallelism.pipeline_parallel_degree", "2")
SPLIT = ("--parallelism.pipeline_parallel_split_points",)
MIX = '[[dataset.mix]]\npath = "a.jsonl"\n'
TORCHTITAN_FILE = """\
[training]
batch_size = 2
tensor_parallel_degree = 1
dataset = "c4"
[experimental]
context_parallel_degree = 1
[checkpoint]
enable = true
async_mode = "disabled"
[lr_scheduler]
lr_min = 0.1
[optimizer]
fused = true
"""

CASES: dict[str, Case] = {
    # names
    "unknown key": replace("steps = 10", "step = 10"),
    "unknown key, nothing near": add("[metrics]\nxyzzy = 1"),
    "unknown key that is a table": add("[metrics.colour]\nred = 1"),
    "unknown section": replace("[training]", "[trainng]"),
    "unknown section, nothing near": add("[xyzzy]\na = 1"),
    "key in the wrong section": replace("steps = 10", "steps = 10\nlr = 3e-4"),
    "key that several sections have": add("[metrics]\npath = 'x'"),
    "key outside of every section": Case("steps = 5\n" + GOOD),
    "key outside of every section, misspelled": Case("stepps = 5\n" + GOOD),
    "key outside of every section, nothing near": Case("xyzzy = 5\n" + GOOD),
    "key with a dot in quotes": Case('"training.steps" = 5\n' + GOOD),
    "section of another section": add("[columns]\ntext = 'body'"),
    "section in a section, misspelled": add("[dataset.column]\ntext = 'body'"),
    "not a table": Case("training = 3"),
    "not a table, inside a section": add("[dataset.columns]\n[dataset.columns.text]\na = 1"),
    "list of tables": Case(GOOD.replace("[dataset]", "[[dataset]]")),
    "config file named in the file": add("[job]\nconfig_file = 'x.toml'"),
    # types
    "text for a number": add('[optimizer]\nlr = "3e-4"'),
    "word for a number": replace("steps = 10", 'steps = "ten"'),
    "text for a whole number": replace("steps = 10", 'steps = "10"'),
    "fraction for a whole number": replace("steps = 10", "steps = 5.5"),
    "float for a whole number": replace("steps = 10", "steps = 1e3"),
    "true for a whole number": replace("steps = 10", "steps = true"),
    "true for a number": add("[optimizer]\nlr = true"),
    "integer past 64 bits": replace("steps = 10", "steps = 9223372036854775808"),
    "integer past 64 bits for a float": add("[optimizer]\nlr = 9223372036854775808"),
    "integer with thousands of bits": replace("steps = 10", f"steps = 0x{'f' * 5000}"),
    "integer with thousands of digits": replace("steps = 10", f"steps = {'9' * 5000}"),
    "nan": add("[optimizer]\nlr = nan"),
    "infinity": add("[optimizer]\nlr = inf"),
    "text for true or false": add('[checkpoint]\nenable_checkpoint = "false"'),
    "number for true or false": add("[checkpoint]\nenable_checkpoint = 1"),
    "number for text": add("[job]\ndescription = 5"),
    "date for text": add("[job]\ndescription = 2026-01-01"),
    "text for a list": add('[validation]\nenable = true\nfraction = 0.1\nprompts = "Hello"'),
    "number in a list of texts": add('[validation]\nenable = true\nfraction = 0.1\nprompts = ["Hello", 3]'),
    "list for a number": replace("steps = 10", "steps = [10, [20]]"),
    "table for a number": Case(GOOD.replace("steps = 10", "steps = {a = 1}")),
    "bad choice": add('[checkpoint]\nenable_checkpoint = true\ninterval_type = "step"'),
    "bad choice, nothing near": add('[optimizer]\nname = "xyzzy"'),
    "number for a choice": add("[optimizer]\nname = 3"),
    "float16": replace("steps = 10", 'steps = 10\ndtype = "float16"\nmixed_precision_param = "fp16"'),
    "float16 under another name, where it is allowed": add("[checkpoint]\nexport_dtype = 'fp16'"),
    "path with a tilde": replace('"data.jsonl"', '"~/data.jsonl"'),
    "text with a zero byte": replace('"data.jsonl"', '"data\\u0000.jsonl"'),
    # bounds
    "negative seq_len": replace("steps = 10", "steps = 10\nseq_len = -4"),
    "batch 0": replace("steps = 10", "steps = 10\nglobal_batch_size = 0"),
    "local batch -2": replace("steps = 10", "steps = 10\nlocal_batch_size = -2"),
    "lr 0": add("[optimizer]\nlr = 0"),
    "share above 1": add("[validation]\nenable = true\nfraction = 1.5"),
    "beta 1": add("[optimizer]\nbeta1 = 1.0"),
    # the file itself
    "invalid syntax: value without quotes": replace("steps = 10", "steps = ten"),
    "invalid syntax: no equals sign": replace("steps = 10", "steps 10"),
    "invalid syntax: two on a line": replace("steps = 10", "steps = 10 seq_len = 5"),
    "invalid syntax: text without its end": replace('"data.jsonl"', '"data.jsonl'),
    "invalid syntax: backslashes": replace('"data.jsonl"', '"C:\\data.jsonl"'),
    "invalid syntax: open bracket at the end": Case(GOOD + "\n[validation]\nprompts = [\n"),
    "key given twice": add("seed = 1\nsteps = 11"),
    "section given twice": add("[model]\nhidden_size = 8"),
    "key given twice, once dotted": Case("training.steps = 1\ntraining.steps = 2\n"),
    "not UTF-8": Case(GOOD.encode() + b'[job]\ndescription = "caf\xe9"\n'),
    "nested too deeply": Case("a = " + "[" * 100_000 + "]" * 100_000),
    "missing config": say(file="runn.toml"),
    "missing config with a shipped name": say(file="debug_model.toml"),
    "missing config, nothing near": say(file="nowhere/x.toml"),
    "config that is a folder": say(file="train_configs"),
    "config with a zero byte in its name": say(file="a\0b.toml"),
    "missing base": Case('base = "bse.toml"\n' + GOOD, others={"base.toml": ""}),
    "base that is no text": Case("base = 3\n" + GOOD),
    "problem in the base and in the file": Case(
        'base = "base.toml"\n' + GOOD.replace("steps = 10", "step = 1"), ("--training.sed", "1"), {"base.toml": "[training]\nseq_len = 0\n"}
    ),
    "inheritance loop": Case('base = "a.toml"\n' + GOOD, others={"a.toml": 'base = "sub/b.toml"', "sub/b.toml": 'base = "../a.toml"'}),
    "base of itself": Case('base = "run.toml"\n' + GOOD),
    # the command line
    "misspelled flag": say("--training.stpes", "5"),
    "flag without a section": say("--lr", "5"),
    "flag of another section": say("--training.lr", "5"),
    "flag of no section": say("--xyzzy.lr=5"),
    "flag with a dash": say("--training.seq-len", "5"),
    "flag for a section": say("--training", "5"),
    "flag twice": say("--training.seed", "1", "--training.seed=2"),
    "flag twice, once in an older spelling": say("--training.warmup_steps", "1", "--lr_scheduler.warmup_steps", "2"),
    "config file twice": say("--job.config_file", "other.toml"),
    "flag without a value": say("--training.seed", "--training.seq_len"),
    "flag with two values": say("--job.description", "two words", "more"),
    "flag with one dash": say("-training.steps", "5"),
    "word before any flag": say("stray"),
    "fraction on the command line": say("--training.steps", "5.5"),
    "word on the command line": say("--training.steps=ten"),
    "true on the command line": say("--training.steps", "true"),
    "nan on the command line": say("--optimizer.lr", "nan"),
    "minus infinity on the command line": say("--optimizer.lr", "-inf"),
    "64 bits on the command line": say("--training.seed", "9223372036854775808"),
    "bounds on the command line": say("--training.local_batch_size", "-2"),
    "choice on the command line": say("--optimizer.name=adam"),
    "boolean on the command line": say("--training.deterministic", "yes"),
    "no-flag with a value": say("--training.no-deterministic", "true"),
    "bytes that are no text": say("--job.description", "caf\udce9"),
    # eras and what is not built
    "older spellings in a file": Case(GOOD.partition("[training]")[0] + TORCHTITAN_FILE),
    "no counterpart on the command line": say("--model.name", "llama3", "--optimizer.implementation=fused"),
    "not built: sections": add("[lora]\nrank = 8\n[float8]\nenable = true\n[activation_checkpoint]\nmode = 'full'\n[profiling]\nprofile_freq = 1"),
    "not built: checkpoint keys": add("[checkpoint]\nenable_checkpoint = true\nasync_mode = 'async'\nexclude_from_loading = ['optimizer']"),
    # watching
    "keys of a sink that is off": add("[metrics]\nsave_tb_folder = 'events'\nwandb_name = 'x'\nwandb_mode = 'offline'"),
    "mode of W&B that is none": add("[metrics]\nenable_wandb = true\nwandb_mode = 'disabled'"),
    "TensorBoard's folder outside of the run's": add("[metrics]\nenable_tensorboard = true\nsave_tb_folder = '../tb'"),
    "TensorBoard's folder that is taken": add("[metrics]\nenable_tensorboard = true\nsave_tb_folder = 'export'"),
    "TensorBoard's folder that checkpoints have": add("[checkpoint]\nenable_checkpoint = true\nfolder = 'tb'\n[metrics]\nenable_tensorboard = true"),
    "degrees of older spelling that do not fit": say("--experimental.pipeline_parallel_degree", "3", world_size=2),
    "too few micro-batches": say(*PIPELINE, "--training.local_batch_size", "8", world_size=2),
    "micro-batches that do not go round": say(
        "--parallelism.pipeline_parallel_degree=4",
        "--parallelism.pipeline_parallel_schedule",
        "Interleaved1F1B",
        "--training.global_batch_size",
        "11",
        world_size=4,
    ),
    "schedule without a pipeline": say("--parallelism.pipeline_parallel_schedule", "GPipe"),
    "schedule that does not exist": say(*PIPELINE, "--parallelism.pipeline_parallel_schedule", "1F1", world_size=2),
    "stages that begin nowhere": say(*PIPELINE, *SPLIT, "layer.4", world_size=2),
    "stages out of order": say(*PIPELINE, *SPLIT, "layers.4", "layers.2", "layers.3", world_size=2),
    "one stage too many": say(*PIPELINE, *SPLIT, "layers.2", "layers.4", world_size=2),
    "stages for both ends": say(*PIPELINE, *SPLIT, "layers.4", "--parallelism.pipeline_parallel_schedule=DualPipeV", world_size=2),
    "stages that cannot be dealt out": say(
        *PIPELINE, *SPLIT, "layers.2", "layers.4", "--parallelism.pipeline_parallel_schedule=LoopedBFS", world_size=2
    ),
    "what two backward passes rule out": say(
        *PIPELINE,
        "--parallelism.pipeline_parallel_schedule=ZBVZeroBubble",
        "--parallelism.fsdp_reshard_after_forward",
        "always",
        "--activation_checkpoint.mode=selective",
        "--compile.enable",
        world_size=2,
    ),
    "compiled, and operators kept": add("[activation_checkpoint]\nmode = 'selective'\n[compile]\nenable = true"),
    "compile what": add("[compile]\nenable = 'yes'"),
    "overlap without a compiler": say("--parallelism.tensor_parallel_degree=2", "--parallelism.enable_async_tensor_parallel", world_size=2),
    "overlap without split products": say("--parallelism.enable_async_tensor_parallel", "--compile.enable"),
    "degrees beyond the processes": say("--parallelism.data_parallel_replicate_degree=2", "--parallelism.context_parallel_degree", "2", world_size=2),
    "degrees that do not divide": say("--parallelism.data_parallel_replicate_degree=3", world_size=4),
    "degrees with a wrong rest": say(
        "--parallelism.data_parallel_shard_degree=4", "--parallelism.context_parallel_degree", "2", "--training.global_batch_size", "8", world_size=4
    ),
    "rows of a stream cut": Case(
        GOOD.replace('path = "data.jsonl"', 'hub = "a/b"\nstreaming = true'), ("--parallelism.context_parallel_degree", "2"), world_size=2
    ),
    "not built: a flag": say("--lora.rank", "8", "--checkpoint.async_mode", "async"),
    "recompute what": add("[activation_checkpoint]\nmode = 'selective'\nselective_ac_option = 'some'"),
    "recompute none of what": add("[activation_checkpoint]\nselective_ac_option = '2'"),
    # adapters
    "adapter sizes": add("[lora]\nenable = true\nrank = 0\nalpha = -1.0\ndropout = 1.5"),
    "adapter modules": add("[lora]\nenable = true\ntarget_modules = 3"),
    "no adapter modules": add("[lora]\nenable = true\ntarget_modules = []"),
    "kind of quantisation": add('[lora]\nenable = true\nquantize_base = "int4"\nuse_dora = "yes"'),
    "adapter keys without adapters": add("[lora]\nrank = 8\nuse_dora = true\nquantize_base = 'nf4'"),
    # relations
    "neither steps nor epochs": replace("steps = 10", "seed = 1"),
    "steps and epochs": replace("steps = 10", "steps = 10\nepochs = 1"),
    "steps and epochs on the command line": say("--training.steps", "1", "--training.epochs", "1"),
    # lists of tables
    "mix: unknown key and bad value": replace('path = "data.jsonl"', MIX + 'wieght = 1\nrepeats = -1\n[dataset.mix.colums]\ntext = "t"'),
    "mix: key without effect": replace('path = "data.jsonl"', MIX + 'split = "test"\nformat = "text"\ncolumns = {messages = "m"}'),
    "mix: path and hub, weight and repeats": replace('path = "data.jsonl"', MIX + 'hub = "a/b"\nweight = 1\nrepeats = 2'),
    "mix: some weights": replace('path = "data.jsonl"', MIX + 'weight = 1\n[[dataset.mix]]\nhub = "a/b"\n[[dataset.mix]]\npath = "c"\nrepeats = 2'),
    "mix: no source": replace('path = "data.jsonl"', '[[dataset.mix]]\nformat = "text"'),
    "mix: broken keys of a table judge nothing": replace(
        'path = "data.jsonl"', MIX + '[[dataset.mix]]\nhub = 5\nsubset = "x"\n[[dataset.mix]]\nhbu = "a/b"\nsplit = "test"'
    ),
    "mix: faults of later tables": replace('path = "data.jsonl"', MIX + "[[dataset.mix]]\nweight = 1\n\n[[dataset.mix]]\nrepeats = 2"),
    "mix: faults of inline tables": replace('path = "data.jsonl"', "mix = [\n  {path = 'a'},\n  {weight = 1},\n  {},\n]"),
    "mix: format, columns and parts of a Hub data set beside it": replace(
        'path = "data.jsonl"', 'format = "text"\ncolumns = {text = "body"}\nsubset = "x"\nsplit = "test"\nrevision = "main"\n' + MIX
    ),
    "mix: format and columns above it": replace(
        'path = "data.jsonl"', MIX, "--dataset.format", "text", "--dataset.columns.text", "body", "--dataset.split=test"
    ),
    "mix: format between it and its base": Case(
        'base = "base.toml"\n[dataset]\nformat = "chat"\n', others={"base.toml": GOOD.replace('path = "data.jsonl"', MIX)}
    ),
    "mix: a source beside it": replace('path = "data.jsonl"', 'path = "data.jsonl"\nmix = [{path = "x"}]'),
    "mix: not tables": replace('path = "data.jsonl"', 'mix = ["a.jsonl"]'),
    "mix: one table": replace('path = "data.jsonl"', '[dataset.mix]\npath = "a"'),
    "mix: on the command line": say("--dataset.mix", "a.jsonl", "--dataset.mix.0.weight", "2"),
    "hub: parts of none": say("--dataset.split", "test", "--dataset.revision", "main", "--dataset.streaming", "true"),
    "hub: streaming for epochs": Case(
        GOOD.replace('path = "data.jsonl"', 'hub = "a/b"\nstreaming = true').replace("steps = 10", "epochs = 1"), ("--dataset.last_batch", "drop")
    ),
    "hub: dropped, and a part of it asked for above": Case(
        'base = "base.toml"\n[dataset]\npath = "d.jsonl"\nsubset = "x"\n',
        ("--dataset.streaming",),
        {"base.toml": GOOD.replace('path = "data.jsonl"', 'hub = "a/b"\nrevision = "main"')},
    ),
    "hub: checkpoints by epochs of a stream": Case(
        GOOD.replace('path = "data.jsonl"', 'hub = "a/b"\nstreaming = true') + '[checkpoint]\nenable_checkpoint = true\ninterval_type = "epochs"\n'
    ),
    "hub: checkpoints by epochs, of a stream on the command line": Case(
        GOOD.replace('path = "data.jsonl"', 'hub = "a/b"') + '[checkpoint]\nenable_checkpoint = true\ninterval_type = "epochs"\n',
        ("--dataset.streaming",),
    ),
    "hub: validation without documents": Case(GOOD.replace('path = "data.jsonl"', 'hub = "a/b"'), ("--validation.enable",)),
    "hub: validation without documents, of a stream": Case(
        GOOD.replace('path = "data.jsonl"', 'hub = "a/b"\nstreaming = true'), ("--validation.enable",)
    ),
    "hub: held-out split dropped with it": Case(
        GOOD.replace('path = "data.jsonl"', 'hub = "a/b"') + '[validation]\nenable = true\nsplit = "test"\n', ("--dataset.path", "d.jsonl")
    ),
    "hub: held-out split of none": add("[validation]\nenable = true\nsplit = 'test'"),
    "no data": replace('path = "data.jsonl"', ""),
    "no data for the tokens to add": replace(
        'path = "data.jsonl"', "", "--checkpoint.enable_checkpoint", "--checkpoint.create_seed_checkpoint", "--model.resize_embeddings"
    ),
    "validation without documents": add("[validation]\nenable = true"),
    "validation path and fraction": add("[validation]\nenable = true\npath = 'v.jsonl'\nfraction = 0.1"),
    "batch does not divide": say("--training.local_batch_size", "3", world_size=2),
    "batch does not divide, local batch too large": say("--training.local_batch_size", "16"),
    "batch does not divide over processes": say("--training.global_batch_size=9", world_size=4),
    "degrees do not multiply": say("--parallelism.data_parallel_shard_degree", "4", world_size=2),
    "degrees do not multiply on one process": say("--parallelism.data_parallel_shard_degree", "4"),
    "no model": Case('[dataset]\npath = "d"\n[training]\nsteps = 1\n[model]\ntokenizer_path = "t"\n'),
    "half a model": replace('flavor = "smollm2-135m"', "hidden_size = 8\nnum_hidden_layers = 2"),
    "unknown size": replace("smollm2-135m", "smollm2-135"),
    "unknown size, nothing near": replace("smollm2-135m", "8B"),
    "heads do not divide": add("", "--model.num_attention_heads", "7"),
    "kv heads do not divide": add("", "--model.num_key_value_heads", "2"),
    "odd head": add("", "--model.head_dim", "7"),
    "no tokenizer": replace('tokenizer_path = "tok"', ""),
    "rows longer than the model's context": replace("steps = 10", "steps = 10\nseq_len = 10000"),
    "model beside weights": Case(WEIGHTS + '[model]\nflavor = "smollm2-135m"\nhidden_size = 8\n'),
    "weights that do not say what they are": Case(WEIGHTS, others={"weights/.metadata": ""}),
    "weights that the run would replace": Case(
        WEIGHTS.replace('"weights"', '"outputs/x/export"') + '[job]\ndump_folder = "outputs/x"\n', others={"outputs/x/export/config.json": "{}"}
    ),
    "weights of another architecture": Case(
        WEIGHTS, others={"weights/config.json": '{"architectures": ["MambaForCausalLM"], "max_position_embeddings": 512}'}
    ),
    "weights with a broken config": Case(WEIGHTS, others={"weights/config.json": '{"architectures": '}),
    "weights with a config that is a list": Case(WEIGHTS, others={"weights/config.json": "[]"}),
    "weights with a config that names nothing": Case(WEIGHTS, others={"weights/config.json": "{}"}),
    "no folder for checkpoints": add('[checkpoint]\nenable_checkpoint = true\nfolder = ""'),
    # no effect
    "idle: checkpoint": add("[checkpoint]\ninterval = 5\nkeep_latest_k = 2"),
    "idle: seed checkpoint": say("--checkpoint.create_seed_checkpoint"),
    "idle: load_step": add("[checkpoint]\nenable_checkpoint = true\nresume = 'never'\nload_step = 5"),
    "idle: validation, switched off in the same file": add("[validation]\nenable = false\nfreq = 5"),
    "idle: on the command line, switched off in the file": add("[validation]\nenable = false", "--validation.freq", "5"),
    "idle: patience without validation": add("[validation]\npatience = 3"),
    "patience and weights alone": add(
        "[checkpoint]\nenable_checkpoint = true\nmodel_weights_only = true\n[validation]\nenable = true\nfraction = 0.1\npatience = 3"
    ),
    "patience of no validations": add("[validation]\nenable = true\nfraction = 0.1\npatience = 0"),
    "idle: folder of tasks, but no task": add("[validation]\nenable = true\nfraction = 0.1\ntask_path = 'tasks'\ntask_chat_template = true"),
    "idle: best weights of none that is kept": add(
        "[checkpoint]\nenable_checkpoint = true\nload_best_at_end = true\n[validation]\nenable = true\nfraction = 0.1"
    ),
    "idle: best weights without checkpoints": add("[checkpoint]\nload_best_at_end = true"),
    "idle: max_new_tokens": add("[validation]\nenable = true\nfraction = 0.1\nmax_new_tokens = 5"),
    "idle: optimizer": add("[optimizer]\nname = 'SGD'\nbeta1 = 0.5"),
    "8 bits: columns": add('[optimizer]\nname = "AdamW8bit"\n[parallelism]\ntensor_parallel_degree = 2', world_size=2),
    "8 bits: offloaded": add('[optimizer]\nname = "AdamW8bit"', "--training.enable_cpu_offload", "true"),
    "8 bits: float64": add('[optimizer]\nname = "AdamW8bit"', "--training.dtype", "float64"),
    "idle: momentum": add("[optimizer]\nmomentum = 0.5"),
    "idle: schedule": add("[lr_scheduler]\nmin_lr_factor = 0.1"),
    "idle: rope scaling": add("[model.rope_scaling]\nfactor = 2.0"),
    "idle: columns": replace('"data.jsonl"', '"data.jsonl"\nformat = "instruct"\ncolumns = {messages = "m", text = "t", output = "o"}'),
    "idle: train_on": replace('"data.jsonl"', '"data.jsonl"\nformat = "text"\ntrain_on = "all"'),
    # many at once
    "everything at once": Case(
        GOOD.replace("steps = 10", 'step = 10\nlr = 1\nseq_len = "9"') + "[lora]\nrank = 1\n[checkpoint]\ninterval = 5\n",
        ("--training.stpes", "5", "--optimizer.lr=fast", "--validation.enable"),
    ),
}
