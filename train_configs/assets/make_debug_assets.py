#!/usr/bin/env python3
"""Make the data and the tokenizer of the debug model: train_configs/assets/debug/.

    python train_configs/assets/make_debug_assets.py [FOLDER]

An invented village, Larkhaven: eight people, five facts about each, every fact asked for in many ways. A model that has read most
of the phrasings can answer the rest, and it cannot have read about Larkhaven anywhere else. An answer follows from the question
alone, so a greedy answer is right or wrong. Given up: variety; a model trained on this can talk about nothing else.

No random numbers: which of all possible conversations are taken, and their order, follows from sha256, so the files come out
byte for byte the same on every Python and every machine.
"""

import hashlib
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "debug"
VOCAB_SIZE = 640
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

RESERVED = ("What colour is Nora's house?", "Which animal does Otto keep?", "Who is the teacher?")
"""Never asked in the data, each being a seen phrasing of a seen fact: the debug configs' validation.prompts."""

SHARES = {"plain": 700, "who": 600, "check": 200, "brief": 150, "guide": 150, "dialogue": 200}
"""How many conversations of each kind are taken."""

OPENERS = ("", "Hello! ", "Excuse me. ", "Good morning. ", "I have a question. ")
"""What may stand before a question."""
BRIEF = "Answer in one word."
GUIDE = "You are the village guide of Larkhaven. Answer in one full sentence."

README = """# The debug data

Written by `train_configs/assets/make_debug_assets.py`, never by hand; a test holds the files to be the script's, byte for byte.

- `chat.jsonl`: {count} conversations about the invented village Larkhaven, one JSON object a line with `messages`
  (`role`: system, user or assistant; `content`).
- `facts.jsonl`: {facts} questions, one for each fact, in words that the conversations never use, with the right answer among all that
  there could be: for the tasks in `train_configs/tasks`.
- `tokenizer/`: a byte-level BPE of {vocab} tokens trained on that text with the `tokenizers` library, with ChatML as its chat template.

These questions are not in the data, though their facts and their phrasings are; the debug configs ask them:

{prompts}

Licence: CC0 1.0. The text was generated for this project from sentence patterns written for it; do with it what you like.
"""

PEOPLE = {  # name: he or she
    "Nora": "she",
    "Otto": "he",
    "Clara": "she",
    "Felix": "he",
    "Greta": "she",
    "Hugo": "he",
    "Ida": "she",
    "Jonas": "he",
}


@dataclass(frozen=True)
class Topic:
    """One kind of fact. In its sentences {n} is the name, {v} the value, {they}/{their} the pronouns."""

    values: str
    """One value per person, in the order of PEOPLE, none twice: so that "who" has one answer."""
    answer: str
    ask: tuple[str, ...]
    ask_again: tuple[str, ...]
    """Questions that lean on an earlier turn."""
    who: tuple[str, ...]
    check: tuple[str, ...]
    """Yes or no questions."""
    exam: str
    """What is asked in facts.jsonl, and nowhere in the conversations."""


TOPICS = (
    Topic(
        "baker miller tailor painter doctor gardener teacher sailor",
        "{n} is the {v}.",
        ("What is {n}'s job?", "What does {n} do for a living?", "Which job does {n} have?", "Tell me what {n}'s job is.", "What work does {n} do?"),
        ("And what is {their} job?", "What does {they} do for a living?"),
        ("Who is the {v}?", "Who is the {v} of Larkhaven?", "Can you name the {v}?", "Tell me who the {v} is."),
        ("Is {n} the {v}?", "Is it true that {n} is the {v}?"),
        "As what does {n} work?",
    ),
    Topic(
        "green blue red yellow white brown grey purple",
        "{n}'s house is {v}.",
        ("What colour is {n}'s house?", "Which colour is {n}'s house?", "Tell me the colour of {n}'s house.", "What is the colour of {n}'s house?"),
        ("And what colour is {their} house?", "What is the colour of {their} house?"),
        ("Whose house is {v}?", "Who lives in the {v} house?", "Who owns the {v} house?", "Tell me whose house is {v}."),
        ("Is {n}'s house {v}?", "Is it true that {n}'s house is {v}?"),
        "In which colour is {n}'s house painted?",
    ),
    Topic(
        "cat goat dog parrot rabbit pony hen turtle",
        "{n} keeps a {v}.",
        ("Which animal does {n} keep?", "What pet does {n} have?", "Tell me which animal {n} keeps.", "What animal lives with {n}?"),
        ("And which animal does {they} keep?", "What pet does {they} have?"),
        ("Who keeps a {v}?", "Who has a {v}?", "Who is the owner of the {v}?", "Tell me who keeps a {v}."),
        ("Does {n} keep a {v}?", "Is it true that {n} keeps a {v}?"),
        "What kind of animal is kept by {n}?",
    ),
    Topic(
        "honey soup cheese apples bread plums pancakes carrots",
        "{n} likes {v} best.",
        ("What does {n} like to eat best?", "Which food does {n} like best?", "What is {n}'s favourite food?", "Tell me {n}'s favourite food."),
        ("And what is {their} favourite food?", "Which food does {they} like best?"),
        ("Who likes {v} best?", "Whose favourite food is {v}?", "Tell me who likes {v} best."),
        ("Does {n} like {v} best?", "Is it true that {n} likes {v} best?"),
        "What would {n} like to eat most of all?",
    ),
    Topic(
        "harbour bridge mill church school forest lake hill",
        "{n} lives near the {v}.",
        ("Where does {n} live?", "Where is {n}'s home?", "Tell me where {n} lives.", "In which place does {n} live?"),
        ("And where does {they} live?", "Where is {their} home?"),
        ("Who lives near the {v}?", "Whose home is near the {v}?", "Tell me who lives near the {v}."),
        ("Does {n} live near the {v}?", "Is it true that {n} lives near the {v}?"),
        "Near which place does {n} live?",
    ),
)


def conversations() -> list[list[dict[str, str]]]:
    """All conversations of the data set, in their order."""
    chosen = [turns for kind, count in SHARES.items() for turns in by_hash(every(kind))[:count]]
    return [[{"role": role, "content": content} for role, content in turns] for turns in by_hash(chosen)]


def every(kind: str) -> list[tuple[tuple[str, str], ...]]:
    """Each possible conversation of a kind, without those that ask a reserved question."""
    made = {"plain": plain, "who": who, "check": check, "brief": brief, "guide": guide, "dialogue": dialogue}[kind]()
    return [turns for turns in dict.fromkeys(made) if not any(reserved in content for _, content in turns for reserved in RESERVED)]


def by_hash(items: list) -> list:
    return sorted(items, key=lambda item: hashlib.sha256(repr(item).encode()).digest())


def facts() -> Iterator[tuple[Topic, dict[str, str]]]:
    """Every topic with every person, and the words that go into its sentences."""
    for topic in TOPICS:
        for (name, pronoun), value in zip(PEOPLE.items(), topic.values.split(), strict=True):
            yield topic, {"n": name, "v": value, "they": pronoun, "their": {"she": "her", "he": "his"}[pronoun]}


def exchange(question: str, answer: str) -> tuple[tuple[str, str], ...]:
    return ("user", question), ("assistant", answer)


def plain() -> Iterator:
    for (topic, words), opener in itertools.product(facts(), OPENERS):
        for ask in topic.ask:
            yield exchange(opener + ask.format(**words), topic.answer.format(**words))


def who() -> Iterator:
    for (topic, words), opener in itertools.product(facts(), OPENERS):
        for ask in topic.who:
            yield exchange(opener + ask.format(**words), topic.answer.format(**words))


def check() -> Iterator:
    """Yes or no questions, half of them with a wrong value, which the answer puts right."""
    for topic, words in facts():
        values = topic.values.split()
        right = values.index(words["v"])
        for ask, opener, wrong in itertools.product(topic.check, OPENERS, (2, 3, 5)):
            answer = topic.answer.format(**words)
            yield exchange(opener + ask.format(**words), f"Yes, {answer}")
            other = values[(right + wrong) % len(values)]
            yield exchange(opener + ask.format(**words | {"v": other}), f"No, {answer}")


def brief() -> Iterator:
    for topic, words in facts():
        for ask in topic.ask:
            yield ("system", BRIEF), *exchange(ask.format(**words), f"{words['v'].capitalize()}.")
        for ask in topic.who:
            yield ("system", BRIEF), *exchange(ask.format(**words), f"{words['n']}.")


def guide() -> Iterator:
    for topic, words in facts():
        for ask in topic.ask + topic.who:
            yield ("system", GUIDE), *exchange(ask.format(**words), topic.answer.format(**words))


def dialogue() -> Iterator:
    """Two or three questions about one person; the later ones say only "he" or "she"."""
    for (one, words), (two, words_two), (three, words_three) in itertools.product(facts(), repeat=3):
        if words["n"] != words_two["n"] or words["n"] != words_three["n"] or one in (two, three):
            continue
        for ask, ask_two, ask_three in itertools.product(one.ask, two.ask_again, three.ask_again):
            turns = exchange(ask.format(**words), one.answer.format(**words))
            turns += exchange(ask_two.format(**words_two), two.answer.format(**words_two))
            if two is not three:
                turns += exchange(ask_three.format(**words_three), three.answer.format(**words_three))
            yield turns


def exam() -> list[dict[str, object]]:
    """A question for each fact, with every answer that its topic has and the number of the right one."""
    asked = []
    for topic, words in facts():
        values = topic.values.split()
        choices = [topic.answer.format(**words | {"v": value}) for value in values]
        label = values.index(words["v"])
        asked.append({"question": topic.exam.format(**words), "choices": choices, "label": label, "answer": choices[label]})
    return asked


def write_tokenizer(folder: Path, documents: list[list[dict[str, str]]]) -> None:
    """Train a byte-level BPE on the text and write it as transformers reads it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # every byte, so that any text can be encoded
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for turns in documents for turn in turns for text in turn.values()), trainer)  # role names too
    assert tokenizer.get_vocab_size() == VOCAB_SIZE, tokenizer.get_vocab_size()  # fewer: the text has no more merges to give
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))

    end_of_text, start, end, pad = SPECIAL_TOKENS
    named = {"bos_token": start, "eos_token": end, "pad_token": pad, "unk_token": end_of_text}
    settings = {
        **named,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_text(folder / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")
    write_text(folder / "special_tokens_map.json", json.dumps(named, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    path.write_bytes(text.encode())  # bytes: no machine may turn the line ends


def make_debug_assets(folder: Path) -> None:
    """Write every file into `folder`, over those that are there."""
    documents = conversations()
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "chat.jsonl", "".join(json.dumps({"messages": turns}) + "\n" for turns in documents))
    questions = exam()
    write_text(folder / "facts.jsonl", "".join(json.dumps(question) + "\n" for question in questions))
    write_tokenizer(folder / "tokenizer", documents)
    prompts = "\n".join(f"- {prompt}" for prompt in RESERVED)
    write_text(folder / "README.md", README.format(count=len(documents), facts=len(questions), vocab=VOCAB_SIZE, prompts=prompts))


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    make_debug_assets(folder)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        print(f"{path.stat().st_size:>9,}  {path}")


if __name__ == "__main__":
    main()
