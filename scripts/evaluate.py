"""Measure a model on tasks of lm-eval: python scripts/evaluate.py CHECKPOINT --tasks NAME… [--limit 100]

The checkpoint may be a Hugging Face, Meta or DCP folder, a file of torch.save, or an adapter that names its base. Several processes share the work,
each with the whole model, and find the same numbers: torchrun --nproc-per-node 2 scripts/evaluate.py CHECKPOINT --tasks NAME…
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))

from tunelib.config.schema import Comm, Training
from tunelib.errors import ConfigError, DataError
from tunelib.formats import load_model
from tunelib.infer.harness import Exam, Questions, Reader, check_reader, make_table, open_tasks
from tunelib.infer.score import Crew
from tunelib.parallel.reduce import agreed, any_rank, gather_objects
from tunelib.parallel.runtime import leave, run_main, start


@dataclass(frozen=True)
class Words:
    """What to measure, and on what."""

    checkpoint: Annotated[Path, tyro.conf.arg(metavar="CHECKPOINT"), tyro.conf.Positional]
    """A checkpoint in any form, or an adapter folder that names its base."""
    tasks: tuple[str, ...]
    """Names of tasks or of groups of tasks."""
    include_path: str = ""
    """A folder with task files (.yaml) of your own."""
    limit: int | None = None
    """Only the first so many documents of each task: for a try, not for a figure to quote."""
    batch_size: int = 8
    """Rows have room for so many requests as long as their longest."""
    num_fewshot: int | None = None
    """Solved examples before each question; by default as many as the task says."""
    apply_chat_template: bool = False
    """Ask as the message of a user, in the model's chat template."""
    adapter: str = ""
    """A PEFT adapter folder for these weights."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type to compute in; auto is float32 on a CPU, the stored one on a GPU."""
    tokenizer_path: str = ""
    """A folder with a tokenizer, where it is not beside the weights."""
    chat_template: str = ""
    """As dataset.chat_template: a name, a .jinja file, or "none"."""


def main(argv: list[str]) -> None:
    words = tyro.cli(Words, args=argv, use_underscores=True, description=__doc__)
    with start(Training(), Comm()) as runtime:
        with agreed():
            least = {"limit": (words.limit, 1), "batch_size": (words.batch_size, 1), "num_fewshot": (words.num_fewshot, 0)}
            for name, (number, smallest) in least.items():
                if number is not None and number < smallest:
                    raise ConfigError(f"--{name} {number}: it is at least {smallest}")
            questions = Questions(words.tasks, words.include_path, words.num_fewshot, words.limit, words.apply_chat_template)
            tasks = open_tasks(questions)
            where = {"tokenizer_path": words.tokenizer_path, "chat_template": words.chat_template}
            loaded = load_model(words.checkpoint, adapter=words.adapter, dtype=words.dtype, device=runtime.device, **where)
            if loaded.tokenizer is None:
                raise DataError(f"no tokenizer lies with {words.checkpoint}: name a folder that has one with --tokenizer_path")
            context = loaded.model.config.max_position_embeddings
            reader = check_reader(Reader(loaded.tokenizer, loaded.template, context, words.batch_size), questions)
        crew = Crew(runtime.device, runtime.rank, runtime.world_size, gather_objects, lambda live: any_rank((live,), runtime.device)[0])
        results = Exam(questions, tasks, reader).ask(loaded.model, crew)
        if runtime.is_main:
            print(loaded.sentence, file=sys.stderr)
            print(make_table(results))


if __name__ == "__main__":
    leave(run_main(main, sys.argv[1:]))
