"""Figures and log-likelihoods are those of lm-eval's own "hf" model on the exported folder."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, run_ranks
from unit.samples import DEBUG_TOKENIZER, tiny_model, write_model

from tunelib.data.tokenizer import Tokenizer
from tunelib.formats import load_model
from tunelib.infer.harness import Answers, Exam, Questions, Reader, open_tasks, quiet
from tunelib.infer.score import Crew

CPU = torch.device("cpu")
ALONE = Crew(CPU)
CONTEXT = 64
FACTS = [json.loads(line) for line in (ROOT / "train_configs/assets/debug/facts.jsonl").read_text().splitlines()]
SCORES_OFF = 1e-3
"""float32 on both sides, in other orders; log-probabilities of a few tokens are near −30."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drawn model with the debug tokenizer, which says as an export does what ends an answer."""
    model = tiny_model(torch.float32, vocab_size=640, max_position_embeddings=CONTEXT)
    folder = write_model(tmp_path_factory.mktemp("model") / "model", model, DEBUG_TOKENIZER)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": sorted(Tokenizer(DEBUG_TOKENIZER).stop_ids)}))
    return folder


def make_reference(folder: Path) -> Any:
    with quiet():
        from lm_eval.models.huggingface import HFLM

        return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4)


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    return make_reference(folder)


def make_answers(folder: Path, batch_size: int = 4, crew: Crew = ALONE) -> Answers:
    loaded = load_model(folder, device=CPU)
    assert loaded.tokenizer is not None
    return Answers(loaded.model, Reader(loaded.tokenizer, loaded.template, loaded.model.config.max_position_embeddings, batch_size), crew)


def ask_reference(reference: Any, kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    with quiet():
        return getattr(reference, kind)([Instance(kind, {}, words, 0) for words in arguments], disable_tqdm=True)


def long_texts() -> list[str]:
    """Texts of very different lengths, some much longer than the context."""
    chance = random.Random(0)
    return [" ".join(fact["answer"] for fact in chance.choices(FACTS, k=count)) for count in (1, 2, 5, 12, 25)]


PAIRS = [
    *((fact["question"], " " + choice) for fact in FACTS[:6] for choice in fact["choices"][:4]),
    *((text, " Nora's house is green.") for text in long_texts()),  # too long: the beginning is cut off
    ("", "Nora's house is green."),
    ("A space at the end ", "belongs to what follows."),
    ("<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n", "Nora."),
]


@pytest.mark.parametrize("batch_size", [1, 16])
def test_log_likelihoods_are_those_of_lm_evals_own_model(folder: Path, reference: Any, batch_size: int) -> None:
    ours, theirs = make_answers(folder, batch_size).log_likelihoods(PAIRS), ask_reference(reference, "loglikelihood", PAIRS)
    assert [is_greedy for _, is_greedy in ours] == [is_greedy for _, is_greedy in theirs]
    assert [score for score, _ in ours] == pytest.approx([score for score, _ in theirs], abs=SCORES_OFF)


def test_continuation_that_is_what_the_model_would_say_is_known_as_such(folder: Path, reference: Any) -> None:
    (said,) = make_answers(folder).continuations([("Who is", {"until": [], "max_gen_toks": 3})])
    pairs = [("Who is", said), ("Who is", said + "x")]
    greedy = [is_greedy for _, is_greedy in make_answers(folder).log_likelihoods(pairs)]
    assert greedy == [is_greedy for _, is_greedy in ask_reference(reference, "loglikelihood", pairs)]


def test_log_likelihoods_of_whole_texts_are_those_of_lm_evals_own_model(folder: Path, reference: Any) -> None:
    texts = long_texts()
    theirs = ask_reference(reference, "loglikelihood_rolling", [(text,) for text in texts])
    assert make_answers(folder).rolling_log_likelihoods(texts) == pytest.approx(theirs, rel=1e-5)


def test_answers_are_those_of_lm_evals_own_model(folder: Path, reference: Any) -> None:
    prompts = [
        (text, {"until": ["e", "\n"], "max_gen_toks": 12, "do_sample": False}) for text in [*long_texts(), *(fact["question"] for fact in FACTS)]
    ]
    prompts += [(fact["question"], {"until": "a", "max_gen_toks": 7}) for fact in FACTS[:5]]
    theirs = ask_reference(reference, "generate_until", prompts)
    assert make_answers(folder).continuations(prompts) == theirs
    assert len(set(theirs)) > 5


def ask_ours(folder: Path, questions: Questions) -> dict[str, Any]:
    answers = make_answers(folder)
    return Exam(questions, open_tasks(questions), answers.reader).ask(answers.model, ALONE)["results"]


def ask_theirs(reference: Any, questions: Questions) -> dict[str, Any]:
    from lm_eval.evaluator import evaluate

    with quiet():
        chat = {"apply_chat_template": questions.as_chat}
        return evaluate(lm=reference, task_dict=open_tasks(questions), limit=questions.limit, log_samples=False, bootstrap_iters=1000, **chat)[
            "results"
        ]


BOTH = ("larkhaven_choice", "larkhaven_answer")


@pytest.mark.parametrize("as_chat", [False, True])
def test_figures_of_tasks_are_those_of_lm_evals_own_model(folder: Path, reference: Any, monkeypatch: pytest.MonkeyPatch, as_chat: bool) -> None:
    monkeypatch.chdir(ROOT)
    questions = Questions(BOTH, "train_configs/tasks", limit=20, as_chat=as_chat)
    ours = ask_ours(folder, questions)
    assert ours == ask_theirs(reference, questions)
    assert 0 < ours["larkhaven_choice"]["acc,none"] < 1


def test_two_processes_print_what_one_does_and_what_is_true(folder: Path, reference: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = [str(folder), "--tasks", *BOTH, "--include_path", "train_configs/tasks", "--batch_size", "2"]
    one, two = (run_ranks(ROOT / "scripts/evaluate.py", words, world_size)[0] for world_size in (1, 2))
    assert one == two
    for task, figures in ask_theirs(reference, Questions(BOTH, "train_configs/tasks")).items():
        own = next(value for name, value in figures.items() if "," in name and "stderr" not in name)
        cells = next(line for line in one.splitlines() if task in line).split("|")
        assert float(cells[7]) == pytest.approx(own, abs=1e-4), cells


@pytest.mark.slow  # a real model, read by both
@pytest.mark.timeout(1200)
def test_figures_of_a_real_model_are_those_of_lm_evals_own(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    reference = make_reference(smollm2)
    for as_chat in (False, True):
        questions = Questions(BOTH, "train_configs/tasks", limit=20, as_chat=as_chat)
        assert ask_ours(smollm2, questions) == ask_theirs(reference, questions)
    ours, theirs = make_answers(smollm2).log_likelihoods(PAIRS), ask_reference(reference, "loglikelihood", PAIRS)
    assert [is_greedy for _, is_greedy in ours] == [is_greedy for _, is_greedy in theirs]
    assert [score for score, _ in ours] == pytest.approx([score for score, _ in theirs], abs=SCORES_OFF)
    texts = [" ".join(long_texts())]
    assert make_answers(smollm2).rolling_log_likelihoods(texts) == pytest.approx(
        ask_reference(reference, "loglikelihood_rolling", [tuple(texts)]), rel=1e-5
    )
