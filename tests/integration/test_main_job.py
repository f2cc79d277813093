"""The main job: ./run_train.sh trains the debug model, and the real SmolLM2 is fine-tuned, exported and opened by transformers."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Run, run_processes, write_chats, write_toml
from safetensors.torch import load_file

from tunelib.config import load_config
from tunelib.data.tokenizer import Tokenizer
from tunelib.errors import ConfigError
from tunelib.files import lock_folder
from tunelib.formats.load import find_weights, give_weights
from tunelib.model.decoder import Decoder, build_on_meta

PROMPTS = ["What is the capital of France?", "Name three colours of the rainbow.", "Write one sentence about the sea.", "def add(a, b):"]
ANSWERS = {
    "What colour is Nora's house?": "Nora's house is green.",
    "Which animal does Otto keep?": "Otto keeps a goat.",
    "Who is the teacher?": "Ida is the teacher.",
}


def logits_of_ours(folder: Path, texts: list[str]) -> list[torch.Tensor]:
    """Logits (S, V) of each text, in float32, through the same calls that training makes."""
    weights = find_weights(load_config([str(ROOT / "train_configs/debug_model.toml")]).config.model, str(folder), 0, 0)
    model = build_on_meta(weights.config, torch.float32).to_empty(device="cpu")
    model.tie_weights()
    give_weights(model, weights, seed=0)
    return logits_of(model, folder, texts)


def logits_of(model: Decoder, folder: Path, texts: list[str]) -> list[torch.Tensor]:
    rows = [torch.tensor([Tokenizer(folder).encode(text, add_special_tokens=False).ids]) for text in texts]
    with torch.no_grad():
        return [model(row, torch.arange(row.shape[1])[None], (row.shape[1],))[0] for row in rows]


def logits_of_transformers(folder: Path, texts: list[str]) -> list[torch.Tensor]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return [model(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits[0] for text in texts]


def largest_difference(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    return max(float((one - two).abs().max()) for one, two in zip(first, second, strict=True))


def test_one_command_trains_the_debug_model_until_it_answers_exactly(tmp_path: Path) -> None:
    done = subprocess.run(
        ["./run_train.sh", "--job.dump_folder", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=280, env=os.environ | {"NGPU": "1"}
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    run = Run(tmp_path)
    entropy = float(re.search(r"unigram entropy ([0-9.]+) nats", done.stdout)[1])
    validation = run.series("validation_loss")
    assert validation == sorted(validation, reverse=True), "the held-out loss falls all the way"
    assert validation[-1] < 0.1 * entropy
    assert {row["prompt"]: row["answer"] for row in run.samples() if row["step"] == 100} == ANSWERS
    assert {row["prompt"] for row in run.samples() if row["step"] == 0 and row["answer"] != ANSWERS[row["prompt"]]} == set(ANSWERS)
    assert sorted(path.name for path in (tmp_path / "checkpoint").iterdir()) == ["step-100", "step-75"]
    texts = [f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n" for prompt in ANSWERS]
    assert largest_difference(logits_of_ours(tmp_path / "export", texts), logits_of_transformers(tmp_path / "export", texts)) <= 1e-4


def test_answers_of_the_debug_model_are_not_in_its_data() -> None:
    """They are learned from other phrasings, so a right sample is not a repeated row."""
    text = (ROOT / "train_configs/assets/debug/chat.jsonl").read_text()
    assert all(json.dumps(prompt)[1:-1] not in text for prompt in ANSWERS)


def test_logits_of_the_real_smollm2_equal_transformers(smollm2: Path) -> None:
    assert largest_difference(logits_of_ours(smollm2, PROMPTS), logits_of_transformers(smollm2, PROMPTS)) <= 1e-4


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_full_fine_tuning_of_the_real_smollm2(smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped config on one process, with the trained model kept so that its own logits can be compared with the export's."""
    import train

    kept: list[Decoder] = []
    monkeypatch.setattr(train, "build_on_meta", lambda *words: kept.append(build_on_meta(*words)) or kept[0])
    monkeypatch.chdir(ROOT)
    words = ["--job.dump_folder", str(tmp_path), "--checkpoint.export_dtype", "float32", "--training.steps", "12", "--checkpoint.interval", "6"]
    train.main(["train_configs/smollm2_135m_full.toml", *words])
    run = Run(tmp_path)
    first, last = run.series("validation_loss")[0], run.series("validation_loss")[-1]
    print(f"validation loss {first:.4f} → {last:.4f}")
    assert last < 0.7 * first
    difference = largest_difference(logits_of(kept[0], tmp_path / "export", PROMPTS), logits_of_transformers(tmp_path / "export", PROMPTS))
    print(f"export against the trained model in memory: largest difference of logits {difference:.2e}")
    assert difference <= 1e-4
    check_form(smollm2, tmp_path / "export")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_real_smollm2_on_two_processes_stopped_resumed_and_exported(smollm2: Path, tmp_path: Path) -> None:
    """The walking skeleton: real weights in → 2 ranks → stop → resume → export → opens in transformers."""
    words = [str(ROOT / "train_configs/smollm2_135m_full.toml"), "--checkpoint.initial_load_path", str(smollm2), "--dataset.path"]
    words += [
        str(ROOT / "train_configs/assets/debug/chat.jsonl"),
        "--training.seq_len",
        "128",
        "--checkpoint.interval",
        "2",
        "--validation.no-enable",
    ]
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    run_processes([[*words, "--training.steps", "4", "--lr_scheduler.decay_type", "constant", "--job.dump_folder", str(whole)]], 2, timeout=700)
    for steps in ("2", "4"):
        run_processes(
            [[*words, "--training.steps", steps, "--lr_scheduler.decay_type", "constant", "--job.dump_folder", str(stopped)]], 2, timeout=700
        )
    assert Run(stopped).series("loss") == Run(whole).series("loss")
    expected, found = load_file(whole / "export/model.safetensors"), load_file(stopped / "export/model.safetensors")
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    check_form(smollm2, stopped / "export")
    assert largest_difference(logits_of_ours(stopped / "export", PROMPTS), logits_of_transformers(stopped / "export", PROMPTS)) <= 1e-4


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_adapters_of_the_real_smollm2(smollm2: Path, tmp_path: Path, train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped config: the held-out loss falls, a stopped run goes on bit for bit, and transformers computes what the merged export does."""
    monkeypatch.chdir(ROOT)
    short = ["--lr_scheduler.decay_type", "constant", "--checkpoint.interval", "4", "--checkpoint.export_dtype", "float32"]
    whole = train(ROOT / "train_configs/smollm2_135m_lora.toml", *short, "--training.steps", "8")
    first, last = whole.series("validation_loss")[0], whole.series("validation_loss")[-1]
    print(f"validation loss {first:.4f} → {last:.4f}")
    assert last < 0.7 * first
    stopped = train(ROOT / "train_configs/smollm2_135m_lora.toml", *short, "--training.steps", "4")
    train(ROOT / "train_configs/smollm2_135m_lora.toml", *short, "--training.steps", "8", folder=stopped.folder)
    assert stopped.series("loss") == whole.series("loss")
    expected, found = (load_file(run.folder / "adapter/adapter_model.safetensors") for run in (whole, stopped))
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    check_form(smollm2, stopped.folder / "export")
    assert largest_difference(logits_of_ours(stopped.folder / "export", PROMPTS), logits_of_transformers(stopped.folder / "export", PROMPTS)) <= 1e-4


def check_form(came: Path, left: Path) -> None:
    """The folder that left has the files, keys and settings of the one that came."""
    assert {path.name for path in left.iterdir()} == {path.name for path in came.iterdir()} | {"manifest.json"}
    assert load_file(left / "model.safetensors").keys() == load_file(came / "model.safetensors").keys()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (left / name).read_bytes() == (came / name).read_bytes()
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (came, left))
    assert {**before, "torch_dtype": after["torch_dtype"]} == after


def test_run_on_several_processes_tells_torchrun_the_exit_code(tmp_path: Path) -> None:
    """A user's mistake that only the data shows is code 2 and one sentence, also through torchrun."""
    words = ["--job.dump_folder", str(tmp_path), "--dataset.path", str(tmp_path / "nowhere.jsonl")]
    done = subprocess.run(["./run_train.sh", *words], cwd=ROOT, capture_output=True, text=True, timeout=120, env=os.environ | {"NGPU": "2"})
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("no such data file") == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "Traceback" not in done.stderr


def test_two_runs_never_write_to_one_folder(tmp_path: Path, train: Callable[..., Run]) -> None:
    toml = write_toml(tmp_path / "tiny.toml", write_chats(tmp_path / "chats.jsonl", 40))
    with lock_folder(tmp_path / "run"), pytest.raises(ConfigError, match="another run is writing"):
        train(toml, "--training.steps", "1", folder=tmp_path / "run")


def test_resolved_toml_starts_the_same_run_again(tmp_path: Path, train: Callable[..., Run]) -> None:
    toml = write_toml(tmp_path / "tiny.toml", write_chats(tmp_path / "chats.jsonl", 60), "[lr_scheduler]\nwarmup_steps = 2\n")
    words = ["--training.steps", "4", "--training.seed", "3", "--checkpoint.enable_checkpoint"]
    run = train(toml, *words)
    for resolved in (run.folder / "config.toml", run.folder / "checkpoint/step-4/config.toml"):
        again = train(resolved)
        assert again.series("loss") == run.series("loss")
        assert all(torch.equal(again.weights()[name], weight) for name, weight in run.weights().items())


def test_workers_die_with_the_launcher_even_if_it_is_killed(tmp_path: Path) -> None:
    toml = write_toml(tmp_path / "tiny.toml", write_chats(tmp_path / "chats.jsonl", 60))
    words = ["--training.steps", "100000", "--job.dump_folder", str(tmp_path / "run")]
    launcher = subprocess.Popen(["./run_train.sh", *words], cwd=ROOT, stdout=subprocess.DEVNULL, env=os.environ | {"NGPU": "2", "CONFIG": str(toml)})
    workers: list[int] = []
    try:
        deadline = time.monotonic() + 90
        while not (tmp_path / "run/metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        workers = children_of(launcher.pid)
        assert len(workers) == 2
        launcher.kill()
        launcher.wait()
        deadline = time.monotonic() + 20
        while any(is_running(worker) for worker in workers) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not any(is_running(worker) for worker in workers)
    finally:
        launcher.kill()
        launcher.wait()
        for worker in filter(is_running, workers):
            os.kill(worker, signal.SIGKILL)


def children_of(parent: int) -> list[int]:
    """The processes that run train.py for this launcher."""
    listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout.splitlines()[1:]
    rows = [line.split(None, 2) for line in listed]
    return [int(pid) for pid, ppid, words in rows if int(ppid) == parent and "train.py" in words]


def is_running(process: int) -> bool:
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")
