"""The end of a run, in lines that a reader will copy and numbers that a program will read: summary.txt and summary.json."""

import json
import math
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tunelib.config.schema import Config
from tunelib.data.loader import Step
from tunelib.files import replace_file
from tunelib.flops import step_flops
from tunelib.model.config import ModelConfig
from tunelib.observe.memory import peak_memory_gib
from tunelib.observe.metrics import METRICS_FILE
from tunelib.observe.peak import Peak, find_peak
from tunelib.observe.report import process_age
from tunelib.parallel.reduce import largest_of_ranks
from tunelib.parallel.runtime import Runtime

SUMMARY_TEXT, SUMMARY_NUMBERS = "summary.txt", "summary.json"
TINY_SECONDS = 5.0
"""Runs that trained for less are not held against the machine: their steps are mostly overhead, and the measurement would be felt."""
ROOT = Path(__file__).parents[2]
"""Where scripts/ lies, unless the package was installed without it."""


@dataclass(frozen=True)
class Outputs:
    """Where a run's outputs lie.

    Attributes:
        checkpoint: the last one; None for none.
        export: what the export is, in words; empty for none.
        adapter: what the adapter is, in words; empty for none.
        exported: the step whose weights they are, and their validation loss, where those of the lowest one were asked for.
        can_go_on: whether more steps would train on.
    """

    folder: Path
    checkpoint: Path | None = None
    export: str = ""
    adapter: str = ""
    exported: tuple[int, float] | None = None
    can_go_on: bool = True


@dataclass(frozen=True)
class End:
    """What is known when a run is over.

    Attributes:
        seconds: of this process, from the start of the run.
        peak: of the machine; None where it was not asked for.
    """

    step: int
    tokens_seen: int
    seconds: float
    memory_gib: float
    outputs: Outputs
    peak: Peak | None = None
    commands: dict[str, str] = field(default_factory=dict)


class Summary:
    """Adds up a run's steps, and says at its end what came of them.

    Args:
        config: of the run.
        model: its architecture.
        what: is trained, in a line.
    """

    def __init__(self, config: Config, model: ModelConfig, what: str):
        self._config, self._model, self._what = config, model, what
        self._tokens, self._flops, self._seconds, self._num_steps = 0, 0.0, 0.0, 0
        self._age: float | None = None
        self._logged = (0, 0.0, 0)
        self._losses: list[float] = []
        self._validations: list[float] = []

    @property
    def has_steps(self) -> bool:
        """Whether a step has ended that changed the weights."""
        return self._num_steps > 0

    def add_step(self, work: Step, seconds: float, loss: float) -> None:
        """One step has ended; its time leaves out validation and saving."""
        if not self._num_steps:
            self._age = process_age()
        self._tokens, self._seconds, self._num_steps = self._tokens + work.num_tokens, self._seconds + seconds, self._num_steps + 1
        self._flops += self._needed_flops(work)
        self._losses = [*self._losses[-9:], loss]

    def add_validation(self, loss: float) -> None:
        """The held-out documents have been looked at."""
        self._validations.append(loss)

    def speed(self) -> dict[str, float]:
        """Tokens (padding not counted) per second over all processes, and seconds per step, since the last call."""
        tokens, seconds, steps = (now - then for now, then in zip((self._tokens, self._seconds, self._num_steps), self._logged, strict=True))
        self._logged = (self._tokens, self._seconds, self._num_steps)
        return {"tokens_per_second": tokens / seconds, "seconds_per_step": seconds / steps}

    def end(self, step: int, tokens_seen: int, seconds: float, outputs: Outputs, runtime: Runtime, say: Callable[[str], None]) -> None:
        """Say the summary, and write it beside the metrics; a run that took no step leaves what is there. Every rank must call it."""
        memory = largest_of_ranks(peak_memory_gib(runtime.device), runtime.device)
        is_tiny = largest_of_ranks(self._seconds, runtime.device) < TINY_SECONDS
        peak = None if is_tiny else find_peak(runtime.device, runtime.compute_dtype)
        if peak and self._flops > self._seconds * peak.flops_per_second:
            peak = None  # something else had the machine while it was measured
        commands = next_commands(self._config, outputs, runtime.world_size)
        end = End(step, tokens_seen, seconds, memory, outputs, peak, commands)
        lines = self.lines(end)
        for line in lines:
            say(line)
        if runtime.is_main and (self.has_steps or not (outputs.folder / SUMMARY_TEXT).exists()):
            try:
                replace_file(outputs.folder / SUMMARY_TEXT, "\n".join(lines) + "\n")
                replace_file(outputs.folder / SUMMARY_NUMBERS, json.dumps(self.numbers(end), indent=2, ensure_ascii=False) + "\n")
            except OSError as error:
                say(f"{outputs.folder / SUMMARY_TEXT} cannot be written: {error.strerror}; the lines above are all there is")

    def lines(self, end: End) -> list[str]:
        """The summary, with where each output lies and what to type next."""
        outputs, watched = end.outputs, self._config.metrics
        loss = f"; training loss {np.mean(self._losses):.4f} (mean of the last {len(self._losses)} steps)" if self._losses else ""
        first, last = (f"{loss:.4f}" for loss in (self._validations[0], self._validations[-1])) if self._validations else ("", "")
        validation = f"; validation loss {first} → {last}" if len(self._validations) > 1 else f"; validation loss {last}" if last else ""
        exported = f"; exported: step {outputs.exported[0]:,}, validation loss {outputs.exported[1]:.4f}" if outputs.exported else ""
        rate = f"{self._tokens / self._seconds:,.0f} tokens/s; " if self._seconds else ""
        age = f", the first step after {self._age:.1f} s" if self._age is not None else ""
        return [
            f"trained    {self._what}",
            f"done       step {end.step:,}{loss}{validation}{exported}",
            f"speed      {rate}{end.tokens_seen:,} tokens in all; {end.seconds:.1f} s in this process{age}; peak memory {end.memory_gib:.2f} GiB",
            *([f"machine    {self._describe_share(end.peak)}"] if end.peak else []),
            f"written    {outputs.folder / METRICS_FILE}",
            *([f"           {outputs.folder / watched.save_tb_folder}: for TensorBoard"] if watched.enable_tensorboard else []),
            *([f"           {outputs.folder / 'wandb'}: for Weights & Biases"] if watched.enable_wandb else []),
            *([f"           {outputs.checkpoint}"] if outputs.checkpoint else []),
            *([f"           {outputs.folder / 'adapter'}: {outputs.adapter}"] if outputs.adapter else []),
            *([f"           {outputs.folder / 'export'}: {outputs.export}"] if outputs.export else []),
            *(f"{'next' if number == 0 else '':10} {command}  # {why}" for number, (why, command) in enumerate(end.commands.items())),
        ]

    def numbers(self, end: End) -> dict[str, Any]:
        """The same for a program; units are in the names, losses in nats per trained token, None is what was not measured or is not finite."""
        rate = self._flops / self._seconds if self._seconds else None
        outputs = end.outputs
        return {
            "trained": self._what,
            "step": end.step,
            "steps_in_this_process": self._num_steps,
            "training_loss": _finite(float(np.mean(self._losses))) if self._losses else None,
            "first_validation_loss_in_this_process": _finite(self._validations[0]) if self._validations else None,
            "validation_loss": _finite(self._validations[-1]) if self._validations else None,
            "exported_step": outputs.exported[0] if outputs.exported else end.step,
            "exported_validation_loss": outputs.exported[1] if outputs.exported else None,
            "tokens": end.tokens_seen,
            "tokens_per_second": self._tokens / self._seconds if self._seconds else None,
            "seconds_in_this_process": end.seconds,
            "seconds_of_steps": self._seconds,
            "peak_memory_gib": end.memory_gib,
            "needed_flops_per_second": rate,
            "machine_flops_per_second": end.peak.flops_per_second if end.peak else None,
            "machine_flops_source": end.peak.source if end.peak else None,
            "share_of_machine": rate / end.peak.flops_per_second if rate and end.peak else None,
            "metrics": str(outputs.folder / METRICS_FILE),
            "checkpoint": str(outputs.checkpoint) if outputs.checkpoint else None,
            "adapter": str(outputs.folder / "adapter") if outputs.adapter else None,
            "export": str(outputs.folder / "export") if outputs.export else None,
            "next": end.commands,
        }

    def _describe_share(self, peak: Peak) -> str:
        rate = self._flops / self._seconds
        figures = f"{rate / 1e9:,.0f} of {peak.flops_per_second / 1e9:,.0f} GFLOP/s, {peak.source}"
        return f"{rate / peak.flops_per_second:.0%} of its peak in what a step cannot do without ({figures})"

    def _needed_flops(self, work: Step) -> float:
        """Of the whole step: documents of all ranks are taken to be as long as this one's."""
        rank = self._config.lora.rank if self._config.lora.enable else 0
        lengths = [length for batch in work.batches for length in batch.document_lengths]
        share = work.num_tokens / sum(lengths) if lengths else 0.0
        return step_flops(self._model, lengths, 0, rank) * share + step_flops(self._model, [], work.num_trained, rank)


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def what_is_trained(config: Config, num_parameters: int, trained: dict[str, torch.Size], num_steps: int, weights: str) -> str:
    """One line.

    Args:
        num_parameters: of the model, without adapters.
        trained: the shapes of the parameters that are trained.
        weights: where they came from, in words.
    """
    num_trained = sum(shape.numel() for shape in trained.values())
    kind = ("rs" if config.lora.use_rslora else "") + ("DoRA" if config.lora.use_dora else "LoRA")
    adapters = f"{kind} adapters of {num_trained / 1e6:,.2f} M parameters on " if config.lora.enable else "all of "
    training, sources = config.training, [source.path or source.hub for source in config.dataset.mix] or [config.dataset.path or config.dataset.hub]
    rows = f"{'at most ' if config.validation.patience else ''}{num_steps:,} steps of {training.global_batch_size} rows of {training.seq_len} tokens"
    return f"{adapters}a model of {num_parameters / 1e6:,.1f} M parameters ({weights}), {rows}, on {', '.join(sources)}"


def next_commands(config: Config, outputs: Outputs, world_size: int = 1, root: Path = ROOT) -> dict[str, str]:
    """What one may type next, from the current directory: why → the command. Only what is there is named.

    Args:
        world_size: processes of the run; with several on one machine training goes on with as many.
        root: has scripts/.
    """
    python = shlex.quote(_short(Path(sys.executable))) if Path(sys.executable).is_relative_to(root) else "python"
    folder, export = shlex.quote(_short(outputs.folder)), outputs.folder / "export"

    def script(name: str) -> str:
        return f"{python} {shlex.quote(_short(root / 'scripts' / name))}" if (root / "scripts" / name).exists() else ""

    commands = {}
    if outputs.export and (export / "config.json").exists() and (generate := script("generate.py")):
        commands["talk to it"] = f"{generate} {shlex.quote(_short(export))}{' --chat' if _has_chat_template(export) else ''}"
    elif outputs.adapter and not outputs.export and (merge := script("merge_adapter.py")):
        base, adapter = (shlex.quote(_short(Path(path))) for path in (config.checkpoint.initial_load_path, outputs.folder / "adapter"))
        commands["merge it"] = f"{merge} {base} {adapter} {shlex.quote(_short(export))}"
    if plot := script("plot_runs.py"):
        commands["look at the curves"] = f"{plot} {folder}"
    is_here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size)) == world_size
    if outputs.checkpoint and outputs.can_go_on and not config.checkpoint.model_weights_only and is_here and (root / "train.py").exists():
        key, length = ("steps", config.training.steps) if config.training.steps else ("epochs", config.training.epochs)
        program = f"{python} {shlex.quote(_short(root / 'train.py'))}"
        if world_size > 1:
            program = f"NGPU={world_size} {shlex.quote(_short(root / 'run_train.sh'))}"
        start = f"{program} {shlex.quote(_short(outputs.folder / 'config.toml'))}"
        commands["train on"] = f"{start} --training.{key} {2 * (length or 1)}"
    return commands


def _has_chat_template(folder: Path) -> bool:
    config = folder / "tokenizer_config.json"
    return (folder / "chat_template.jinja").exists() or (config.exists() and '"chat_template"' in config.read_text(encoding="utf-8"))


def _short(path: Path) -> str:
    """Relative to the current directory where it lies below that."""
    whole, here = os.path.abspath(path), os.getcwd()
    return os.path.relpath(whole, here) if whole.startswith(here + os.sep) else whole
