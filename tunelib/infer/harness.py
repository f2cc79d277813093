"""Tasks of lm-eval (EleutherAI's evaluation harness), answered by our model.

lm-eval knows the tasks: it makes the requests, and figures of the answers. Every process has it do that for all documents; the rows of the requests
are dealt out over the processes, and what they find is gathered, so that all have the same figures, on any layout.
"""

import contextlib
import functools
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.distributed.tensor import DTensor

from tunelib.config.fields import find_nearest
from tunelib.config.schema import Validation
from tunelib.data.chat import ChatTemplate
from tunelib.data.tokenizer import Tokenizer
from tunelib.errors import ConfigError, DataError
from tunelib.infer.generate import Stops, stream
from tunelib.infer.score import Crew, Interrupted, Text, continue_texts, deal_rows, pack_padded, score_texts
from tunelib.model.decoder import Decoder
from tunelib.parallel.fsdp import forward_only

MAX_NEW_TOKENS = 256
"""Longest answer of a task that does not say, as lm-eval's own models have it."""
BOOTSTRAP_ITERATIONS = 1000
"""Samples that a standard error is estimated with where there is no formula for it."""


@dataclass(frozen=True)
class Questions:
    """What is asked.

    Attributes:
        names: of tasks or of groups of tasks.
        folder: with further task files; "" for none.
        num_fewshot: solved examples before each question; None for as many as the task says.
        limit: only the first so many documents of each task; None for all.
        as_chat: ask as the message of a user, in the chat template.
        says: the setting that names the tasks, for messages.
    """

    names: Sequence[str]
    folder: str = ""
    num_fewshot: int | None = None
    limit: int | None = None
    as_chat: bool = False
    says: str = "--tasks"


@dataclass(frozen=True)
class Reader:
    """How requests become tokens, and how many at once.

    Attributes:
        context: the most positions that the model takes; what is longer loses its beginning.
        batch_size: a row has room for so many requests as long as its longest, or for ``positions``, if that is more.
    """

    tokenizer: Tokenizer
    template: ChatTemplate | None
    context: int
    batch_size: int
    positions: int = 0

    def room(self, longest: int) -> int:
        """How many positions a row may have whose longest request has so many."""
        return max(self.batch_size * longest, self.positions)

    @property
    def prefix_id(self) -> int:
        """What an empty context is: bos, or eos where there is none."""
        ids = self.tokenizer.special_ids
        found = ids.get("bos_token_id", ids.get("eos_token_id"))
        if found is None:
            raise DataError(f"{self.tokenizer.folder} names neither a bos_token nor an eos_token, one of which stands for an empty context")
        return found

    @functools.cached_property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer: the tokenizer's, and those of the template."""
        return self.tokenizer.stop_ids | (self.template.end_ids() if self.template else frozenset())

    def encode(self, text: str) -> list[int]:
        """Ids of a text with what the tokenizer puts before and after one, unless it begins with that already, as a chat template's does."""
        prefix = self.tokenizer.decode([self.prefix_id], skip_special_tokens=False)
        return self.tokenizer.encode(text, add_special_tokens=not text.startswith(prefix)).ids


def open_exam(section: Validation, tokenizer: Tokenizer, template: ChatTemplate | None, context: int, positions: int) -> "Exam | None":
    """The tasks of [validation], ready to be asked; None where it names none.

    Args:
        context: the most positions that the model takes.
        positions: of a micro-batch, which fits the memory.

    Raises:
        ConfigError: lm-eval is not installed, or does not know a task.
        DataError: the data of a task cannot be had, or there is no chat template.
    """
    if not section.tasks:
        return None
    questions = Questions(section.tasks, section.task_path, None, section.task_limit, section.task_chat_template, "validation.tasks")
    return Exam(questions, open_tasks(questions), check_reader(Reader(tokenizer, template, context, 1, positions), questions))


@dataclass(frozen=True)
class Exam:
    """Tasks whose data is there, and how they are asked; `open_exam` makes one for training."""

    questions: Questions
    tasks: dict[str, dict[str, Any]]
    reader: Reader

    def score(self, model: Decoder, crew: Crew) -> dict[str, float] | None:
        """Figures by name, such as "tasks/hellaswag/acc"; None where a signal ended it. Collective."""
        try:
            results = self.ask(model, crew, num_bootstraps=0)
        except Interrupted:
            return None
        return name_scores(results["results"])

    def ask(self, model: Decoder, crew: Crew, num_bootstraps: int = BOOTSTRAP_ITERATIONS) -> dict[str, Any]:
        """What lm-eval makes of the model's answers, the same on every process. Collective.

        Raises:
            Interrupted: on every process.
            DataError: lm-eval does not take the tasks, such as ones that run what a model writes.
        """
        from lm_eval.evaluator import evaluate

        try:
            with quiet():
                return evaluate(
                    lm=build_lm(Answers(model, self.reader, crew)),
                    task_dict=self.tasks,
                    limit=self.questions.limit,
                    bootstrap_iters=num_bootstraps,
                    log_samples=False,
                    apply_chat_template=self.questions.as_chat,
                )
        except ValueError as error:
            raise DataError(f"{self.questions.says} {' '.join(self.questions.names)}: lm-eval refuses: {_first_line(error)}") from error


def open_tasks(questions: Questions) -> dict[str, dict[str, Any]]:
    """lm-eval's tasks, with their data.

    Raises:
        ConfigError: lm-eval is not installed, or does not know a task.
        DataError: the data of a task cannot be had.
    """
    says = f"{questions.says} {' '.join(questions.names)}"
    if questions.folder and not os.path.isdir(questions.folder):
        raise ConfigError(f"{says}: {questions.folder} is no folder; task files (.yaml) are looked for there")
    try:
        with quiet():
            from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(f"{says}: lm-eval is not installed ({error}); pip install lm-eval") from None
    with quiet():
        manager = TaskManager(include_path=questions.folder or None, include_defaults=False)
        if set(questions.names) - set(manager.all_subtasks):  # a folder's own tasks need no list of lm-eval's, which takes seconds
            manager = TaskManager(include_path=questions.folder or None)
        for name in questions.names:
            if name not in manager.all_tasks:
                near = find_nearest(name, manager.all_tasks)
                raise ConfigError(f"{says}: lm-eval knows no task {name!r}{f'; did you mean {near!r}?' if near else ''}{_where(questions)}")
        tasks: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
        for name in questions.names:
            try:
                for kind, loaded in manager.load([name]).items():
                    tasks[kind] |= loaded
            except Exception as error:
                raise DataError(f"{says}: the task {name!r} cannot be opened: {_first_line(error)}") from error
    for task in tasks["tasks"].values():
        if task.OUTPUT_TYPE == "generate_until":
            read_settings(dict(task.config.generation_kwargs or {}))  # raises for what is not built
        if questions.num_fewshot is not None:
            task.set_config(key="num_fewshot", value=questions.num_fewshot)
    return tasks


def check_reader(reader: Reader, questions: Questions) -> Reader:
    """The reader, which is fit for the questions; raises DataError."""
    if questions.as_chat and reader.template is None:
        raise DataError(f"{questions.says}: the questions are to be asked in a chat template, and there is none")
    _ = reader.prefix_id
    return reader


@dataclass(frozen=True)
class Answers:
    """A model's side of lm-eval's three kinds of requests. Collective, each of them."""

    model: Decoder
    reader: Reader
    crew: Crew

    def log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """For each context and continuation the continuation's log-probability, and whether it is what the model would say."""
        return self._score([self._encode_pair(*pair) for pair in pairs])

    def rolling_log_likelihoods(self, texts: Sequence[str]) -> list[float]:
        """The log-probability of each whole text; one that is too long in windows, in which each token has as much before it as there is room for."""
        windows = [list(_windows(self.reader.encode(text), self.reader.prefix_id, self.reader.context)) for text in texts]
        scores = iter(self._score([window for of_text in windows for window in of_text]))
        return [sum(next(scores)[0] for _ in of_text) for of_text in windows]

    def continuations(self, prompts: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
        """Greedy answers; each prompt comes with the task's generation_kwargs.

        Raises:
            ConfigError: a task wants something else than the most probable tokens.
        """
        kinds: dict[tuple[tuple[str, ...], int], list[int]] = {}
        for number, (_, settings) in enumerate(prompts):
            kinds.setdefault(read_settings(settings), []).append(number)
        answers: dict[int, str] = {}
        for (stops, max_new_tokens), numbers in kinds.items():
            answers |= zip(numbers, self._continue([prompts[number][0] for number in numbers], stops, max_new_tokens), strict=True)
        return [answers[number] for number in range(len(prompts))]

    def _continue(self, prompts: Sequence[str], stop_texts: tuple[str, ...], max_new_tokens: int) -> list[str]:
        if (most := self.reader.context - max_new_tokens) < 1:
            raise ConfigError(f"a task wants {max_new_tokens} tokens (max_gen_toks), and the model's context is {self.reader.context}: give it fewer")
        stops = Stops(self.reader.stop_ids, stop_texts, self.reader.tokenizer)
        ids = [self.reader.encode(prompt)[-most:] for prompt in prompts]
        if not is_whole(self.model):
            return continue_texts(self.model, ids, self.reader.room, max_new_tokens, stops, self.crew)
        found: dict[int, str] = {}
        rows = pack_padded([len(prompt) + max_new_tokens for prompt in ids], self.reader.room)
        with forward_only(self.model):
            for row in deal_rows(rows, self.crew):
                if self.crew.should_stop():
                    raise Interrupted
                answers: list[list[int]] = [[] for _ in row]
                for place, token in stream(self.model, [ids[number] for number in row], max_new_tokens, stops):
                    answers[place].append(token)
                    self.crew.renew()
                found |= {number: stops.text_of(answer) for number, answer in zip(row, answers, strict=True)}
        together = {number: answer for part in self.crew.gather(found) for number, answer in part.items()}
        return [together[number] for number in range(len(ids))]

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        most = self.reader.context + 1  # the last token is asked about, and not read
        texts = [Text([*context, *continuation][-most:], min(len(continuation), self.reader.context)) for context, continuation in pairs]
        return score_texts(self.model, texts, self.reader.room, self.crew)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of both, which are those of the two together; spaces between them belong to the continuation."""
        if not context:
            prefix, ids = self.reader.prefix_id, self.reader.tokenizer.encode(continuation, add_special_tokens=False).ids
            return ([prefix], ids) if ids[:1] != [prefix] else (ids[:1], ids[1:])
        spaces = len(context) - len(context.rstrip())
        whole, before = self.reader.encode(context + continuation), self.reader.encode(context[: len(context) - spaces])
        return before, whole[len(before) :]


def _windows(ids: Sequence[int], prefix_id: int, context: int) -> Iterator[tuple[list[int], list[int]]]:
    """A long text as contexts and continuations: each token is asked about once, and the last window reaches back as far as there is room."""
    for first in range(0, len(ids), context):
        last = min(first + context, len(ids))
        if first == 0:
            yield [prefix_id], list(ids[:last])
        else:
            yield list(ids[last - context - 1 : first]), list(ids[first:last])


def read_settings(settings: dict[str, Any]) -> tuple[tuple[str, ...], int]:
    """A task's generation_kwargs: the texts that end an answer, and the most tokens that it may have.

    Raises:
        ConfigError: the task wants something else than greedy answers.
    """
    drawn = settings.get("do_sample")
    if (drawn if drawn is not None else settings.get("temperature")) or (settings.get("num_beams") or 1) > 1:
        shown = ", ".join(f"{name}: {settings[name]}" for name in ("do_sample", "temperature", "num_beams") if name in settings)
        raise ConfigError(f"a task wants other answers than the most probable tokens ({shown}); set do_sample: false in a task file of your own")
    until = settings.get("until") or []
    longest = next((settings[name] for name in ("max_gen_toks", "max_new_tokens", "max_tokens") if settings.get(name)), MAX_NEW_TOKENS)
    return tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop), int(longest)


def is_whole(model: Decoder) -> bool:
    """Whether all of a model lies on this process, so that it can generate with a cache."""
    return model.pipeline is None and not any(isinstance(parameter, DTensor) for parameter in model.parameters())


def build_lm(answers: Answers) -> Any:
    """What lm-eval calls a language model."""
    from lm_eval.api.model import LM

    class Examinee(LM):
        tokenizer_name = str(answers.reader.tokenizer.folder)

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            return answers.log_likelihoods([request.args for request in requests])

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            return answers.rolling_log_likelihoods([request.args[0] for request in requests])

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            return answers.continuations([request.args for request in requests])

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            assert answers.reader.template is not None, "checked in check_reader"
            return answers.reader.template.render(chat_history, add_generation_prompt=add_generation_prompt)

    return Examinee()


def name_scores(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """lm-eval's figures by the names that metrics.jsonl has: "tasks/TASK/METRIC", and "/FILTER" where the task has filters."""
    scores = {}
    for task, figures in results.items():
        for key, value in figures.items():
            metric, _, kind = key.partition(",")
            if kind and not metric.endswith("_stderr") and isinstance(value, int | float):
                scores[f"tasks/{task}/{metric}{'' if kind == 'none' else f'/{kind}'}"] = float(value)
    return scores


def describe_scores(scores: dict[str, float]) -> str:
    """Figures in a line."""
    return ", ".join(f"{name.removeprefix('tasks/').replace('/', ' ')} {value:.4f}" for name, value in scores.items())


def make_table(results: dict[str, Any]) -> str:
    """lm-eval's own table."""
    from lm_eval.utils import make_table

    with quiet():
        return make_table(results)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the log, progress lines and warnings of lm-eval and what it uses; errors are raised all the same."""
    import datasets
    from tqdm.std import tqdm

    logger = logging.getLogger("lm_eval")
    level, make_bar, shows_bars = logger.level, tqdm.__init__, not datasets.are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        tqdm.__init__ = functools.partialmethod(make_bar, disable=True)  # lm-eval has no word for it
        datasets.disable_progress_bars()
        try:
            yield
        finally:
            logger.setLevel(level)
            tqdm.__init__ = make_bar
            if shows_bars:
                datasets.enable_progress_bars()


def _where(questions: Questions) -> str:
    return f"; task files were looked for in {questions.folder}, too" if questions.folder else "; a folder with task files of yours may be given, too"


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no more is said'}"
