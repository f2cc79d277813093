"""What a person can have got wrong about tasks is a sentence; figures have names."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from unit.samples import DEBUG_TOKENIZER, open_tokenizer

from tunelib.config.schema import Validation
from tunelib.data.chat import find_template
from tunelib.data.tokenizer import Tokenizer
from tunelib.errors import ConfigError, DataError
from tunelib.infer.harness import Questions, Reader, check_reader, describe_scores, name_scores, open_exam, open_tasks, read_settings

TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: label
metric_list:
  - metric: acc
"""


def write_task(folder: Path, name: str = "tiny_choice", rows: int = 3) -> Path:
    folder.mkdir(exist_ok=True)
    data = folder / f"{name}.jsonl"
    questions = [{"question": f"Number {number}?", "choices": ["one", "two"], "label": number % 2} for number in range(rows)]
    data.write_text("".join(json.dumps(question) + "\n" for question in questions))
    (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data))
    return folder


def open_for_training(**settings: Any) -> Any:
    tokenizer = Tokenizer(DEBUG_TOKENIZER)
    return open_exam(Validation(enable=True, **settings), tokenizer, find_template(tokenizer, ""), 64, 128)


def test_no_tasks_are_no_exam_and_need_no_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert open_for_training() is None


def test_missing_lm_eval_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ConfigError, match=r"^validation.tasks hellaswag: lm-eval is not installed \(.*\); pip install lm-eval$"):
        open_for_training(tasks=("hellaswag",))


@pytest.fixture
def without_lm_evals_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The list of lm-eval's own tasks, which takes many seconds, is left out."""
    import lm_eval.tasks

    manager = lm_eval.tasks.TaskManager
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda include_path, include_defaults=False: manager(None, include_path, False))


@pytest.mark.slow  # reads the list of lm-eval's own tasks
def test_lm_evals_own_tasks_are_known() -> None:
    with pytest.raises(ConfigError, match="--tasks helaswag: lm-eval knows no task 'helaswag'; did you mean 'hellaswag'"):
        open_tasks(Questions(("helaswag",)))


@pytest.mark.usefixtures("without_lm_evals_own")
def test_unknown_task_is_a_sentence_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=f"validation.tasks tiny_choise: lm-eval knows no task 'tiny_choise'; did you mean 'tiny_choice'.*{tmp_path}"
    ):
        open_for_training(tasks=("tiny_choise",), task_path=str(write_task(tmp_path)))


def test_folder_of_tasks_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere is no folder; task files"):
        open_tasks(Questions(("x",), str(tmp_path / "nowhere")))


def test_data_that_cannot_be_had_is_a_sentence_that_names_the_task(tmp_path: Path) -> None:
    folder = write_task(tmp_path)
    (folder / "tiny_choice.jsonl").unlink()
    with pytest.raises(DataError, match=r"--tasks tiny_choice: the task 'tiny_choice' cannot be opened: FileNotFoundError: .*tiny_choice\.jsonl"):
        open_tasks(Questions(("tiny_choice",), str(folder)))


@pytest.mark.slow  # reads the list of lm-eval's own tasks
def test_task_that_would_download_without_a_network_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="the task 'arc_easy' cannot be opened: "):
        open_tasks(Questions(("arc_easy",)))


def test_chat_template_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(tmp_path, ["<s>"], bos_token="<s>")
    with pytest.raises(DataError, match=r"validation\.tasks: the questions are to be asked in a chat template, and there is none"):
        check_reader(Reader(tokenizer, None, 64, 1), Questions(("x",), as_chat=True, says="validation.tasks"))


def test_tokenizer_without_a_first_token_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="names neither a bos_token nor an eos_token"):
        check_reader(Reader(open_tokenizer(tmp_path, ["<s>"]), None, 64, 1), Questions(("x",)))


def test_answers_that_are_to_be_drawn_are_refused() -> None:
    with pytest.raises(ConfigError, match="do_sample"):
        read_settings({"do_sample": True, "temperature": 0.7})
    with pytest.raises(ConfigError, match="num_beams: 4"):
        read_settings({"num_beams": 4})
    assert read_settings({"do_sample": False, "temperature": 0.7, "num_beams": 1, "until": "x"}) == (("x",), 256)
    assert read_settings({"until": ["a", "", "b"], "max_new_tokens": 5}) == (("a", "b"), 5)


def test_names_of_figures_say_task_metric_and_filter() -> None:
    results = {"quiz": {"alias": "quiz", "acc,none": 0.25, "acc_stderr,none": 0.1, "exact_match,line": 1, "samples": 4, "f1_stderr,none": "N/A"}}
    scores = name_scores(results)
    assert scores == {"tasks/quiz/acc": 0.25, "tasks/quiz/exact_match/line": 1.0}
    assert describe_scores(scores) == "quiz acc 0.2500, quiz exact_match line 1.0000"
