"""Packed and unpacked rows of the same documents are the same training: nothing leaks from one document to the next."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Run, open_train_data, write_chats, write_toml

NUM_DOCUMENTS, SEQ_LEN = 24, 128


def test_packed_and_unpacked_training_of_the_same_documents_agree(train: Callable[..., Run], tmp_path: Path) -> None:
    """The global batch is the whole data set in both, so that every step trains the same tokens."""
    data = write_chats(tmp_path / "chats.jsonl", NUM_DOCUMENTS)
    toml = write_toml(tmp_path / "tiny.toml", data, "")
    rows = open_train_data(data, SEQ_LEN, global_batch_size=1)
    ends = [rows.steps_in_epochs(epochs) for epochs in range(1, 7)]
    num_rows = {end - begin for begin, end in itertools.pairwise([0, *ends])}
    assert len(num_rows) == 1, "every epoch must fill one step exactly"
    assert num_rows.pop() < NUM_DOCUMENTS / 2, "rows must hold several documents"
    common = ["--training.steps", "6", "--training.local_batch_size", "1", "--optimizer.lr", "5e-3"]
    packed = train(toml, *common, "--training.global_batch_size", str(ends[0]))
    unpacked = train(toml, *common, "--training.global_batch_size", str(NUM_DOCUMENTS), "--dataset.no-packing")
    assert packed.series("tokens") == unpacked.series("tokens")
    assert packed.series("loss") == pytest.approx(unpacked.series("loss"), rel=1e-5)
    assert packed.series("grad_norm") == pytest.approx(unpacked.series("grad_norm"), rel=1e-5)
    assert packed.series("loss")[-1] < 0.9 * packed.series("loss")[0]


def test_packed_and_unpacked_validation_agree(train: Callable[..., Run], tmp_path: Path) -> None:
    data = write_chats(tmp_path / "chats.jsonl", 100)
    toml = write_toml(tmp_path / "tiny.toml", data, f'[validation]\nenable = true\npath = "{data}"\n')
    packed, unpacked = (train(toml, "--training.steps", "1", *words) for words in ([], ["--dataset.no-packing"]))
    assert packed.series("validation_loss")[0] == pytest.approx(unpacked.series("validation_loss")[0], rel=1e-5)
