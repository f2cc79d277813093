"""The memory of a run: which checkpoint to go on from, saving, retention.

A step folder is ``step-N``, committed by `tunelib.files`; its manifest says of which kind it is: "full" (can be resumed), "model"
(weights alone) or "seed" (initial weights). Methods marked *collective* must be reached by every rank.
"""

import math
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunelib import files
from tunelib.checkpoint.dcp_reader import load_tensors
from tunelib.checkpoint.dcp_writer import Background, save_tensors
from tunelib.checkpoint.state import STATE_FILE, RunState, read_run_state
from tunelib.config.schema import Checkpoint
from tunelib.errors import CheckpointError, NumbersError, SaveError, UnreachableError
from tunelib.parallel.reduce import agreed, deal, from_main, gather_objects, local, on_main

STEP_NAME = re.compile(r"step-(0|[1-9][0-9]*)")
KINDS = ("full", "model", "seed")
CONFIG_FILE = "config.toml"
MODEL_FILE = "config.json"


@dataclass(frozen=True)
class Decision:
    """How a run begins.

    Attributes:
        kind: "fresh"; "seed": with the weights of ``folder``; "resume": with all of it; "finished": at its end already, with the
            weights of ``folder``, which holds no more.
        sentence: what was decided and why, for the first line of the run.
        state: what the checkpoint says of the run that wrote it.
        supersede: steps to set aside, once nothing speaks against the run.
    """

    kind: str
    sentence: str
    folder: Path | None = None
    state: RunState | None = None
    supersede: tuple[int, ...] = ()

    @property
    def resumed(self) -> RunState | None:
        """The run that is gone on with; None for one that begins, or has ended."""
        return self.state if self.kind == "resume" else None


class CheckpointManager:
    """Reads and writes the step folders of one run.

    Args:
        section: the [checkpoint] section.
        folder: where the step folders lie.
        is_main: whether this rank writes what is written once.
        config_toml: the resolved TOML, kept in every checkpoint.
        model_json: the model's config.json, kept in every checkpoint so that its weights can be loaded by themselves.
        say: tells the user.
    """

    def __init__(self, section: Checkpoint, folder: Path, is_main: bool, config_toml: str, model_json: str, say: Callable[[str], None] = print):
        self.section, self.folder, self.is_main = section, folder, is_main
        self.config_toml, self.model_json, self._say = config_toml, model_json, say
        self._saved = (-1, "")  # step and kind of what was saved last
        self._good_step = -1  # whose numbers are all finite
        self._last_save_time = time.monotonic()
        self._num_failed = 0
        self._bytes = 0  # of the newest checkpoint
        self._seconds = 0.0  # that it took
        self._background: Background | None = None

    # How the run begins

    def decide(self, num_steps: int) -> Decision:
        """Choose what to go on from, setting damaged step folders aside. Collective.

        Args:
            num_steps: of the whole run.
        """
        if not self.section.enable_checkpoint:
            return Decision("fresh", "starting fresh: checkpoint.enable_checkpoint is false")
        on_main(lambda: files.prepare_folder(self.folder), f"{self.folder} cannot be written")
        steps = on_main(self._list_steps)
        if self.section.create_seed_checkpoint:
            if steps:
                raise CheckpointError(f"{self.folder} already holds step {steps[-1]}: a seed checkpoint is the first thing in a run folder")
            return Decision("fresh", "making a seed checkpoint")
        # What torchrun starts again goes on, whatever the first start was told; it counts where a worker failed, not on machines that followed.
        is_restart = any(gather_objects(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"))
        if self.section.resume == "never" and not is_restart:
            aside = f"; {len(steps)} old checkpoints set aside" if steps else ""
            return Decision("fresh", f"starting fresh: checkpoint.resume is 'never'{aside}", supersede=tuple(steps))
        decision = self._decide_step(steps, num_steps)
        if self.section.resume == "must" and decision.kind not in ("resume", "finished"):
            raise CheckpointError(f"checkpoint.resume is 'must', but {self.folder} holds no full checkpoint")
        return decision

    def follow(self, decision: Decision) -> None:
        """Set aside what the decision supersedes. Collective."""
        on_main(lambda: [files.set_aside(self._path(step), "superseded") for step in decision.supersede])

    def _decide_step(self, steps: list[int], num_steps: int) -> Decision:
        wanted = self.section.load_step
        if wanted >= 0 and not on_main(lambda: self._is_restart(steps)):
            if wanted not in steps:
                hint = "; without it, the run goes on from the newest good one" if steps else ""
                raise CheckpointError(f"checkpoint.load_step = {wanted}: {self.folder} holds {_name_steps(steps)}{hint}")
            manifest, problems = self._verify(wanted)
            if problems or manifest["kind"] == "model":
                raise CheckpointError(problems[0] if problems else f"{self._path(wanted)} holds model weights only: it cannot be resumed from")
            if manifest.get("finite") is False:
                raise CheckpointError(f"{self._path(wanted)} holds numbers that are not finite: it cannot be resumed from")
            later = tuple(step for step in steps if step > wanted)
            aside = f"; {_name_steps(list(later))} set aside" if later else ""
            return replace(self._begin_with(wanted, manifest["kind"], f"checkpoint.load_step asks for it{aside}"), supersede=later)
        return self._find_newest(steps, num_steps)

    def find_newest(self, num_steps: int) -> Decision:
        """The newest good checkpoint, whatever the start was told; damaged ones are set aside. Collective."""
        return self._find_newest(on_main(self._list_steps), num_steps)

    def _find_newest(self, steps: list[int], num_steps: int) -> Decision:
        passed_over, weights_only = "", -1
        damaged: dict[int, str] = {}
        for step in reversed(steps):
            manifest, problems = self._verify(step)
            if problems:
                damaged[step] = "; ".join(problems)
            elif manifest.get("finite") is False:
                passed_over += f"; step {step} holds numbers that are not finite"
            elif manifest["kind"] == "model":
                if step >= num_steps and on_main(partial(self._is_of_this_config, step)):
                    return self._begin_with(step, "model", "")
                passed_over += f"; step {step} holds model weights only"
                weights_only = max(weights_only, step)
            elif manifest["kind"] == "full" or weights_only < 0:
                return self._begin_with(step, manifest["kind"], "the newest good checkpoint" + passed_over + self._set_aside_damaged(damaged))
        if weights_only >= 0:
            raise CheckpointError(
                f"{self._path(weights_only)} holds model weights only, and there is no full checkpoint to resume from: start another run from it "
                "with --checkpoint.initial_load_path, or this one over with --checkpoint.resume never"
            )
        if damaged:
            told = "\n".join(f"  step {step}: {problem}" for step, problem in damaged.items())
            raise CheckpointError(
                f"{self.folder} holds no good checkpoint; nothing was changed:\n{told}\n"
                "Mend what can be (permissions, a copy from elsewhere), or start this run over with --checkpoint.resume never."
            )
        return Decision("fresh", f"starting fresh: no checkpoint to resume in {self.folder}{passed_over}")

    def _set_aside_damaged(self, damaged: dict[int, str]) -> str:
        """Give damaged steps other names, so that theirs can be written again; what was done, in words. Collective."""
        said = ""
        for step, problem in damaged.items():
            path = self._path(step)
            new = on_main(partial(files.set_aside, path, "damaged"), f"{path} is damaged ({problem}) and cannot be set aside")
            said += f"; step {step} is damaged ({problem}) and is now {new.name}"
        return said

    def _begin_with(self, step: int, kind: str, why: str) -> Decision:
        path = self._path(step)
        state = on_main(partial(read_run_state, path))
        if kind == "seed":
            return Decision("seed", f"starting from the seed checkpoint {path}: {why}", path, state)
        if kind == "model":
            return Decision("finished", f"finished at step {step} already: {path} holds the weights, and no more", path, state)
        return Decision("resume", f"resuming after step {step}: {why}", path, state)

    def _is_restart(self, steps: list[int]) -> bool:
        """Whether load_step has been followed already, and this is the same command again."""
        return bool(steps) and steps[-1] > self.section.load_step and self._is_of_this_config(steps[-1])

    def _is_of_this_config(self, step: int) -> bool:
        """Whether a checkpoint was made by this very configuration."""
        try:
            return (self._path(step) / CONFIG_FILE).read_text(encoding="utf-8") == self.config_toml
        except OSError:
            return False

    def _verify(self, step: int) -> tuple[dict[str, Any], list[str]]:
        """The manifest of a step folder, and what is wrong with it; the files are dealt out over the ranks. Collective.

        Raises:
            UnreachableError: on every rank: the disk does not answer just now, so that nothing is known.
        """
        manifest, problem = on_main(lambda: self._read_manifest(step))
        if problem:
            return manifest, [problem]
        damage: list[str] = []
        with agreed():
            damage = files.find_damage(self._path(step), manifest["files"], deal(sorted(manifest["files"])))
        return manifest, sorted({problem for problems in gather_objects(damage) for problem in problems})

    def _read_manifest(self, step: int) -> tuple[dict[str, Any], str]:
        """A step's manifest, and what is wrong with it, "" for nothing."""
        path = self._path(step) / files.MANIFEST
        try:
            manifest = files.read_manifest(self._path(step))
        except UnreachableError:
            raise
        except CheckpointError as error:
            return {}, str(error)
        if manifest.get("kind") not in KINDS:
            return manifest, f"{path} does not say of which kind it is"
        return manifest, "" if manifest.get("step", step) == step else f"{path} is that of step {manifest['step']}"

    # Loading

    def load(self, tensors: dict[str, Tensor], decision: Decision) -> None:
        """Fill tensors from a verified step folder. Collective."""
        assert decision.folder is not None
        load_tensors(tensors, decision.folder)
        if decision.kind in ("resume", "finished") and decision.state is not None:
            self._saved = (decision.state.step, "full" if decision.kind == "resume" else "model")
            self._good_step = decision.state.step
            self._bytes = sum(entry["size"] for entry in self._manifest(decision.state.step).get("files", {}).values())

    def find_best(self, best_step: int | None) -> tuple[int, float | None] | None:
        """Step and validation loss of the good full checkpoint with the lowest one; damaged ones are set aside. Collective.

        Args:
            best_step: goes before what manifests say, which know of no loss that was measured after the save.
        """
        self.wait()
        for step, loss in on_main(lambda: self._rank_by_loss(best_step)):
            _, problems = self._verify(step)
            if not problems:
                return step, loss
            self._say(self._set_aside_damaged({step: "; ".join(problems)}).removeprefix("; "))
        return None

    def _rank_by_loss(self, best_step: int | None) -> list[tuple[int, float | None]]:
        """Full checkpoints of which a validation loss is known, and the loss that their manifest says; the best first."""
        manifests = {step: self._manifest(step) for step in self._list_steps()}
        good = {step: manifest for step, manifest in manifests.items() if manifest.get("kind") == "full" and manifest.get("finite") is not False}
        losses = {step: loss for step, manifest in good.items() if (loss := manifest.get("validation_loss")) is not None and math.isfinite(loss)}
        first = [best_step] if best_step in good else []
        return [(step, losses.get(step)) for step in [*first, *sorted(losses.keys() - set(first), key=losses.__getitem__)] if step is not None]

    def load_weights(self, tensors: dict[str, Tensor], step: int) -> None:
        """Fill tensors from what `find_best` found; the run stands where it stood. Collective."""
        load_tensors(tensors, self._path(step))

    # Saving

    def is_due(self, step: int, finished_epochs: tuple[int, int], is_best: bool = False) -> bool:
        """Whether ``interval`` asks for a save after a step, or ``load_best_at_end`` does. Collective where seconds count.

        Args:
            finished_epochs: whole epochs before and after the step.
            is_best: whether no validation loss has been as low.
        """
        if not self.section.enable_checkpoint:
            return False
        if self.section.load_best_at_end and is_best:
            return True
        if self.section.interval_type == "seconds":
            return from_main(time.monotonic() - self._last_save_time >= self.section.interval)
        if self.section.interval_type == "epochs":
            return finished_epochs[0] // self.section.interval < finished_epochs[1] // self.section.interval
        return step % self.section.interval == 0

    def save(self, tensors: dict[str, Tensor], state: RunState, kind: str = "full") -> Path | None:
        """Write ``step-N``, commit it, and remove what retention no longer keeps; None where this step is saved already. Collective.

        Raises:
            SaveError: on every rank, where any of them could not write; the folder has no new step then.
            NumbersError: on every rank: what was written is not finite. A training step need not see that, but nobody should be given it.
        """
        self.wait()
        self._last_save_time = time.monotonic()
        is_new = (state.step, kind) != self._saved
        if is_new:
            self._write(tensors, state, kind)
        else:
            on_main(lambda: self._retain(state.best_step))  # from which an interruption may have kept the save
        if state.step != self._good_step:
            error = NumbersError(
                f"{self._path(state.step)} holds numbers that are not finite, and counts for nothing; the same command goes on from the newest good "
                "checkpoint, if there is one, with the same data: give it a lower --optimizer.lr, or weights that are finite"
            )
            error.agreed = True
            raise error
        return self._path(state.step) if is_new else None

    def save_and_go_on(self, tensors: dict[str, Tensor], state: RunState) -> None:
        """`save` in the midst of training: in the background where ``async_mode`` asks for it, and failures are told, and borne for a while.

        Collective.

        Raises:
            SaveError: on every rank, when ``max_failed_saves`` have failed in a row before.
        """
        self.wait()
        self._last_save_time = time.monotonic()  # also of one that fails, or takes long: it is not due again at the next step
        if (state.step, "full") == self._saved:
            return
        if self.section.async_mode == "disabled":
            self._bear(lambda: self._write(tensors, state, "full"))
            return
        if self._background is None:
            self._background = Background(self.section.async_mode == "async_with_pinned_mem")
        self._background.start(tensors, lambda copies: self._write(copies, state, "full"))

    def save_in_time(self, tensors: dict[str, Tensor], state: RunState, seconds_gone: Callable[[], float]) -> str:
        """`save`, if what is left of ``grace_seconds`` will do, as the saves before have shown; what was done, in words. Collective.

        Args:
            seconds_gone: of it, when asked.
        """
        self.wait()
        seconds_left = self.section.grace_seconds - max(gather_objects(seconds_gone()))
        seconds_needed = max(gather_objects(self._seconds))
        if seconds_needed > seconds_left and self._good_step >= 0:
            took = f"a save takes about {seconds_needed:.0f} s, and {max(0, seconds_left):.0f} s are left of checkpoint.grace_seconds"
            return f"not saved, since {took}; the same command goes on from step {self._good_step}"
        self.save(tensors, state)
        return "and saved; the same command goes on from there"

    def wait(self) -> None:
        """Wait for a save in the background; raises as `save_and_go_on` does. Collective."""
        if self._background is not None and self._background.is_busy:
            self._bear(self._background.finish)

    def _bear(self, save: Callable[[], object]) -> None:
        try:
            save()
            self._num_failed = 0
        except SaveError as error:  # on every rank
            self._num_failed += 1
            if self._num_failed > self.section.max_failed_saves:
                raise
            self._say(f"NOT SAVED ({self._num_failed} in a row; checkpoint.max_failed_saves = {self.section.max_failed_saves}): {error}")

    def _write(self, tensors: dict[str, Tensor], state: RunState, kind: str) -> None:
        """Write and commit ``step-N``."""
        final, begun = self._path(state.step), time.monotonic()
        try:
            is_finite = self._build(final, tensors, state, kind)
        except SaveError:  # on every rank
            if self.is_main:
                shutil.rmtree(files.staging_of(final), ignore_errors=True)
            raise
        self._saved = (state.step, kind)
        if is_finite:
            self._good_step = state.step
        else:
            self._say(f"step {state.step}: the checkpoint holds numbers that are not finite, and counts for nothing")
        self._seconds = time.monotonic() - begun

    def _build(self, final: Path, tensors: dict[str, Tensor], state: RunState, kind: str) -> bool:
        failed = f"{final} cannot be written"
        on_main(lambda: self._check_space(final), failed)
        is_finite = all(gather_objects(all(bool(torch.isfinite(local(tensor)).all()) for tensor in tensors.values() if tensor.is_floating_point())))
        staging = files.staging_of(final)
        on_main(lambda: files.make_staging(final), failed)
        save_tensors(tensors, staging)
        with agreed(failed):
            if self.is_main:
                files.write_file(staging / STATE_FILE, state.to_json())
                files.write_file(staging / CONFIG_FILE, self.config_toml)
                files.write_file(staging / MODEL_FILE, self.model_json)
        names = on_main(lambda: files.list_files(staging), failed)
        described: dict[str, dict[str, Any]] = {}
        with agreed(failed):
            described = files.describe_files(staging, deal(names), self.section.sha256)
        parts = gather_objects(described)
        with agreed(failed):
            if self.is_main:
                if final.exists():  # model weights alone, which a run that was extended passes again
                    files.set_aside(final, "superseded")
                together = {name: entry for part in parts for name, entry in part.items()}
                self._bytes = sum(entry["size"] for entry in together.values())
                facts = {"kind": kind, "step": state.step, "finite": is_finite, "validation_loss": state.validation_loss}
                files.commit_folder(staging, final, together, **facts)
                self._retain(state.best_step)
        return is_finite

    def _check_space(self, final: Path) -> None:
        """Whether the disk has room for as much as the newest checkpoint takes; raises SaveError."""
        files.make_folder(self.folder)
        free = shutil.disk_usage(self.folder).free
        if free < self._bytes:
            needed = f"it takes about {self._bytes / 2**20:,.0f} MiB, and {free / 2**20:,.0f} MiB are free there"
            raise SaveError(f"{final} cannot be written: {needed}; room is needed for checkpoint.keep_latest_k of them and one more")

    def _retain(self, best_step: int | None) -> None:
        """Remove full checkpoints that nothing asks to keep. Those that are not finite count for nothing, and go with the good ones after them."""
        keep = self.section.keep_latest_k
        manifests = {step: manifest for step in self._list_steps() if (manifest := self._manifest(step)).get("kind") == "full"}
        good = [step for step, manifest in manifests.items() if manifest.get("finite") is not False]
        kept = set(good[-keep:]) if keep else set(good)
        if self.section.keep_every_n:
            kept |= {step for step in good if step % self.section.keep_every_n == 0}
        losses = {step: loss for step in good if (loss := manifests[step].get("validation_loss")) is not None and math.isfinite(loss)}
        if self.section.keep_best and losses:
            kept.add(min(losses, key=losses.__getitem__))
        if self.section.load_best_at_end and best_step is not None:
            kept.add(best_step)
        for step in [step for step in manifests if step not in kept and good and step < good[-1]]:
            try:
                files.remove_folder(self._path(step))
            except OSError as problem:  # the new one is there, which is what counts
                self._say(f"{self._path(step)} cannot be removed: {problem}")

    def _manifest(self, step: int) -> dict[str, Any]:
        """A step's manifest; empty where there is no readable one: such a folder neither counts nor goes."""
        try:
            return files.read_manifest(self._path(step))
        except CheckpointError:
            return {}

    def _list_steps(self) -> list[int]:
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UnreachableError(f"{self.folder} cannot be read: {error.strerror}") from None
        return sorted(int(match[1]) for name in names if (match := STEP_NAME.fullmatch(name)) and (self.folder / name).is_dir())

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step}"


def _name_steps(steps: list[int]) -> str:
    return f"steps {', '.join(map(str, steps))}" if steps else "no checkpoint"
