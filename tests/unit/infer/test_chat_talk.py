"""A conversation reads only what is new, and says what reading everything says."""

from collections.abc import Iterator

import pytest
import torch
from unit.samples import DEBUG_TOKENIZER, tiny_model

from tunelib.data.chat import find_template
from tunelib.data.tokenizer import Tokenizer
from tunelib.infer.chat import Conversation, TextStream, talk
from tunelib.infer.generate import Stops, generate
from tunelib.infer.sample import Sampling

TOKENIZER = Tokenizer(DEBUG_TOKENIZER)
TEMPLATE = find_template(TOKENIZER, "")
assert TEMPLATE is not None
STOPS = Stops(TOKENIZER.stop_ids | TEMPLATE.end_ids(), (), TOKENIZER)
SAMPLING = Sampling(1.0, seed=5)


def start(system: str = "") -> Conversation:
    assert TEMPLATE is not None
    return Conversation(tiny_model(torch.float32, vocab_size=640, max_position_embeddings=400), TEMPLATE, STOPS, 12, SAMPLING, system)


def test_every_turn_is_what_the_whole_conversation_gives() -> None:
    assert TEMPLATE is not None
    conversation, model, messages = start("Be kind."), tiny_model(torch.float32, vocab_size=640, max_position_embeddings=400), []
    messages.append({"role": "system", "content": "Be kind."})
    for text in ("Who are you?", "And where?", "Tell me more."):
        said = "".join(conversation.answer(text))
        messages.append({"role": "user", "content": text})
        ids = generate(model, [TEMPLATE.encode_prompt(messages)], 12, STOPS, SAMPLING)[0]
        assert said == STOPS.text_of(ids)
        assert said
        messages.append({"role": "assistant", "content": said})


def test_only_what_is_new_is_read() -> None:
    conversation, widths = start(), []
    conversation._model.model.layers["0"].register_forward_pre_hook(lambda _module, inputs: widths.append(inputs[0].shape[1]))
    list(conversation.answer("A first question that is long enough to be seen."))
    first, widths[:] = widths[0], []
    list(conversation.answer("Short."))
    assert widths[0] < first


def test_an_answer_that_is_broken_off_counts_as_far_as_it_came() -> None:
    conversation = start()
    pieces = conversation.answer("Who are you?")
    begun = next(pieces)
    pieces.close()
    assert conversation._messages[-1] == {"role": "assistant", "content": begun}
    assert "".join(conversation.answer("Go on."))


def run_talk(conversation: Conversation, lines: list[str]) -> str:
    given: Iterator[str] = iter(lines)
    written: list[str] = []

    def ask() -> str:
        try:
            return next(given)
        except StopIteration:
            raise EOFError from None

    talk(conversation, ask, written.append)
    return "".join(written)


def test_commands_and_a_conversation_that_grows_too_long() -> None:
    said = run_talk(start(), ["", "/help", "Hello", "word " * 400, "/reset", "Hello", "/exit", "never asked"])
    assert "/help is no command" in said
    assert "the model's context is 400: shorten it; /reset begins anew" in said
    assert "(forgotten)" in said
    assert "Traceback" not in said


def test_text_is_shown_when_it_is_certain() -> None:
    ids = TOKENIZER.encode("Grüße, 世界! 🏖 END and more", add_special_tokens=False).ids
    pieces = TextStream(Stops((), ("END",), TOKENIZER))
    shown = [pieces.add(token) for token in ids]
    assert "".join(shown) + pieces.end() == "Grüße, 世界! 🏖 "
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in shown)
    assert len([piece for piece in shown if piece]) > 3


@pytest.mark.parametrize("text", ["one two", "a E N"])
def test_a_stop_that_does_not_come_hides_nothing(text: str) -> None:
    pieces = TextStream(Stops((), ("END", " two thirds"), TOKENIZER))
    assert "".join(pieces.add(token) for token in TOKENIZER.encode(text, add_special_tokens=False).ids) + pieces.end() == text


def test_ctrl_c_cuts_an_answer_short_and_the_talk_goes_on() -> None:
    conversation, passes = start(), []
    layer = conversation._model.model.layers["1"]

    def interrupt(*_: object) -> None:
        passes.append(0)
        if len(passes) == 4:
            raise KeyboardInterrupt

    hook = layer.register_forward_pre_hook(interrupt)
    said = run_talk(conversation, ["Who are you?"])
    hook.remove()
    assert " …\n" in said
    begun = conversation._messages[-1]["content"]
    assert begun
    assert begun in said
    assert TEMPLATE is not None
    model = tiny_model(torch.float32, vocab_size=640, max_position_embeddings=400)
    prompt = TEMPLATE.encode_prompt([*conversation._messages, {"role": "user", "content": "Go on."}])
    assert "".join(conversation.answer("Go on.")) == STOPS.text_of(generate(model, [prompt], 12, STOPS, SAMPLING)[0])
