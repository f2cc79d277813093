"""A tokenizer in GGUF's words: its tokens by id, how llama.cpp is to split a text, and which ids begin and end one.

llama.cpp has its own tokenizers, written out in C++ and chosen by name, so that a tokenizer fits only if it is built like one of
them. Two kinds are known here: byte-level BPE with one of the ways to split a text that `PRE_TOKENIZERS` lists, and sentencepiece's
BPE with the scores of its tokenizer.model. Everything else is refused by name, never approximated.

What is given up: llama.cpp normalizes nothing, so that the NFC normalization of Qwen2's tokenizer is lost, as in every GGUF of a
Qwen2; and it ends an answer also at every token whose text it knows for an end, such as <|endoftext|>, whatever the ids say.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tunelib.data.tokenizer import Tokenizer
from tunelib.data.tokenizer_model import BYTE, CONTROL, LLAMA3_SPLIT, NORMAL, SPACE, UNKNOWN, UNUSED, USER_DEFINED
from tunelib.errors import FormatError
from tunelib.files import read_json

DIGITS = {"type": "Digits", "individual_digits": True}
BYTES_ONLY = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
BYTES_AND_SPLIT = {**BYTES_ONLY, "use_regex": True}
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


def _split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


# llama.cpp's name → the steps of a tokenizer.json that it stands for, and whether a word that is a token is taken whole (ignore_merges).
PRE_TOKENIZERS: dict[str, tuple[list[dict[str, Any]], bool]] = {
    "gpt-2": ([BYTES_AND_SPLIT], False),
    "smollm": ([DIGITS, BYTES_AND_SPLIT], False),
    "llama-bpe": ([_split(LLAMA3_SPLIT), BYTES_ONLY], True),
    "qwen2": ([_split(QWEN2_SPLIT), BYTES_ONLY], False),
}
# What sentencepiece does to a text, as a tokenizer.json says it, without and with a space put first.
SENTENCEPIECE_STEPS = [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
SENTENCEPIECE_PREFIX_STEPS = [{"type": "Prepend", "prepend": SPACE}, *SENTENCEPIECE_STEPS]
ADDED_SCORE = -1000.0  # of tokens that sentencepiece does not know: they are cut out of a text before scores count
# Texts at which llama.cpp ends an answer without being told (llama_vocab::impl::load, "special_eog_ids"); only those that matter here.
KNOWN_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "</s>")
END_OF_MESSAGE = "<|eom_id|>"


@dataclass(frozen=True)
class Words:
    """A tokenizer as GGUF holds it.

    Attributes:
        model: "gpt2" for byte-level BPE, "llama" for sentencepiece's.
        pre: llama.cpp's name for how a text is split; "default" for sentencepiece, which does not.
        tokens: by id, as many as the embedding has rows.
        types: of each token: `NORMAL` and so on, GGUF having sentencepiece's numbers.
        merges: of byte-level BPE: two tokens and a space between.
        scores: of sentencepiece.
        ids: "bos", "eos", "eot", "eom", "unk", "pad": those that there are.
        adds_bos, adds_eos: whether encoding puts them around a text.
        adds_space: whether a space is put before a text; sentencepiece only.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float]
    ids: dict[str, int]
    adds_bos: bool
    adds_eos: bool
    adds_space: bool

    @property
    def num_bytes(self) -> int:
        """What tokens, types, merges and scores take in a file: 8 bytes for each text's length, 4 for each number."""
        texts = sum(len(text.encode()) + 8 for text in (*self.tokens, *self.merges))
        return texts + 4 * (len(self.types) + len(self.scores))


def describe_words(tokenizer: Tokenizer, num_rows: int) -> Words:
    """A tokenizer in GGUF's words, for a model whose embedding has ``num_rows`` rows.

    Raises:
        FormatError: llama.cpp has no tokenizer that gives the same ids.
    """
    if tokenizer.vocab_size > num_rows:
        _refuse(tokenizer, f"it has {tokenizer.vocab_size} tokens, but the model only {num_rows} rows for them")
    content = _read_content(tokenizer)
    model = content["model"]
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        _refuse(tokenizer, f"its model is {model.get('type')!r}, and only BPE is written")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            _refuse(tokenizer, f"its model has {option} = {model[option]!r}")
    steps = _flatten(content.get("pre_tokenizer"), "pretokenizers")
    is_sentencepiece = not steps and bool(model.get("byte_fallback"))
    tokens, types = _list_tokens(tokenizer, content, num_rows, is_sentencepiece)
    ids, adds_bos, adds_eos = _find_ids(tokenizer, tokens)
    scores: list[float] = []
    merges: list[str] = []
    adds_space = False
    if is_sentencepiece:
        adds_space = _has_prefix(tokenizer, content)
        scores = _read_scores(tokenizer, content, types)
        pre = "default"
    else:
        pre = _name_pre_tokenizer(tokenizer, content, steps)
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        if not merges or any(merge.count(" ") != 1 for merge in merges):
            _refuse(tokenizer, "it has no merges, or one of pieces with a space")
    return Words("llama" if is_sentencepiece else "gpt2", pre, tokens, types, merges, scores, ids, adds_bos, adds_eos, adds_space)


def _refuse(tokenizer: Tokenizer, reason: str) -> NoReturn:
    raise FormatError(f"the tokenizer in {tokenizer.folder} cannot be written as GGUF: {reason}")


def _read_content(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer.json, also of a tokenizer that has none or has tokens added."""
    written = tokenizer.files_to_write().get("tokenizer.json")
    return read_json(tokenizer.folder / "tokenizer.json", FormatError) if written is None else json.loads(written)


def _flatten(step: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """Steps one after the other, without what does not change ids, and with the defaults that old files leave out."""
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [flat for part in step[inner] for flat in _flatten(part, inner)]
    defaults = {"use_regex": True} if step["type"] == "ByteLevel" else {}
    return [defaults | {name: value for name, value in step.items() if name != "trim_offsets"}]


def _name_pre_tokenizer(tokenizer: Tokenizer, content: dict[str, Any], steps: list[dict[str, Any]]) -> str:
    """llama.cpp's name for a byte-level tokenizer's way to split a text; recognised by its structure."""
    name = next((name for name, (known, _) in PRE_TOKENIZERS.items() if known == steps), None)
    if name is None:
        _refuse(tokenizer, f"its pre-tokenizer is none of {', '.join(PRE_TOKENIZERS)}: {json.dumps(steps)}")
    takes_whole = bool(content["model"].get("ignore_merges"))
    if takes_whole != PRE_TOKENIZERS[name][1]:
        _refuse(tokenizer, f"its model has ignore_merges = {takes_whole}, but llama.cpp does otherwise for {name!r}")
    normalizers = [step["type"] for step in _flatten(content.get("normalizer"), "normalizers")]
    if normalizers != ["NFC"] * len(normalizers) or (normalizers and name != "qwen2"):
        _refuse(tokenizer, f"it normalizes text ({', '.join(normalizers)}), and llama.cpp does not")
    return name


def _list_tokens(tokenizer: Tokenizer, content: dict[str, Any], num_rows: int, is_sentencepiece: bool) -> tuple[list[str], list[int]]:
    """Texts and types by id; ids without a token get a name of their own and are marked unused."""
    texts: dict[int, str] = {number: text for text, number in content["model"]["vocab"].items()}
    types = dict.fromkeys(texts, NORMAL)
    for token in content.get("added_tokens", []):
        number = tokenizer.id_of(token["content"])
        assert number is not None, f"{token['content']!r} is listed, but the library does not know it"
        for flag in ("single_word", "lstrip", "rstrip"):
            if token.get(flag):
                _refuse(tokenizer, f"token {token['content']!r} has {flag}, which llama.cpp cannot be told")
        if is_sentencepiece and token.get("normalized"):
            _refuse(tokenizer, f"token {token['content']!r} is looked for in the normalized text (normalized), and by llama.cpp in the plain one")
        texts[number] = token["content"]
        types[number] = CONTROL if token["special"] else USER_DEFINED
    for number in range(num_rows):
        texts.setdefault(number, f"[PAD{number}]")
        types.setdefault(number, UNUSED)
    tokens = [texts[number] for number in range(num_rows)]
    if len(set(tokens)) < num_rows:
        twice = next(text for number, text in enumerate(tokens) if tokens.index(text) < number)
        _refuse(tokenizer, f"two ids have the text {twice!r}, and llama.cpp tells tokens apart by it")
    if "" in texts.values():
        _refuse(tokenizer, f"token {tokens.index('')} is empty")
    return tokens, [types[number] for number in range(num_rows)]


def _find_ids(tokenizer: Tokenizer, tokens: Sequence[str]) -> tuple[dict[str, int], bool, bool]:
    """The ids of special tokens by GGUF's names, and whether bos and eos are put around a text."""
    named = {name: tokenizer.id_of(tokenizer.special.get(f"{name}_token", "")) for name in ("bos", "eos", "unk", "pad")}
    ids = {name: number for name, number in named.items() if number is not None}
    ids |= _find_ends(tokenizer, ids.get("eos"), tokens)
    # What encoding puts around a text, which is not what tokenizer_config.json says of it where there is a tokenizer.json.
    plain, full = (tokenizer.encode("a", add_special_tokens=adds).ids for adds in (False, True))
    start = tokenizer.document_start_ids
    end = full[len(start) + len(plain) :]
    if start and "bos" not in ids:
        ids["bos"] = start[0]
    for what, found, name in (("before", start, "bos"), ("after", end, "eos")):
        if found not in ([], [ids.get(name)]):
            _refuse(tokenizer, f"it puts the ids {found} {what} a text, and llama.cpp can put only {name}, {ids.get(name)}")
    # Without one llama.cpp takes id 11 (1 for sentencepiece), some word; it begins no text with it, but others may.
    ids.setdefault("bos", ids["eos"])
    return ids, bool(start), bool(end)


def _find_ends(tokenizer: Tokenizer, eos: int | None, tokens: Sequence[str]) -> dict[str, int]:
    """The ids at which an answer ends, in the three places that GGUF has for them besides the texts that llama.cpp knows."""
    if beyond := [number for number in tokenizer.stop_ids if not 0 <= number < len(tokens)]:
        _refuse(tokenizer, f"an answer ends at id {beyond[0]}, which is no token")
    stops = sorted(tokenizer.stop_ids - {eos}, key=lambda number: (tokens[number] in KNOWN_ENDS, number))
    if eos is None and not stops:
        _refuse(tokenizer, "it has no eos_token, and llama.cpp would end an answer at some word (id 11)")
    ends = {"eos": stops.pop(0) if eos is None else eos}
    if message_ends := [number for number in stops if tokens[number] == END_OF_MESSAGE]:
        ends["eom"] = message_ends[0]
        stops.remove(message_ends[0])
    for name in ("eot", "eom"):
        if stops and name not in ends:
            ends[name] = stops.pop(0)
    if unknown := [tokens[number] for number in stops if tokens[number] not in KNOWN_ENDS]:
        _refuse(tokenizer, f"an answer ends at more tokens than llama.cpp can be told, {unknown[0]!r} being one too many")
    return ends


def _has_prefix(tokenizer: Tokenizer, content: dict[str, Any]) -> bool:
    """Whether a sentencepiece tokenizer puts a space before every stretch of text between special tokens, as llama.cpp does."""
    steps = _flatten(content.get("normalizer"), "normalizers")
    if steps not in (SENTENCEPIECE_STEPS, SENTENCEPIECE_PREFIX_STEPS):
        _refuse(tokenizer, f"llama.cpp does not normalize text as its normalizer does: {json.dumps(steps)}")
    return steps == SENTENCEPIECE_PREFIX_STEPS


def _read_scores(tokenizer: Tokenizer, content: dict[str, Any], types: list[int]) -> list[float]:
    """Scores by id from the tokenizer.model; sets the types of its pieces in ``types``.

    A tokenizer.json has an order of merges instead. It cannot be turned into scores exactly, since the same piece may be made in
    several ways and places, but where both files are there it must follow the scores.
    """
    import sentencepiece

    path: Path = tokenizer.folder / "tokenizer.model"
    if not path.is_file():
        _refuse(tokenizer, "it is sentencepiece's, whose scores only its tokenizer.model has: put that file into the folder")
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.load(str(path))
    except (RuntimeError, OSError) as error:
        raise FormatError(f"{path} cannot be read: {error}") from None
    ids = list(range(processor.get_piece_size()))
    pieces, scores = processor.id_to_piece(ids), processor.get_score(ids)
    vocab = content["model"]["vocab"]
    for number, piece in enumerate(pieces):
        if vocab.get(piece) != number:
            _refuse(tokenizer, f"tokenizer.model gives {piece!r} the id {number}, tokenizer.json {vocab.get(piece)}")
        if processor.is_byte(number):
            types[number] = BYTE
        elif processor.is_unknown(number):
            types[number] = UNKNOWN
    if types.count(BYTE) != 256:
        _refuse(tokenizer, f"it has pieces for {types.count(BYTE)} of the 256 bytes")
    if strange := [piece for piece, number in vocab.items() if number >= len(pieces) and types[number] == NORMAL]:
        _refuse(tokenizer, f"piece {strange[0]!r} is in tokenizer.json, but not in tokenizer.model")
    merges = ("".join(merge.split(" ") if isinstance(merge, str) else merge) for merge in content["model"]["merges"])
    made = [vocab[piece] for piece in merges]
    if beyond := [number for number in made if number >= len(pieces)]:
        _refuse(tokenizer, f"a merge makes the token with id {beyond[0]}, which is not in tokenizer.model")
    order = [scores[number] for number in made]
    if any(later > sooner for sooner, later in itertools.pairwise(order)):
        _refuse(tokenizer, "the merges in tokenizer.json do not follow the scores in tokenizer.model")
    return scores + [ADDED_SCORE] * (len(types) - len(scores))
