"""What a person sees while a run goes on: lines, and on a terminal a progress line that stays at the bottom."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

BAR = "step {n_fmt}/{total_fmt} |{bar:20}| {desc}  {elapsed}, ETA {remaining}"


class Console:
    """Prints on one rank, and is silent on the others.

    On a terminal the steps are a progress bar with an ETA; elsewhere each logged step is a plain line.
    """

    def __init__(self, active: bool):
        self._active = active
        self._bar: tqdm[Any] | None = None
        self._num_steps = 0

    def say(self, text: str) -> None:
        """A line of its own; nothing where there is nothing to say."""
        if self._active and text:
            with _bearing():
                tqdm.write(text) if self._bar is not None else print(text, flush=True)

    def start_steps(self, num_steps: int, done: int) -> None:
        """The loop begins."""
        self._num_steps = num_steps
        if self._active and sys.stdout.isatty():
            self._bar = tqdm(total=num_steps, initial=done, bar_format=BAR, dynamic_ncols=True, file=sys.stdout, smoothing=0.05)

    def step(self, row: dict[str, Any]) -> None:
        """A logged step; ``row`` is what metrics.jsonl gets."""
        figures = f"loss {row['loss']:.4f}  grad norm {row['grad_norm']:.3f}  {row['tokens_per_second']:,.0f} tokens/s  {row['memory_gib']:.2f} GiB"
        if self._bar is not None:
            self._bar.set_description_str(figures, refresh=False)
            self._bar.update(row["step"] - self._bar.n)
        elif self._active:
            left = (self._num_steps - row["step"]) * row["seconds_per_step"]
            self.say(f"step {row['step']:>{len(str(self._num_steps))}}/{self._num_steps}  {figures}  lr {row['lr']:.2e}  ETA {_clock(left)}")

    def end_steps(self) -> None:
        """The loop is over."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


@contextlib.contextmanager
def _bearing() -> Iterator[None]:
    """Go on in silence when nobody reads any more, as when Ctrl-C has ended the ``tee`` behind a pipe, too."""
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
