"""Every setting of tunelib: one frozen dataclass per TOML section, each field's docstring being its help.

A field's docstring is shown by ``--help`` and in ``docs/config.md``. Defaults live here and nowhere else. ``Bounds`` says in
the type what a number may be and ``IsPath`` which text is a path; relations between fields are in ``check.py`` and ``effect.py``.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal


@dataclass(frozen=True)
class Bounds:
    """The values a number may have: ``minimum <= value <= maximum``, or one of ``also``."""

    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    """An exclusive lower bound."""
    also: tuple[float, ...] = ()
    """Single values allowed besides, such as -1 for "work it out"."""


@dataclass(frozen=True)
class IsPath:
    """Marks text that names a file or folder relative to the current directory; the resolved TOML holds it absolute."""

    suffix: str = ""
    """Only text with this ending is a path; other text is a name."""


@dataclass(frozen=True)
class OneOrMore:
    """Marks a list of texts that may also be written as one text."""


Path = Annotated[str, IsPath()]
Count = Annotated[int, Bounds(minimum=1)]
CountOrAuto = Annotated[int, Bounds(minimum=1, also=(-1,))]
NonNegativeInt = Annotated[int, Bounds(minimum=0)]
NonNegative = Annotated[float, Bounds(minimum=0)]
Positive = Annotated[float, Bounds(above=0)]
Fraction = Annotated[float, Bounds(minimum=0, maximum=1)]
OpenFraction = Annotated[float, Bounds(above=0, maximum=0.999999)]

Dtype = Literal["auto", "float32", "bfloat16", "float64"]


@dataclass(frozen=True)
class Job:
    """The run as a whole."""

    config_file: Path = ""
    """The TOML file to run; given on the command line, never in a file."""
    dump_folder: Path = ""
    """The run folder, where everything the run writes goes. Empty: ./outputs/<name of the config file>."""
    description: str = ""
    """A line for people, shown when the run starts."""


@dataclass(frozen=True)
class RopeScaling:
    """Stretching of the rotary position embedding, with Hugging Face's own names."""

    rope_type: Literal["default", "llama3"] = "default"
    """"default": the flavor's own scaling, none without a flavor. "llama3": the wavelength-dependent scaling of Llama 3.1 and later."""
    factor: Positive = 8.0
    """How much slower the slowest rotations become: 8 for Llama 3.1 and 3.3, 32 for Llama 3.2."""
    low_freq_factor: Positive = 1.0
    """Wavelengths longer than the original context divided by this are scaled in full."""
    high_freq_factor: Positive = 4.0
    """Wavelengths shorter than the original context divided by this are kept."""
    original_max_position_embeddings: Count = 8192
    """Context length, in tokens, that the model had before scaling."""


@dataclass(frozen=True)
class Model:
    """The architecture, where no config.json is loaded: a named size, Hugging Face's own field names, or a size with some
    fields replaced. The tokenizer may always be named."""

    flavor: str = ""
    """A named size, such as "llama3.2-1b" or "smollm2-135m"."""
    tokenizer_path: Path = ""
    """Folder with the tokenizer files. Empty: the folder of the weights."""
    resize_embeddings: bool = False
    """Add the special tokens of the chat template that the tokenizer lacks, and rows for them to the embedding and the head."""
    vocab_size: Count | None = None
    """Rows of the embedding. Unset without a flavor: the tokenizer's size, rounded up to a multiple of 2."""
    hidden_size: Count | None = None
    """Width of the residual stream."""
    intermediate_size: Count | None = None
    """Width inside the feed-forward block."""
    num_hidden_layers: Count | None = None
    """Number of decoder layers."""
    num_attention_heads: Count | None = None
    """Number of query heads."""
    num_key_value_heads: Count | None = None
    """Number of key and value heads. Unset: as many as query heads."""
    head_dim: Count | None = None
    """Width of one head. Unset: hidden_size / num_attention_heads."""
    max_position_embeddings: Count | None = None
    """Longest context, in tokens, that the model says it can take. Unset without a flavor: training.seq_len."""
    rms_norm_eps: Positive | None = None
    """Added to the mean square inside RMSNorm. Unset without a flavor: 1e-5."""
    rope_theta: Positive | None = None
    """Base of the rotary frequencies. Unset without a flavor: 10000."""
    tie_word_embeddings: bool | None = None
    """Use the embedding's weight as the head's. Unset without a flavor: false."""
    initializer_range: Positive | None = None
    """Standard deviation of freshly drawn weights. Unset without a flavor: 0.02."""
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)


@dataclass(frozen=True)
class Columns:
    """Names of the columns in the data."""

    messages: str = "messages"
    """Chat: a list of {"role", "content"} or {"from", "value"}. Where there is no column "messages", "conversations" is read."""
    tools: str = "tools"
    """Chat and prompt_completion: the tools that the template is to describe, as a list or as JSON text; may be missing or empty."""
    system: str = "system"
    """Chat, prompt_completion and instruct: a system prompt put before the messages; may be missing or empty."""
    prompt: str = "prompt"
    """Prompt_completion: what is asked, as text or as messages."""
    completion: str = "completion"
    """Prompt_completion: the answer, as text or as messages."""
    instruction: str = "instruction"
    """Instruct: what is asked."""
    input: str = "input"
    """Instruct: the material it is asked about; may be missing or empty."""
    output: str = "output"
    """Instruct: the answer."""
    text: str = "text"
    """Text: the document."""
    input_ids: str = "input_ids"
    """Tokens: the token ids of a document."""
    labels: str = "labels"
    """Tokens: the ids again, -100 where a token is not trained; not shifted; may be missing."""
    mask: str = "loss_mask"
    """Tokens: 1 for each token that is trained, else 0; instead of labels; may be missing, and then all are trained."""


FORMAT_COLUMNS = {
    "chat": ("messages", "tools", "system"),
    "prompt_completion": ("prompt", "completion", "tools", "system"),
    "instruct": ("instruction", "input", "output", "system"),
    "text": ("text",),
    "tokens": ("input_ids", "labels", "mask"),
}
"""Format → the columns that it reads."""


@dataclass(frozen=True)
class Source:
    """Where documents come from, and how a row is read."""

    path: Path = ""
    """A file (.jsonl, .json, .parquet, .csv, .tsv, .txt or .md, each also as .gz or .zst), a folder of such files, or a pattern with
    * or **."""
    hub: str = ""
    """A data set on the Hugging Face Hub, "owner/name", instead of path."""
    subset: str = ""
    """Which configuration of the Hub data set; empty where it has one."""
    split: str = "train"
    """Which split of the Hub data set."""
    revision: str = ""
    """Branch, tag or commit of the Hub data set. Empty: the newest."""
    format: Literal["auto", "chat", "prompt_completion", "instruct", "text", "tokens"] = "auto"
    """How a row is read. "auto" looks at the columns of the first row and says what it found."""
    columns: Columns = field(default_factory=Columns)


@dataclass(frozen=True)
class MixedSource(Source):
    """One of several sources that are trained on together. Give all a weight, or none; [dataset] then has no source of its own."""

    weight: Positive | None = None
    """Share of the tokens that come from this source, relative to the other weights. An epoch has as many tokens as the sources together."""
    repeats: Positive | None = None
    """How often an epoch sees each of its documents; 0.5 takes one half in one epoch, the other in the next. Unset, without weights: 1."""


@dataclass(frozen=True)
class Dataset(Source):
    """What is trained on: one source (path or hub), or several (mix)."""

    mix: tuple[MixedSource, ...] = ()
    """Several sources, each a table [[dataset.mix]]."""
    streaming: bool = False
    """Read the Hub data set while training instead of beforehand. The order then depends on the number of processes."""
    chat_template: Annotated[str, IsPath(suffix=".jinja")] = ""
    """A named template ("chatml", "llama2", "llama3"), a file ending in .jinja, or "none": prompts and completions are joined as they
    are. Empty: the tokenizer folder's own."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Which tokens of a conversation are trained: the answers with their end-of-turn token, the last answer, or all. Text is always
    trained whole; a message's own "train" or "weight" goes before."""
    parse_special_tokens: bool = False
    """Read special tokens that are written in the data as such, for text that a template was applied to already. false: they are text
    like any other, and only the template writes special tokens."""
    packing: bool = True
    """Put several documents in one row; attention and positions never cross from one to the next."""
    too_long: Literal["auto", "truncate", "split", "drop", "error"] = "auto"
    """What happens to a document longer than training.seq_len. "auto": split for text and tokens, else truncate. Counted and printed."""
    last_batch: Literal["fill", "drop"] = "fill"
    """The last batch of an epoch, where rows are left that do not make a whole one: filled from the next epoch's order, or left out."""
    cache_folder: Path = ""
    """Where the tokenised documents are kept for the next run. Empty: tunelib in $XDG_CACHE_HOME or ~/.cache."""


@dataclass(frozen=True)
class Training:
    """Length, batch and arithmetic of the run."""

    steps: Count | None = None
    """Optimizer steps of the whole run. Give this or training.epochs."""
    epochs: Count | None = None
    """Passes over the data; dataset.last_batch says what happens at the end of each."""
    global_batch_size: Count = 8
    """Rows per optimizer step, over all processes and micro-batches."""
    local_batch_size: CountOrAuto = -1
    """Rows of one micro-batch on one process; gradients accumulate up to global_batch_size. -1: the largest divisor of a
    process's share that is at most 8, or 1 in a pipeline."""
    seq_len: Count = 2048
    """Tokens per row."""
    max_norm: Positive = 1.0
    """Gradients are scaled down to this L2 norm over all parameters."""
    seed: NonNegativeInt = 0
    """Order of the data and freshly drawn weights follow from it."""
    deterministic: bool = False
    """Use only deterministic kernels, and stop where there is none."""
    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """When a step's loss or gradients are not finite, before weights change: "stop" the run; "skip": pass the step over; "rollback": go back to the
    newest checkpoint, and pass the step over when it comes again. The documents of its batch are written to nonfinite.jsonl."""
    max_nonfinite_steps: Count = 10
    """How many steps of the whole run may be passed over before it stops after all."""
    enable_cpu_offload: bool = False
    """Keep parameters, gradients and optimizer state in the main memory, and take an optimizer step there; for models that the GPUs do not hold."""
    dtype: Dtype = "auto"
    """Type of parameters and optimizer state; auto is float32."""
    mixed_precision_param: Dtype = "auto"
    """Type that parameters are computed in; auto is bfloat16 on CUDA (float64 stays float64), training.dtype elsewhere."""
    mixed_precision_reduce: Dtype = "auto"
    """Type that gradients are reduced in between processes; auto is float32 on CUDA (float64 stays float64), training.dtype elsewhere."""


@dataclass(frozen=True)
class Optimizer:
    """The optimizer; norms and biases get no weight decay."""

    name: Literal["AdamW", "AdamW8bit", "SGD"] = "AdamW"
    """Which optimizer; AdamW is torch's fused one. "AdamW8bit": torchao's, whose moments take a quarter of the memory (needs the extra
    "torchao" and a compiler)."""
    lr: Positive = 3e-4
    """The learning rate that warmup rises to."""
    beta1: Annotated[float, Bounds(minimum=0, maximum=0.999999)] = 0.9
    """AdamW: decay of the first moment."""
    beta2: OpenFraction = 0.95
    """AdamW: decay of the second moment."""
    eps: Positive = 1e-8
    """AdamW: added to the denominator."""
    momentum: Fraction = 0.0
    """SGD: momentum."""
    weight_decay: NonNegative = 0.1
    """Weight decay of matrices and embeddings: decoupled for AdamW, part of the gradient for SGD."""


@dataclass(frozen=True)
class LrScheduler:
    """How the learning rate moves: warmup, a stable part, and a decay to the end of the run."""

    warmup_steps: NonNegativeInt = 0
    """Steps of linear rise; the first step has lr / warmup_steps, never 0."""
    decay_type: Literal["constant", "linear", "cosine", "sqrt"] = "constant"
    """Shape of the decay. "constant": none."""
    decay_ratio: Annotated[float, Bounds(above=0, maximum=1)] | None = None
    """Share of the run's steps that decay takes, at its end (warmup-stable-decay). Unset: from the end of warmup on."""
    min_lr_factor: Fraction = 0.0
    """The lr, as a share of optimizer.lr, that the decay would reach one step after the run."""


@dataclass(frozen=True)
class Lora:
    """Train small matrices beside frozen weights (LoRA) instead of the weights."""

    enable: bool = False
    """Freeze the model and train adapters."""
    rank: Count = 16
    """Inner size of an adapter: A is (rank, in), B is (out, rank)."""
    alpha: Positive = 32.0
    """What the adapter adds is scaled by alpha / rank."""
    dropout: Annotated[float, Bounds(minimum=0, maximum=0.999)] = 0.0
    """Share of an adapter's inputs that is left out in training. Above 0 a run resumes exactly on the same layout only."""
    target_modules: Annotated[tuple[str, ...], OneOrMore()] = ("all-linear",)
    """Which linear layers get an adapter: "all-linear" (all but the head), or names such as "q_proj"."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank), which keeps large ranks stable."""
    use_dora: bool = False
    """Train the length of each row of the sum too (DoRA)."""
    train_lm_head: bool = False
    """Train the head in full; where it is tied to the embedding, that too."""
    train_embeddings: bool = False
    """Train the embedding in full; where the head is tied to it, that too."""
    quantize_base: Literal["none", "nf4"] = "none"
    """Keep the frozen weights of adapted layers in four bits (QLoRA): about 0.56 bytes per weight."""
    adapter_path: Path = ""
    """A PEFT adapter folder to start from, of the same base, rank and modules."""
    save_adapter_weights_only: bool = False
    """Leave the merged weights out at the end: adapter/ alone is written."""


@dataclass(frozen=True)
class Parallelism:
    """How the work is spread; it changes nothing else."""

    data_parallel_replicate_degree: Count = 1
    """Copies of the sharded model (HSDP)."""
    data_parallel_shard_degree: CountOrAuto = -1
    """Processes over which parameters, gradients and optimizer state are sharded (FSDP2). -1: all that are left."""
    tensor_parallel_degree: Count = 1
    """Processes over which each matrix product is split."""
    pipeline_parallel_degree: Count = 1
    """Groups of layers that work on different micro-batches at once."""
    pipeline_parallel_schedule: Literal["1F1B", "GPipe", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"] = (
        "1F1B"
    )
    """Order in which micro-batches pass through the stages, by torch's name. With "1F1B" and "GPipe" a process has one stage, else two or more."""
    pipeline_parallel_split_points: tuple[str, ...] = ()
    """First layer of each stage but the first, such as "layers.8". Empty: balanced by the work of each layer and of the head."""
    context_parallel_degree: Count = 1
    """Processes over which each row's tokens are split."""
    enable_async_tensor_parallel: bool = False
    """On CUDA, with compiled layers: overlap the communication of split products with the products."""
    fsdp_reshard_after_forward: Literal["default", "always", "never"] = "default"
    """"always": gathered parameters are freed after the forward pass (less memory); "never": kept for the backward pass (less communication).
    "default": always, but never in a pipeline, whose micro-batches would gather them again and again."""


@dataclass(frozen=True)
class ActivationCheckpoint:
    """Working activations out again in the backward pass instead of keeping them: less memory, the same numbers."""

    mode: Literal["none", "full", "selective"] = "none"
    """"full": each layer keeps its input only, and runs forward twice; "selective": by activation_checkpoint.selective_ac_option."""
    selective_ac_option: str = "op"
    """"op": layers keep matrix products and attention, and work out the rest again; a number n: every n-th layer keeps its input only."""


@dataclass(frozen=True)
class Compile:
    """torch.compile."""

    enable: bool | None = None
    """Compile each layer, but for attention over documents: less memory and traffic, after a minute or two of compiling. "auto": on CUDA, and on
    a CPU where the run is long enough to win it back, if there is a compiler and nothing rules it out; a run that is resumed stays as it was."""


@dataclass(frozen=True)
class Checkpoint:
    """Saving, resuming, and where weights come from and leave to."""

    enable_checkpoint: bool = False
    """Save training state while training, and resume from it."""
    folder: str = "checkpoint"
    """Where the step folders go, inside job.dump_folder."""
    interval: Count = 500
    """Save every so many of interval_type; the last step is always saved."""
    interval_type: Literal["steps", "seconds", "epochs"] = "steps"
    """What checkpoint.interval counts."""
    keep_latest_k: NonNegativeInt = 10
    """How many full checkpoints are kept, of those whose numbers are all finite; 0 keeps all. The newest good one is never deleted."""
    grace_seconds: Count = 300
    """How long a run has once a signal asks it to end: `run_train.sh` kills it then. Where a save has taken longer than what is left, the newest
    checkpoint stays the last one."""
    keep_every_n: NonNegativeInt = 0
    """Besides, keep the checkpoints of every so many steps for good; 0: of none."""
    keep_best: bool = False
    """Besides, keep the checkpoint with the lowest validation loss."""
    load_best_at_end: bool = False
    """Export the weights with the lowest validation loss instead of the last; each new lowest one is saved when it is found."""
    async_mode: Literal["disabled", "async", "async_with_pinned_mem"] = "disabled"
    """Save in the background, from a copy in the main memory, while training goes on; "async_with_pinned_mem" copies faster from a GPU."""
    sha256: bool = False
    """Checksums by SHA-256 besides CRC-32: for whoever must know that nobody has changed a checkpoint, not just that no disk has."""
    max_failed_saves: NonNegativeInt = 2
    """How many saves in a row may fail, for want of space or a disk that does not answer, before the run stops; the last one must not."""
    load_step: Annotated[int, Bounds(minimum=0, also=(-1,))] = -1
    """Resume from this step; later ones are set aside as step-N.superseded-K. -1: the newest good one."""
    resume: Literal["auto", "never", "must"] = "auto"
    """"auto": go on from the newest good checkpoint, else start fresh. "never": start fresh, setting old ones aside.
    "must": stop if there is none."""
    initial_load_path: Path = ""
    """Weights to start from, in any form: a Hugging Face, Meta or DCP folder, or a file of torch.save. The config.json or params.json
    there says what the model is; where there is none, [model] does."""
    model_weights_only: bool = False
    """The last checkpoint holds the model's weights alone, in export_dtype; it cannot be resumed from."""
    export_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the exported weights; auto is the type they came in, or training.dtype for a model trained from scratch."""
    export_format: Literal["auto", "hf", "meta", "dcp", "torch"] = "auto"
    """Form of the export; auto is the one that the weights came in, or hf for a model trained from scratch."""
    verify_export: bool = True
    """Read the export back and compare it with the trained weights, before it gets its name; the numbers are in export_check.json."""
    create_seed_checkpoint: bool = False
    """Write freshly made weights as step 0 and exit; later runs of this folder, on any layout, start from them."""


@dataclass(frozen=True)
class Metrics:
    """What is written down while training."""

    log_freq: Count = 1
    """Write a row to metrics.jsonl, and a line to the console, every so many steps."""
    enable_tensorboard: bool = False
    """Write the rows of metrics.jsonl for TensorBoard too, under the same names (needs the extra "tensorboard")."""
    save_tb_folder: str = "tb"
    """Where they go, inside job.dump_folder."""
    enable_wandb: bool = False
    """Send the rows of metrics.jsonl to Weights & Biases too, under the same names (needs the extra "wandb")."""
    wandb_project: str = ""
    """The project there. Empty: $WANDB_PROJECT, or else "tunelib"."""
    wandb_name: str = ""
    """What the run is called there. Empty: $WANDB_NAME, or else the name of the run folder."""
    wandb_mode: Literal["auto", "online", "offline"] = "auto"
    """"online" needs a login (`wandb login`, or $WANDB_API_KEY); "offline" writes to the folder wandb inside job.dump_folder, for `wandb sync`
    later. "auto": $WANDB_MODE, or else "online"."""


@dataclass(frozen=True)
class Profiling:
    """Where time goes and, on a GPU, memory."""

    enable_profiling: bool = False
    """Trace every profiling.profile_freq-th step with torch.profiler, and print a table of where its time went."""
    profile_freq: Count = 10
    """Steps from one profiled step to the next; such a step takes longer."""
    save_traces_folder: str = "profile"
    """Where traces (for Perfetto or chrome://tracing) and tables go, inside job.dump_folder."""
    enable_memory_snapshot: bool = False
    """Besides, write what lies in the GPU's memory after each profiled step, for pytorch.org/memory_viz."""


@dataclass(frozen=True)
class Validation:
    """Loss on held-out documents, and sample answers."""

    enable: bool = False
    """Validate before the first step, every validation.freq steps and after the last."""
    freq: Count = 100
    """Steps between validations."""
    path: Path = ""
    """Held-out files, in the format of dataset.path. Give this, validation.split or validation.fraction."""
    split: str = ""
    """A split of dataset.hub that is held out."""
    fraction: OpenFraction | None = None
    """Share of the documents held out, chosen by a hash of each document's tokens."""
    prompts: tuple[str, ...] = ()
    """Prompts answered greedily before and after training; written to samples.jsonl."""
    max_new_tokens: Count = 64
    """Longest answer to a prompt, in tokens."""
    patience: Count | None = None
    """End the run after so many validations in a row without a new lowest loss. Unset: never."""
    tasks: tuple[str, ...] = ()
    """Names of lm-eval's tasks, or of those in task_path, which are scored where the loss is measured (needs the extra "eval")."""
    task_path: Path = ""
    """A folder with task files (.yaml) of your own."""
    task_limit: Count | None = None
    """Only the first so many documents of each task. Unset: all."""
    task_chat_template: bool = False
    """Ask the tasks' questions as the message of a user, in the chat template that the data is trained with."""


@dataclass(frozen=True)
class Comm:
    """Communication between processes."""

    init_timeout_seconds: Count = 300
    """Limit of the first step, and of what is outside of steps: starting, a validation, a save. Then every process writes where it stands to the
    folder hang, and the run ends with exit code 124."""
    train_timeout_seconds: Count = 100
    """Limit of every later step, but at least five times the longest so far."""


@dataclass(frozen=True)
class Config:
    """tunelib's settings; one attribute per TOML section."""

    job: Job = field(default_factory=Job)
    model: Model = field(default_factory=Model)
    dataset: Dataset = field(default_factory=Dataset)
    training: Training = field(default_factory=Training)
    lora: Lora = field(default_factory=Lora)
    optimizer: Optimizer = field(default_factory=Optimizer)
    lr_scheduler: LrScheduler = field(default_factory=LrScheduler)
    parallelism: Parallelism = field(default_factory=Parallelism)
    activation_checkpoint: ActivationCheckpoint = field(default_factory=ActivationCheckpoint)
    compile: Compile = field(default_factory=Compile)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    metrics: Metrics = field(default_factory=Metrics)
    profiling: Profiling = field(default_factory=Profiling)
    validation: Validation = field(default_factory=Validation)
    comm: Comm = field(default_factory=Comm)
