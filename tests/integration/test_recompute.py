"""Activations worked out again: the same numbers, more work, less memory."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Run, write_chats, write_toml
from torch.utils.flop_counter import FlopCounterMode

MODES = {
    "none": [],
    "full": ["--activation_checkpoint.mode", "full"],
    "every second": ["--activation_checkpoint.mode", "selective", "--activation_checkpoint.selective_ac_option", "2"],
    "operators": ["--activation_checkpoint.mode", "selective"],
}


@pytest.mark.parametrize("kind", [[], ["--lora.enable", "--lora.rank", "4", "--lora.dropout", "0.2"]], ids=["full", "LoRA with dropout"])
def test_numbers_are_the_same_bit_for_bit_and_the_work_is_what_was_asked_for(tmp_path: Path, train: Callable[..., Run], kind: list[str]) -> None:
    data = tmp_path / "tokens.jsonl"  # all of which are trained: no layer is left out in part
    data.write_text("".join(json.dumps({"input_ids": [(7 * row + place) % 600 for place in range(40 + row)]}) + "\n" for row in range(60)))
    toml = write_toml(tmp_path / "tiny.toml", data)
    runs, work = {}, {}
    for name, words in MODES.items():
        with FlopCounterMode(display=False) as counter:
            runs[name] = train(toml, "--training.steps", "3", "--checkpoint.no-verify_export", *kind, *words)
        work[name] = counter.get_total_flops()
    for name, run in runs.items():
        assert run.series("loss") == runs["none"].series("loss"), name
        assert run.series("grad_norm") == runs["none"].series("grad_norm"), name
    assert work["operators"] == work["none"]  # products are kept
    assert work["none"] < work["every second"] < work["full"]
    layers = work["full"] - work["none"]  # one more forward pass of both layers
    assert work["every second"] - work["none"] == layers // 2


@pytest.mark.parametrize("mode", ["full", "operators"])
def test_less_is_kept_for_the_backward_pass(tmp_path: Path, train: Callable[..., Run], mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import train as program

    toml = write_toml(tmp_path / "tiny.toml", write_chats(tmp_path / "chats.jsonl", 60))
    kept: dict[str, int] = {}
    step = program.train_step

    def watched(name: str) -> Callable[..., tuple[float, float]]:
        def run(model: torch.nn.Module, *words: object) -> tuple[float, float]:
            forward, own = model.forward, {parameter.data_ptr() for parameter in model.parameters()}

            def count(*inputs: object, **named: object) -> torch.Tensor:
                seen: dict[int, int] = {}

                def pack(tensor: torch.Tensor) -> torch.Tensor:
                    if tensor.data_ptr() not in own:
                        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                    return tensor

                with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                    result = forward(*inputs, **named)
                kept[name] = max(kept.get(name, 0), sum(seen.values()))
                return result

            monkeypatch.setattr(model, "forward", count)
            return step(model, *words)  # type: ignore[arg-type]

        return run

    for name in ("none", mode):
        monkeypatch.setattr(program, "train_step", watched(name))
        train(toml, "--training.steps", "1", *MODES[name])
    assert kept[mode] < 0.75 * kept["none"], kept


def test_documents_attended_to_in_blocks_give_the_same_numbers(tmp_path: Path, train: Callable[..., Run]) -> None:
    """Of a length that torch's own attention is slower with on a CPU."""
    data = tmp_path / "long.jsonl"
    data.write_text("".join(json.dumps({"input_ids": [(7 * row + place) % 600 for place in range(400)]}) + "\n" for row in range(12)))
    toml = write_toml(tmp_path / "tiny.toml", data)
    words = ["--training.seq_len", "410", "--training.steps", "3", "--training.global_batch_size", "2", "--checkpoint.no-verify_export"]
    runs = {name: train(toml, *words, *chosen) for name, chosen in MODES.items()}
    for name, run in runs.items():
        assert run.series("loss") == runs["none"].series("loss"), name
        assert run.series("grad_norm") == runs["none"].series("grad_norm"), name
