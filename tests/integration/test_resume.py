"""Law 3: a run that was stopped and resumed equals the run that never stopped; and what decides how a run begins."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Run, free_port, run_processes, write_chats, write_toml
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tunelib.checkpoint.dcp_reader import load_tensors
from tunelib.errors import CheckpointError, ConfigError, FormatError, NumbersError

KEEP_SAVING = """
[checkpoint]
enable_checkpoint = true
interval = 4
[lr_scheduler]
warmup_steps = 4
decay_type = "cosine"
[validation]
enable = true
fraction = 0.1
freq = 8
"""
STEPS = ["--training.steps", "16"]


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    return write_toml(tmp_path / "tiny.toml", write_chats(tmp_path / "chats.jsonl", 200), KEEP_SAVING)


def run_and_kill(words: list[str], world_size: int, folder: Path, step: int) -> None:
    """Start a run and SIGKILL all its processes as soon as a step is committed."""
    slow_down = "import time, train; step = train.train_step; train.train_step = lambda *a: (time.sleep(0.15), step(*a))[1]; train.main({!r})"
    environment = os.environ | {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", slow_down.format(words)],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        deadline = time.monotonic() + 120
        while not (folder / "checkpoint" / f"step-{step}").exists():
            assert time.monotonic() < deadline, "no checkpoint within two minutes"
            assert all(worker.poll() is None for worker in workers), workers[0].communicate()[1]
            time.sleep(0.02)
    finally:
        for worker in workers:
            worker.send_signal(signal.SIGKILL)
            worker.communicate()


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_killed_and_resumed_run_equals_uninterrupted_run_bit_for_bit(tmp_path: Path, toml: Path, world_size: int) -> None:
    whole, cut = Run(tmp_path / "whole"), Run(tmp_path / "cut")
    run_and_kill([str(toml), *STEPS, "--job.dump_folder", str(cut.folder)], world_size, cut.folder, step=8)
    assert len(cut.series("loss")) < 16, "it was not interrupted"
    run_processes([[str(toml), *STEPS, "--job.dump_folder", str(run.folder)] for run in (whole, cut)], world_size)
    for name in ("loss", "grad_norm", "lr", "validation_loss", "tokens", "epoch"):
        assert cut.series(name) == whole.series(name), name
    expected, found = whole.weights(), cut.weights()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize(
    ("before", "after", "dtype", "tolerance"),
    [
        (1, 2, "float64", 1e-9),
        pytest.param(2, 1, "float64", 1e-9, marks=pytest.mark.slow),
        pytest.param(1, 2, "float32", 1e-5, marks=pytest.mark.slow),
    ],
)
def test_resume_on_another_number_of_processes_is_the_same_training(
    tmp_path: Path, toml: Path, before: int, after: int, dtype: str, tolerance: float
) -> None:
    whole, cut = Run(tmp_path / "whole"), Run(tmp_path / "cut")
    precise = [*STEPS, "--training.dtype", dtype]
    run_processes([[str(toml), *precise, "--job.dump_folder", str(whole.folder)]], before)
    run_and_kill([str(toml), *precise, "--job.dump_folder", str(cut.folder)], before, cut.folder, step=8)
    run_processes([[str(toml), *precise, "--job.dump_folder", str(cut.folder)]], after)
    for name in ("loss", "grad_norm", "validation_loss"):
        assert cut.series(name) == pytest.approx(whole.series(name), rel=tolerance), name
    found = cut.weights()
    for name, weight in whole.weights().items() if dtype == "float64" else ():
        assert torch.linalg.norm(found[name] - weight) <= tolerance * torch.linalg.norm(weight), name


@pytest.mark.slow
def test_moments_of_8_bits_fit_any_sharding(tmp_path: Path, toml: Path) -> None:
    """Codes and scales that two processes wrote go on in one: after a step more they are the same, but for codes at the edge of two."""
    sizes = ["--model.hidden_size", "64", "--model.intermediate_size", "160", "--lr_scheduler.warmup_steps", "0"]
    words = [str(toml), *sizes, "--optimizer.name", "AdamW8bit", "--checkpoint.interval", "1", "--checkpoint.keep_latest_k", "0"]
    two, one = (tmp_path / name for name in ("two", "one"))
    run_processes([[*words, "--training.steps", "3", "--job.dump_folder", str(two)]], 2, warnings="default")
    shutil.copytree(two, one)
    more = [*words, "--training.steps", "4", "--job.dump_folder"]
    run_processes([[*more, str(two)]], 2, warnings="default")
    run_processes([[*more, str(one)]], 1, warnings="default")
    assert Run(one).series("loss") == pytest.approx(Run(two).series("loss"), rel=1e-5)
    written, found = (read_tensors(folder / "checkpoint/step-4") for folder in (two, one))
    codes = [name for name in written if name.endswith(".codes")]
    assert "optimizer.model.layers.0.mlp.gate_proj.weight.exp_avg_sq.codes" in codes
    assert "optimizer.model.layers.0.mlp.down_proj.weight.exp_avg" in written, "rows of 160 are no whole blocks"
    for name in codes:
        differing = (written[name].int() - found[name].int()).abs()
        assert differing.max() <= 1, name
        assert (differing > 0).float().mean() < 0.01, name
        scale = name.replace(".codes", ".scale")
        torch.testing.assert_close(found[scale], written[scale], rtol=1e-4, atol=0)


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, whole."""
    shapes = FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(of.size, dtype=of.properties.dtype) for name, of in shapes.items() if isinstance(of, TensorStorageMetadata)}
    load_tensors(tensors, folder)
    return tensors


def test_damaged_newest_checkpoint_is_named_and_the_one_before_used(train: Callable[..., Run], toml: Path, capsys: pytest.CaptureFixture) -> None:
    run = train(toml, *STEPS)
    expected = run.series("loss")
    path = next((run.folder / "checkpoint/step-16").glob("*.distcp"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    capsys.readouterr()
    train(toml, *STEPS, folder=run.folder)
    first_line = capsys.readouterr().out.split("\n")[0]
    assert first_line.startswith("resuming after step 12")
    assert path.name in first_line
    assert "step-16.damaged-0" in first_line
    assert run.series("loss") == expected


def test_finished_run_says_how_to_extend_it_and_is_extended(train: Callable[..., Run], toml: Path, capsys: pytest.CaptureFixture) -> None:
    run = train(toml, "--training.steps", "6")
    capsys.readouterr()
    train(toml, "--training.steps", "6", folder=run.folder)
    assert "extend it with more --training.steps or --training.epochs (now 6 steps)" in capsys.readouterr().out
    train(toml, "--training.steps", "8", folder=run.folder)
    assert [row["step"] for row in run.rows() if "loss" in row] == list(range(1, 9))


def test_going_back_sets_later_steps_aside_and_a_restart_takes_the_newest(
    train: Callable[..., Run], toml: Path, capsys: pytest.CaptureFixture
) -> None:
    run = train(toml, *STEPS)
    back = [*STEPS, "--checkpoint.load_step", "8"]
    train(toml, *back, folder=run.folder)
    names = sorted(path.name for path in (run.folder / "checkpoint").iterdir())
    assert names == ["step-12", "step-12.superseded-0", "step-16", "step-16.superseded-0", "step-4", "step-8"]
    capsys.readouterr()
    train(toml, *back, folder=run.folder)
    assert capsys.readouterr().out.startswith("resuming after step 16")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--dataset.train_on", "all"], "dataset.train_on"),
        (["--training.seq_len", "64"], "training.seq_len"),
        (["--training.seed", "1"], "training.seed"),
        (["--training.global_batch_size", "4"], "training.global_batch_size"),
        (["--dataset.no-packing"], "dataset.packing"),
        (["--model.hidden_size", "64"], "model"),
        (["--optimizer.name", "SGD"], "optimizer.name"),
        (["--training.dtype", "float64"], "training.dtype"),
        (["--validation.fraction", "0.2"], "validation.fraction"),
    ],
)
def test_resume_of_another_run_stops_by_name(train: Callable[..., Run], toml: Path, words: list[str], named: str) -> None:
    run = train(toml, "--training.steps", "2")
    with pytest.raises(CheckpointError, match=f"changed:\n(.*\n)*  {named}"):
        train(toml, "--training.steps", "4", *words, folder=run.folder)


def test_changed_data_or_initial_weights_stop_the_resume_by_name(train: Callable[..., Run], toml: Path, tmp_path: Path) -> None:
    run = train(toml, "--training.steps", "2")
    other = tmp_path / "without-model.toml"
    other.write_text(toml.read_text().replace("hidden_size = 32", "").replace("intermediate_size = 64", "").replace("num_hidden_layers = 2", ""))
    other.write_text(other.read_text().replace("num_attention_heads = 4", "").replace("num_key_value_heads = 2", ""))
    with pytest.raises(CheckpointError, match=r"  checkpoint\.initial_load_path: '' then"):
        train(other, "--training.steps", "4", "--checkpoint.initial_load_path", str(run.folder / "checkpoint/step-2"), folder=run.folder)
    write_chats(tmp_path / "chats.jsonl", 201)
    with pytest.raises(CheckpointError, match="  content of the data: "):
        train(toml, "--training.steps", "4", folder=run.folder)


def test_resume_must_and_never(train: Callable[..., Run], toml: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(CheckpointError, match="resume is 'must'"):
        train(toml, "--training.steps", "2", "--checkpoint.resume", "must")
    run = train(toml, "--training.steps", "2")
    capsys.readouterr()
    train(toml, "--training.steps", "2", "--checkpoint.resume", "never", folder=run.folder)
    assert capsys.readouterr().out.startswith("starting fresh: checkpoint.resume is 'never'; 1 old checkpoints set aside")
    assert (run.folder / "checkpoint/step-2.superseded-0").is_dir()


def test_model_only_last_checkpoint_is_passed_over_on_resume(train: Callable[..., Run], toml: Path, capsys: pytest.CaptureFixture) -> None:
    run = train(toml, "--training.steps", "6", "--checkpoint.model_weights_only", "--checkpoint.export_dtype", "bfloat16")
    manifest = json.loads((run.folder / "checkpoint/step-6/manifest.json").read_text())
    assert manifest["kind"] == "model"
    capsys.readouterr()
    train(toml, "--training.steps", "8", folder=run.folder)
    assert capsys.readouterr().out.startswith("resuming after step 4: the newest good checkpoint; step 6 holds model weights only")
    assert run.series("loss") == train(toml, "--training.steps", "8").series("loss")[:4] + run.series("loss")[4:]


def test_seed_checkpoint_gives_any_layout_its_weights(tmp_path: Path, toml: Path, train: Callable[..., Run]) -> None:
    run = train(toml, *STEPS, "--checkpoint.create_seed_checkpoint", "--training.seed", "7")
    assert sorted(path.name for path in (run.folder / "checkpoint").iterdir()) == ["step-0"]
    run_processes([[str(toml), *STEPS, "--training.dtype", "float64", "--job.dump_folder", str(run.folder)]], 2)
    drawn = train(toml, *STEPS, "--training.dtype", "float64", "--training.seed", "7")
    first = next(row for row in run.rows() if "validation_loss" in row)
    # The seed's weights were stored in float32, as drawn; only the order of the data differs, which validation does not see.
    assert first["validation_loss"] == pytest.approx(drawn.series("validation_loss")[0], rel=1e-9)


def test_weights_start_from_any_checkpoint_of_ours(train: Callable[..., Run], toml: Path, tmp_path: Path) -> None:
    run = train(toml, "--training.steps", "4")
    tokenizer = next(line for line in toml.read_text().splitlines() if line.startswith("tokenizer_path"))
    data = next(line for line in toml.read_text().splitlines() if line.startswith("path"))
    other = tmp_path / "from.toml"
    other.write_text(f"[model]\n{tokenizer}\n[dataset]\n{data}\n[training]\nseq_len = 128\nsteps = 1\n[validation]\nenable = true\nfraction = 0.1\n")
    bare = tmp_path / "bare.toml"  # a step folder says in its config.toml where its tokenizer is
    bare.write_text(other.read_text().replace(f"[model]\n{tokenizer}\n", ""))
    for config in (other, bare):
        for path in (run.folder / "checkpoint/step-4", run.folder / "export"):
            again = train(config, "--checkpoint.initial_load_path", str(path))
            assert again.series("validation_loss")[0] == run.series("validation_loss")[-1]
    with pytest.raises(FormatError, match=r"holds no weights itself; name the folder .*export"):
        train(bare, "--checkpoint.initial_load_path", str(run.folder))


def test_model_only_run_is_exported_again_but_not_extended_from_nothing(train: Callable[..., Run], toml: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["--checkpoint.model_weights_only", "--checkpoint.interval", "100"]
    run = train(toml, "--training.steps", "3", *words)
    expected = run.weights()
    shutil.rmtree(run.folder / "export")  # as if it had been killed before the export
    capsys.readouterr()
    train(toml, "--training.steps", "3", *words, folder=run.folder)
    assert capsys.readouterr().out.startswith("finished at step 3 already")
    assert all(torch.equal(run.weights()[name], weight) for name, weight in expected.items())
    assert len(run.series("loss")) == 3
    with pytest.raises(CheckpointError, match="no full checkpoint to resume from: start another run from it"):
        train(toml, "--training.steps", "6", *words, folder=run.folder)


def test_refused_resume_leaves_the_step_folders_as_they_were(train: Callable[..., Run], toml: Path) -> None:
    run = train(toml, *STEPS)
    before = sorted(path.name for path in (run.folder / "checkpoint").iterdir())
    with pytest.raises(CheckpointError, match=r"  training\.seq_len"):
        train(toml, *STEPS, "--checkpoint.load_step", "4", "--training.seq_len", "64", folder=run.folder)
    assert sorted(path.name for path in (run.folder / "checkpoint").iterdir()) == before


def test_numbers_that_are_not_finite_stop_the_run_and_spare_the_checkpoints(train: Callable[..., Run], toml: Path) -> None:
    run = train(toml, "--training.steps", "4", "--lr_scheduler.decay_type", "constant")
    with pytest.raises(NumbersError, match=r"step \d+: loss .*stopped before the weights change"):
        train(toml, "--training.steps", "50", "--lr_scheduler.decay_type", "constant", "--optimizer.lr", "1e30", folder=run.folder)
    assert all(math.isfinite(loss) for loss in run.series("loss"))
    weights = train(toml, "--training.steps", "4", "--lr_scheduler.decay_type", "constant", folder=run.folder).weights()
    assert all(torch.isfinite(weight).all() for weight in weights.values())


def test_a_run_never_replaces_what_it_did_not_make(train: Callable[..., Run], toml: Path, tmp_path: Path) -> None:
    (tmp_path / "mine/export").mkdir(parents=True)
    (tmp_path / "mine/export/thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="export exists and was not written by a run"):
        train(toml, "--training.steps", "1", folder=tmp_path / "mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.toml").write_text(toml.read_text())
    with pytest.raises(ConfigError, match=r"config\.toml exists and was not written by a run"):
        train(toml, "--training.steps", "1", folder=tmp_path / "other")
    assert (tmp_path / "mine/export/thesis.txt").read_text() == "years of work"


def test_ranks_that_read_other_data_are_told_so(tmp_path: Path, toml: Path) -> None:
    """As on two machines whose copies of a file differ: rank 1 alone reads another one."""
    write_chats(tmp_path / "other.jsonl", 150, seed=9)
    program = (
        "import os, sys; sys.path.insert(0, {root!r}); import train\n"
        "from tunelib.parallel.runtime import leave, run_main\n"
        "import dataclasses\n"
        "find, other = train.find_words, {other!r}\n"
        "if os.environ['RANK'] == '1': train.find_words = lambda section, *rest: find(dataclasses.replace(section, path=other), *rest)\n"
        "leave(run_main(train.main, sys.argv[1:]))"
    )
    words = [str(toml), "--training.steps", "2", "--job.dump_folder", str(tmp_path / "run")]
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", program.format(root=str(ROOT), other=str(tmp_path / "other.jsonl")), *words],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [worker.communicate(timeout=120)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert [worker.returncode for worker in workers] == [2, 2]
    assert "content of the data" in said[0]
    assert "differ; give every machine the same files" in said[0]
    assert "Traceback" not in said[0] + said[1]


@pytest.mark.parametrize(
    ("world_size", "number"),
    [
        (1, signal.SIGINT),
        (2, signal.SIGTERM),
        pytest.param(1, signal.SIGUSR1, marks=pytest.mark.slow),
        pytest.param(2, signal.SIGUSR1, marks=pytest.mark.slow),
    ],
)
def test_signal_ends_the_run_saved_and_the_same_command_goes_on(tmp_path: Path, world_size: int, number: int) -> None:
    extra = "[checkpoint]\nenable_checkpoint = true\ninterval = 100000\n"
    toml = write_toml(tmp_path / "tiny.toml", write_chats(tmp_path / "chats.jsonl", 60), extra)
    stopped, whole = Run(tmp_path / "stopped"), Run(tmp_path / "whole")
    words = ["./run_train.sh", str(toml), "--job.dump_folder", str(stopped.folder)]
    environment = os.environ | {"NGPU": str(world_size), "OMP_NUM_THREADS": "1"}
    launcher = subprocess.Popen([*words, "--training.steps", "100000"], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 90
        while (not (stopped.folder / "metrics.jsonl").exists() or len(stopped.rows()) < 3) and time.monotonic() < deadline:
            time.sleep(0.1)
        launcher.send_signal(number)
        said = launcher.communicate(timeout=60)[1]
    finally:
        launcher.kill()
    assert launcher.returncode == 75, said
    assert said.count("by a signal, and saved; the same command goes on from there") == 1
    assert "Traceback" not in said
    step = len(stopped.rows())
    assert [path.name for path in (stopped.folder / "checkpoint").iterdir()] == [f"step-{step}"]
    steps = ["--training.steps", str(step + 3)]
    run_processes([[str(toml), "--job.dump_folder", str(run.folder), *steps] for run in (stopped, whole)], world_size)
    assert stopped.series("loss") == whole.series("loss")
