"""Show what a run would train on, without training: figures, rows as the model sees them, and the rows of any step.

    python scripts/preview_data.py CONFIG.toml [--rows N] [--section.key value …]
    python scripts/preview_data.py CONFIG.toml --step S [--section.key value …]

Trained text is green on a terminal and stands between ⟦ and ⟧ elsewhere.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tunelib.config import load_or_exit, resolve_local_batch_size
from tunelib.config.schema import Parallelism
from tunelib.data.loader import Share, TrainData
from tunelib.data.prepare import ALONE, Batches, HeldOut, build_documents, build_train_data, find_words
from tunelib.data.preview import COLOURED, PLAIN, describe_all, show_rendering, show_row
from tunelib.errors import ConfigError, TunelibError
from tunelib.formats.load import check_weights_path, find_tokenizer_folder, find_weights


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--rows", type=int, default=2, metavar="N", help="how many rows of step 1 to show (default 2)")
    parser.add_argument("--step", type=int, metavar="S", help="show all rows of this step, counted from 1, and nothing else")
    own, words_for_config = parser.parse_known_args(argv)
    config = load_or_exit([*words_for_config, "--parallelism.data_parallel_shard_degree", "-1"]).config
    if own.rows < 0 or (own.step is not None and own.step < 1):
        raise ConfigError("command line: --rows is at least 0, and --step at least 1")
    if config.dataset.streaming:
        raise ConfigError("dataset.streaming: a stream has no documents to look at before training; preview it with --dataset.streaming false")

    training, section, held_out = config.training, config.dataset, config.validation
    check_weights_path(config.checkpoint.initial_load_path)
    folder = find_tokenizer_folder(config.model.tokenizer_path, config.checkpoint.initial_load_path)
    assert folder is not None, "checked in config/check.py"
    words = find_words(section, folder, config.model.resize_embeddings)
    weights = find_weights(config.model, config.checkpoint.initial_load_path, words.tokenizer.vocab_size, training.seq_len)
    vocab_size, held_out_where = weights.config.vocab_size, HeldOut(held_out.path, held_out.split, held_out.fraction)
    documents = build_documents(words, section, training.seq_len, vocab_size, held_out_where, say=print)
    batches = Batches(training.seq_len, training.global_batch_size, training.seed, Share(0, 1, resolve_local_batch_size(training, Parallelism(), 1)))
    data = build_train_data(words, section, documents.train, vocab_size, batches, ALONE)
    assert isinstance(data, TrainData)
    marks = COLOURED if sys.stdout.isatty() else PLAIN
    num_steps = training.steps or data.steps_in_epochs(training.epochs or 1)
    if own.step is not None and own.step > num_steps:
        print(f"the run ends after step {num_steps}; this is what step {own.step} of a longer one would be")
    rows = data.rows_of(own.step or 1)
    if own.step is None:
        print("\n".join(describe_all(data, [*documents.notes, *words.notes, *data.notes])))
        print("\n".join(show_rendering(words)))
        rows = rows[: own.rows]
    for number, (epoch, row) in enumerate(rows):
        print("\n".join(show_row(data.index, row, number, epoch, data, words.tokenizer, marks)))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except TunelibError as error:
        print(error, file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
