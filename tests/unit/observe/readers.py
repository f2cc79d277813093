"""Reads back what a run wrote for TensorBoard and W&B, with their own readers; and makes run folders of any length."""

import json
import math
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Series = dict[str, list[tuple[int, float]]]


def series_of(rows: list[dict[str, Any]]) -> Series:
    """Rows of metrics.jsonl → each name's steps and values."""
    found: Series = {}
    for row in rows:
        for name, value in row.items():
            if name != "step":
                found.setdefault(name, []).append((row["step"], value))
    return found


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_tensorboard(folder: Path) -> Series:
    """What TensorBoard shows of a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


@dataclass
class WandbRun:
    """A run in W&B's file."""

    project: str = ""
    name: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)


def read_wandb(folder: Path) -> list[WandbRun]:
    """The runs that W&B wrote offline in a run folder, the oldest first."""
    paths = sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    return [read_wandb_run(path) for path in paths]


def read_wandb_run(path: Path) -> WandbRun:
    """A finished run; its file is written by a process of W&B's own, which may take a moment longer than the run."""
    from wandb.proto.wandb_internal_pb2 import Record

    deadline = time.monotonic() + 20
    while True:
        records = [Record.FromString(data) for data in read_log(path)]
        if any(record.HasField("exit") for record in records):
            break
        assert time.monotonic() < deadline, f"{path} does not end"
        time.sleep(0.05)
    found = WandbRun()
    for record in records:
        if record.HasField("run"):
            found.project, found.name = record.run.project, record.run.display_name
            found.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        if record.HasField("history"):
            row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            found.rows.append({name: value for name, value in row.items() if not name.startswith("_")})
    return found


def read_log(path: Path) -> Iterator[bytes]:
    """The records of LevelDB's log format: blocks of 32 KiB, in them pieces of checksum, length, kind, data; after a header of seven bytes."""
    content, at, record = path.read_bytes(), 7, b""
    assert content[:4] in (b":W&B", b"")
    while at + 7 <= len(content):
        if (left := 2**15 - at % 2**15) < 7:
            at += left  # a piece's head is never cut
            continue
        size, kind = struct.unpack_from("<HB", content, at + 4)
        if at + 7 + size > len(content):
            return  # it is being written
        record = content[at + 7 : at + 7 + size] if kind in (1, 2) else record + content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last piece of one
            yield record


def write_run(folder: Path, num_rows: int, scale: float = 1.0, **settings: object) -> Path:
    """A run folder as a run would have left it; losses fall from 6 · scale, with noise that is always the same."""
    folder.mkdir(parents=True)
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, num_rows + 1):
            done, noise = step / num_rows, math.sin(step * 12.9898) * math.cos(step * 4.1414)
            row = {
                "step": step,
                "epoch": done * 3,
                "lr": 1e-3 * min(1, done * 10) * (1 + math.cos(math.pi * done)) / 2,
                "loss": scale * (0.4 + 5.6 * math.exp(-6 * done)) * (1 + 0.15 * noise),
                "grad_norm": 0.5 + 6 * math.exp(-8 * done) + 0.3 * abs(noise),
                "tokens": step * 2000,
                "tokens_per_second": 9800 + 400 * noise,
                "seconds_per_step": 0.2,
                "memory_gib": 0.54 + 0.02 * done,
            }
            file.write(json.dumps(row) + "\n")
            if step % max(1, num_rows // 8) == 0 or step == 1:
                held_out = {"step": step, "validation_loss": scale * (0.5 + 5.5 * math.exp(-5 * done)), "tokens": step * 2000}
                file.write(json.dumps(held_out) + "\n")
    with open(folder / "samples.jsonl", "w") as file:
        for step, answer in ((0, "who who who"), (num_rows, "Otto keeps a goat.")):
            file.write(json.dumps({"step": step, "prompt": "Who keeps <goats>?", "answer": answer}) + "\n")
    tables: dict[str, dict[str, object]] = {}
    for key, value in {"training.steps": num_rows, "optimizer.lr": 1e-3, **settings}.items():
        tables.setdefault(key.partition(".")[0], {})[key.partition(".")[2]] = value
    with open(folder / "config.toml", "w") as file:
        for table, values in tables.items():
            file.write(f"[{table}]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items()))
    (folder / "summary.txt").write_text(f"done       step {num_rows}\n")
    return folder
