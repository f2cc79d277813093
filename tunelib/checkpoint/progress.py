"""Where a run stands: taken from it for a checkpoint, and given back to it when it goes on from one."""

import math
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from tunelib.checkpoint.manager import CheckpointManager, Decision
from tunelib.checkpoint.state import RunState, model_tensors, optimizer_tensors, restore_rng, rng_tensors, tensors_to_load
from tunelib.config.schema import Training
from tunelib.data.loader import TrainData
from tunelib.data.stream import StreamData
from tunelib.errors import NumbersError
from tunelib.model.decoder import Decoder
from tunelib.parallel.mesh import Layout
from tunelib.parallel.reduce import agreed, gather_objects, local
from tunelib.parallel.runtime import Runtime


class Progress:
    """A run between two steps.

    Args:
        begun: the facts that stay as they are: who computes, and what must be the same for the run to go on; those of a checkpoint that the
            run does not take its state from, too.

    Attributes:
        step: the last one that was done, or passed over.
        tokens_seen: positions trained on, padding not counted.
        passed_over: steps that were taken without an update, because their numbers were not finite.
        validation_loss: of the weights as they are; None where they were not validated.
        exported: the step whose weights the run ends with, and their validation loss, where it had the choice.
        best_step, best_loss: of the validation with the lowest loss so far; num_worse: how many there were since then.
    """

    def __init__(
        self,
        model: Decoder,
        optimizer: torch.optim.Optimizer,
        data: TrainData | StreamData,
        section: Training,
        layout: Layout,
        runtime: Runtime,
        begun: RunState,
    ):
        self._model, self._optimizer, self._data, self._section = model, optimizer, data, section
        self._layout, self._runtime, self._begun = layout, runtime, begun
        self.step, self.tokens_seen, self.passed_over = begun.step, begun.tokens_seen, list(begun.passed_over)
        self.validation_loss: float | None = None
        self.exported: tuple[int, float] | None = None
        self.best_step, self.best_loss, self.num_worse = begun.best_step, begun.best_loss, begun.num_worse

    @property
    def is_best(self) -> bool:
        """Whether the weights as they are have the lowest validation loss so far."""
        return self.validation_loss is not None and self.step == self.best_step

    def has_lost_patience(self, patience: int | None) -> bool:
        """Whether so many validations in a row had no new lowest loss."""
        return patience is not None and self.num_worse >= patience

    def describe_early_end(self, patience: int | None) -> str:
        """Why a run ends that has lost its patience; "" where it has not."""
        if not self.has_lost_patience(patience):
            return ""
        lowest = f"step {self.best_step} has the lowest validation loss" if self.best_step is not None else "no validation loss is finite"
        return f"step {self.step}: {lowest}, and {self.num_worse} validations since had none lower: the run ends here (validation.patience)"

    def validated(self, loss: float) -> None:
        """The weights as they are have been validated; a loss that is not finite is no lowest one, nor is that of weights not trained yet."""
        self.validation_loss = loss
        if self.step == 0:
            return
        if math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss):
            self.best_step, self.best_loss, self.num_worse = self.step, loss, 0
        else:
            self.num_worse += 1

    def advance(self, num_tokens: int) -> None:
        """One step further, with so many tokens trained on; none where it was passed over."""
        self.step += 1
        self.tokens_seen += num_tokens
        self.validation_loss = None

    def capture(self) -> tuple[dict[str, Tensor], RunState]:
        """What a full checkpoint holds: tensors by name, which are the run's own storage, and the facts. Collective."""
        tensors = model_tensors(self._model) | optimizer_tensors(self._model, self._optimizer) | rng_tensors(self._runtime.rank, self._runtime.device)
        streams = self._layout.gather_shares(self._data.state()) if isinstance(self._data, StreamData) else None
        now = replace(self._begun, step=self.step, tokens_seen=self.tokens_seen, passed_over=list(self.passed_over))
        now = replace(now, best_step=self.best_step, best_loss=self.best_loss, num_worse=self.num_worse)
        return tensors, replace(now, validation_loss=self.validation_loss, streams=streams)

    def restore(self, manager: CheckpointManager, decision: Decision) -> bool:
        """Go on from a checkpoint; whether random numbers do too, which they do on the layout that saved it. Collective."""
        state = decision.resumed
        assert state is not None
        same_layout = (state.world_size, state.device, state.degrees) == (self._begun.world_size, self._begun.device, self._begun.degrees)
        tensors = tensors_to_load(self._model, self._optimizer, self._runtime.rank, self._runtime.device, same_layout)
        manager.load(tensors, decision)
        if same_layout:
            restore_rng(tensors, self._runtime.rank, self._runtime.device)
        if isinstance(self._data, StreamData) and state.streams is not None:
            with agreed():
                self._data.restore(state.streams[self._layout.data_rank])
        self.step, self.tokens_seen, self.validation_loss = state.step, state.tokens_seen, state.validation_loss
        self.best_step, self.best_loss, self.num_worse = state.best_step, state.best_loss, state.num_worse
        # What was found since then counts, too, when a run goes back.
        self.passed_over = sorted({*self.passed_over, *state.passed_over})
        return same_layout

    def pass_over(self, loss: float, grad_norm: float, manager: CheckpointManager, num_steps: int) -> str:
        """Take the next step without an update from now on, because its numbers are not finite; go back to a checkpoint where that is asked for.

        Collective.

        Returns:
            What was done, in words.

        Raises:
            NumbersError: on every rank: the run is to stop, now or because there were too many, or has nothing to go back to.
        """
        at_fault, section = self.step + 1, self._section
        manager.wait()  # for what was good, whatever comes next
        numbers = f"step {at_fault}: loss {loss}, gradient norm {grad_norm}"
        if section.on_nonfinite == "stop" or len(self.passed_over) >= section.max_nonfinite_steps:
            enough = f", after {section.max_nonfinite_steps} steps were passed over (training.max_nonfinite_steps)"
            raise _stopped(
                f"{numbers}: stopped before the weights change{'' if section.on_nonfinite == 'stop' else enough}, and nothing of it is saved; "
                "go on from an earlier checkpoint (--checkpoint.load_step), if there is one, with a lower --optimizer.lr "
                "or a longer --lr_scheduler.warmup_steps."
            )
        self.passed_over.append(at_fault)
        said = f"{numbers}: passed over, without an update ({len(self.passed_over)} of at most {section.max_nonfinite_steps})"
        if section.on_nonfinite == "skip":
            return said
        back = manager.find_newest(num_steps)
        if back.resumed is None:
            raise _stopped(f"{numbers}, and there is no checkpoint to go back to")
        self.restore(manager, back)
        return f"{said}; gone back to step {self.step}"

    def load_best(self, manager: CheckpointManager) -> str:
        """Take the weights with the lowest validation loss, where ``load_best_at_end`` asks for it; which were taken, in words. Collective."""
        if not manager.section.load_best_at_end:
            return ""
        if self.step == self.best_step:
            self.exported = (self.step, cast(float, self.best_loss))
            return f"to be exported: the last weights, whose validation loss ({self.best_loss:.4f}) is the lowest"
        best = manager.find_best(self.best_step)
        if best is None or best[0] == self.step:
            return f"to be exported: the last weights, whose validation loss is the lowest of those that are saved{self._beyond(self.step)}"
        step, loss = best
        manager.load_weights(model_tensors(self._model), step)
        loss = cast(float, self.best_loss if step == self.best_step else loss)
        self.exported = (step, loss)
        return f"to be exported: the weights of step {step}, with validation loss {loss:.4f}{self._beyond(step)}"

    def _beyond(self, step: int) -> str:
        """That another step had a lower loss than the best that is saved."""
        is_known = self.best_step is not None and self.best_step != step
        return f"; step {self.best_step} had {self.best_loss:.4f}, and is not saved" if is_known else ""

    def check_finite(self) -> None:
        """That the trained weights are finite, before anybody is given them: a step need not have seen one that is not. Collective.

        Raises:
            NumbersError: on every rank.
        """
        spoiled = [name for name, tensor in model_tensors(self._model).items() if not torch.isfinite(local(tensor)).all()]
        if found := sorted({name for names in gather_objects(spoiled) for name in names}):
            raise _stopped(f"{found[0]} holds numbers that are not finite after step {self.step}: nothing is exported")


def _stopped(why: str) -> NumbersError:
    """All ranks have the same numbers, and so the same error."""
    error = NumbersError(why)
    error.agreed = True
    return error
