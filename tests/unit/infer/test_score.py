"""What a model thinks of a text does not depend on what lies beside it in its row, nor on how many processes share the work."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from unit.samples import DEBUG_TOKENIZER, tiny_model

from tunelib.batch import IGNORED
from tunelib.data.tokenizer import Tokenizer
from tunelib.infer.generate import Stops, generate_greedy
from tunelib.infer.score import Crew, Interrupted, Text, continue_texts, deal_rows, pack, score_texts
from tunelib.model.loss import POSITIONS_AT_ONCE, find_labelled, take, token_scores

CPU = torch.device("cpu")
ALONE = Crew(CPU)


def make_texts(count: int, vocab_size: int = 48, longest: int = 20) -> list[Text]:
    chance = random.Random(0)
    ids = [[chance.randrange(vocab_size) for _ in range(chance.randint(2, longest))] for _ in range(count)]
    return [Text(text, chance.randint(1, len(text) - 1)) for text in ids]


def room_for(size: int) -> Callable[[int], int]:
    return lambda longest: size


@pytest.mark.parametrize("size", [1, 30, 10_000])
def test_log_probabilities_are_those_of_the_text_by_itself(size: int) -> None:
    model, texts = tiny_model(), make_texts(12)
    for text, (log_probability, is_greedy) in zip(texts, score_texts(model, texts, room_for(size), ALONE), strict=True):
        ids = torch.tensor([text.ids])
        logits = model(ids, torch.arange(len(text.ids))[None], (len(text.ids),))[0, :-1].log_softmax(-1)[-text.num_asked :]
        asked = ids[0, -text.num_asked :]
        assert log_probability == pytest.approx(logits.gather(1, asked[:, None]).sum().item(), rel=1e-12)  # float64
        assert is_greedy == bool((logits.argmax(-1) == asked).all())


def test_greedy_text_is_known_as_such() -> None:
    model = tiny_model()
    ids = [3, 1, 4, *generate_greedy(model, [3, 1, 4], 5, (), CPU)]
    others = [3, 1, 4, *[(token + 1) % 48 for token in ids[3:]]]
    assert [is_greedy for _, is_greedy in score_texts(model, [Text(ids, 5), Text(others, 5)], room_for(100), ALONE)] == [True, False]


def test_head_is_computed_in_pieces_where_something_is_asked_and_nowhere_else() -> None:
    sizes: list[int] = []
    labels = torch.zeros(1, 3 * POSITIONS_AT_ONCE, dtype=torch.int64)
    labels[0, POSITIONS_AT_ONCE // 2 : POSITIONS_AT_ONCE] = IGNORED
    asked = find_labelled(labels)

    def head(hidden: torch.Tensor) -> torch.Tensor:
        sizes.append(len(hidden))
        return hidden @ torch.ones(4, 7)

    assert token_scores(take(asked, torch.randn(1, 3 * POSITIONS_AT_ONCE, 4)), take(asked, labels), head).shape == (5 * POSITIONS_AT_ONCE // 2, 2)
    assert sizes == [POSITIONS_AT_ONCE, POSITIONS_AT_ONCE, POSITIONS_AT_ONCE // 2]


def test_rows_hold_all_texts_once_and_no_more_than_there_is_room_for() -> None:
    lengths = [3, 9, 1, 5, 5, 12, 2]
    rows = pack(lengths, room_for(10))
    assert sorted(number for row in rows for number in row) == list(range(7))
    assert all(sum(lengths[number] for number in row) <= 10 or len(row) == 1 for row in rows)
    assert [lengths[number] for row in rows for number in row] == sorted(lengths, reverse=True)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_each_process_takes_as_many_rows_as_the_others_and_together_they_take_all(size: int) -> None:
    rows = [[number] for number in range(7)]
    dealt = [deal_rows(rows, Crew(CPU, rank, size)) for rank in range(size)]
    assert len({len(own) for own in dealt}) == 1
    assert sorted({row[0] for own in dealt for row in own}) == list(range(7))
    assert deal_rows([], Crew(CPU, 1, 2)) == []


def test_shared_work_gives_the_numbers_of_one_process_bit_for_bit() -> None:
    model, texts = tiny_model(torch.float32), make_texts(11)
    parts: list[Any] = []

    def keep(found: Any) -> list[Any]:
        parts.append(found)
        return [found]

    for rank in (0, 1):
        with pytest.raises(KeyError):  # it has its own part alone
            score_texts(model, texts, room_for(30), Crew(CPU, rank, 2, keep))
    assert score_texts(model, texts, room_for(30), Crew(CPU, 0, 2, lambda found: parts)) == score_texts(model, texts, room_for(30), ALONE)


@pytest.mark.parametrize("size", [1, 60, 10_000])
def test_answers_are_those_of_each_prompt_by_itself(size: int) -> None:
    model, tokenizer = tiny_model(vocab_size=640), Tokenizer(DEBUG_TOKENIZER)
    prompts = [list(text.ids) for text in make_texts(7, 640)]
    alone = [generate_greedy(model, prompt, 6, (), CPU) for prompt in prompts]
    end = alone[0][3]  # so that some end early
    answers = continue_texts(model, prompts, room_for(size), 6, Stops((end,), (), tokenizer), ALONE)
    assert answers == [tokenizer.decode(ids[: ids.index(end)] if end in ids else ids) for ids in alone]
    stop = tokenizer.decode(alone[1][2:4])
    texts = continue_texts(model, prompts, room_for(size), 6, Stops((), (stop,), tokenizer), ALONE)
    assert texts == [tokenizer.decode(ids).split(stop)[0] for ids in alone]


def test_signal_ends_it_between_two_rows() -> None:
    asked = iter([False, False, True])
    with pytest.raises(Interrupted):
        score_texts(tiny_model(), make_texts(12), room_for(20), Crew(CPU, should_stop=lambda: next(asked)))
    assert list(asked) == []
