"""Let a model answer: python scripts/generate.py CHECKPOINT --prompt TEXT, or talk with it: python scripts/generate.py CHECKPOINT --chat

The checkpoint may be a Hugging Face, Meta or DCP folder, a file of torch.save, a folder of scripts/quantize.py, or an adapter. Where it has a chat
template, a prompt is the message of a user (--chat_template none: text to go on with). Answers go to stdout, all else to stderr.
"""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))

from tunelib.errors import ConfigError, DataError, TunelibError
from tunelib.formats import load_model
from tunelib.infer.chat import Conversation, TextStream, talk
from tunelib.infer.generate import Stops, encode_prompts, stream
from tunelib.infer.sample import Sampling


@dataclass(frozen=True)
class Words:
    """What to load, what to say to it, and how it is to answer."""

    checkpoint: Annotated[Path, tyro.conf.arg(metavar="CHECKPOINT"), tyro.conf.Positional]
    """A checkpoint in any form, or an adapter folder that names its base."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """What to answer; given again, all are answered together."""
    chat: bool = False
    """Talk with it."""
    system: str = ""
    """What it is told before the conversation."""
    adapter: str = ""
    """A PEFT adapter folder for these weights."""
    max_new_tokens: int = 256
    """Longest answer, in tokens."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(default_factory=Sampling)
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A text that ends an answer, besides the model's own end; may be given again."""
    quantize: Literal["none", "int8", "int4"] = "none"
    """Keep the weights of linear layers in so many bits (needs the extra "torchao")."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type to compute in; auto is float32 on a CPU, the stored one on a GPU."""
    tokenizer_path: str = ""
    """A folder with a tokenizer, where it is not beside the weights."""
    chat_template: str = ""
    """As dataset.chat_template: a name, a .jinja file, or "none"."""


def main(words: Words) -> None:
    if bool(words.prompt) == words.chat:
        raise ConfigError("give --prompt TEXT for an answer, or --chat to talk")
    if words.max_new_tokens < 1:
        raise ConfigError(f"--max_new_tokens {words.max_new_tokens}: an answer has at least 1 token")
    began = time.monotonic()
    how = {"dtype": words.dtype, "quantize": words.quantize, "tokenizer_path": words.tokenizer_path, "chat_template": words.chat_template}
    loaded = load_model(words.checkpoint, adapter=words.adapter, **how)
    print(f"{loaded.sentence}, on {loaded.device.type}; loaded in {time.monotonic() - began:.1f} s", file=sys.stderr)
    if loaded.tokenizer is None:
        raise DataError(f"no tokenizer lies with {words.checkpoint}: name a folder that has one with --tokenizer_path")
    stops = Stops(loaded.stop_ids, words.stop, loaded.tokenizer)
    if words.chat:
        if loaded.template is None:
            raise DataError(f'{loaded.tokenizer.folder} has no chat template: name one with --chat_template, such as "chatml"')
        conversation = Conversation(loaded.model, loaded.template, stops, words.max_new_tokens, words.sampling, words.system)
        talk(conversation, lambda: input("> "), lambda piece: print(piece, end="", flush=True))
        return
    prompts = encode_prompts(words.prompt, loaded.tokenizer, loaded.template, words.system)
    began, answers = time.monotonic(), [TextStream(stops) for _ in prompts]
    whole, num_tokens = [""] * len(prompts), 0
    for row, token in stream(loaded.model, prompts, words.max_new_tokens, stops, words.sampling):
        piece = answers[row].add(token)
        whole[row], num_tokens = whole[row] + piece, num_tokens + 1
        print(piece if len(prompts) == 1 else "", end="", flush=True)
    for row, answer in enumerate(answers):
        rest = answer.end()
        print(rest if len(prompts) == 1 else f"{words.prompt[row]!r} → {whole[row] + rest}")
    print(f"{num_tokens} tokens, {num_tokens / (time.monotonic() - began):.1f} a second", file=sys.stderr)


if __name__ == "__main__":
    try:
        main(tyro.cli(Words, use_underscores=True, description=__doc__))
    except TunelibError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(1)
