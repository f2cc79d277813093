"""What a run will need, before a machine is rented for it: memory of the GPU that needs most, checkpoints on the disk, tokens and steps.

    python scripts/estimate_memory.py CONFIG.toml --ngpu 64 [--gpu_memory_gib 80] [--device cuda] [--headroom 0.1] [--section.key value …]

Needs no GPU: the model is built and takes a step as in training, on tensors without numbers (docs/estimate.md). Weights and tokenizer need not
be there if the model is named (--model.flavor). Exit code 0: it fits, or no memory was given; 1: it does not; 2: the config is wrong.
"""

import argparse
import logging
import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tunelib.config import Config, load_or_exit
from tunelib.config.fields import find_nearest
from tunelib.config.sizes import SIZES
from tunelib.data.prepare import find_words
from tunelib.data.tokenizer import Tokenizer
from tunelib.errors import ConfigError, TunelibError
from tunelib.formats.load import find_tokenizer_folder, find_weights
from tunelib.model.config import ModelConfig
from tunelib.observe.plan import GIB, plan_lines
from tunelib.parallel.estimate import Plan, estimate_memory
from tunelib.parallel.fit import find_changes


@dataclass(frozen=True)
class Words:
    """What the script takes besides the settings of a run."""

    ngpu: int = 1
    gpu_memory_gib: float = 0.0
    device: str = "cuda"
    headroom: float = 0.1


def read_words(argv: list[str]) -> tuple[Words, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--ngpu", type=int, metavar="N", help="processes in all, each with a GPU (default 1)")
    parser.add_argument("--gpu_memory_gib", type=float, metavar="GIB", help="of one GPU: does the run fit, and if not, what would?")
    parser.add_argument("--device", choices=("cuda", "cpu"), help='for which "auto" data types are chosen (default cuda)')
    parser.add_argument("--headroom", type=float, metavar="SHARE", help="of that memory for what is no tensor (default 0.1)")
    own, others = parser.parse_known_args(argv)
    words = Words(**{name: value for name, value in vars(own).items() if value is not None})
    if words.ngpu < 1:
        raise ConfigError(f"command line: --ngpu {words.ngpu}: must be at least 1")
    if own.gpu_memory_gib is not None and not 0 < words.gpu_memory_gib < math.inf:
        raise ConfigError(f"command line: --gpu_memory_gib {words.gpu_memory_gib:g}: expected a size above 0, such as 80")
    if not 0 <= words.headroom < 1 or (own.headroom is not None and own.gpu_memory_gib is None):
        raise ConfigError(f"command line: --headroom {words.headroom:g}: expected a share of --gpu_memory_gib, at least 0 and below 1")
    return words, others


def know_model(config: Config) -> ModelConfig:
    """As training does, but without a tokenizer where nothing depends on it."""
    section, path = config.model, config.checkpoint.initial_load_path
    if path and not Path(path).exists():
        flavor = find_nearest(Path(path).name, SIZES) or "NAME, one of " + ", ".join(SIZES)
        way = f"get it, or name the model: --model.flavor {flavor} --model.tokenizer_path {path}"
        raise ConfigError(f"checkpoint.initial_load_path: there is no {path}; {way}")
    folder = find_tokenizer_folder(section.tokenizer_path, path)
    vocab_size = 0
    if folder and (folder.exists() or not (path or section.flavor or section.vocab_size)):
        vocab_size = (find_words(config.dataset, folder, True).tokenizer if section.resize_embeddings else Tokenizer(folder)).vocab_size
    return find_weights(section, path, vocab_size, config.training.seq_len).config


def main(argv: list[str]) -> int:
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)  # how collectives could be fewer
    words, others = read_words(argv)
    config = load_or_exit(others, world_size=words.ngpu).config
    sections = (config.training, config.parallelism, config.lora, config.optimizer, config.activation_checkpoint)
    estimate = estimate_memory(Plan(know_model(config), words.ngpu, words.device, *sections))
    print("\n".join(plan_lines(config, estimate)), flush=True)
    if not words.gpu_memory_gib:
        return 0
    limit_bytes = int(words.gpu_memory_gib * (1 - words.headroom) * GIB)
    fits = estimate.peak.total <= limit_bytes
    print(f"fits        {'yes' if fits else 'NO'}: tensors may take {limit_bytes / GIB:.1f} of {words.gpu_memory_gib:g} GiB", flush=True)
    if fits:
        return 0
    found = False
    for change, needed in find_changes(estimate, limit_bytes):
        found = True
        print(f"would fit   {needed.peak.total / GIB:.2f} GiB with {change}", flush=True)
    if not found:
        print("would fit   nothing tried: smaller micro-batches, recompute, up to 8 times the GPUs, adapters, shorter rows")
    return 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except TunelibError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
