"""A process that runs train.py with a fault put in: ``faulty_worker.py '{"what": …, "step": 3, "rank": 0}' TOML words …`` (test_recovery.py)."""

import json
import math
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

import train
from tunelib.checkpoint import manager
from tunelib.errors import SaveError
from tunelib.parallel.reduce import local
from tunelib.parallel.runtime import leave, run_main

FAULT = json.loads(sys.argv[1])
IS_HERE = int(os.environ.get("RANK", "0")) == FAULT.get("rank", 0)
take_step, save_tensors, clip_gradients = train.train_step, manager.save_tensors, train.clip_gradients


def faulty_step(model, optimizer, work, *words):
    """A step in which something is not finite, or that never ends; FAULT says which and where."""
    if not (work.number in FAULT["steps"] and IS_HERE) or FAULT.setdefault("done", []).count(work.number) >= FAULT.get("times", 1):
        return take_step(model, optimizer, work, *words)
    FAULT["done"].append(work.number)
    if FAULT["what"] == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif FAULT["what"] == "sleep":
        time.sleep(1000)
    elif FAULT["what"] == "weight":
        local(model.model.norm.weight.detach()).view(-1)[:1] = math.nan
    elif FAULT["what"] == "gradient":
        train.clip_gradients = spoil_gradient
    return take_step(model, optimizer, work, *words)


def spoil_gradient(parameters, *words):
    """Clip gradients of which one number is not finite."""
    train.clip_gradients = clip_gradients
    parameters = list(parameters)
    local(parameters[-1].grad).view(-1)[:1] = math.nan
    return clip_gradients(parameters, *words)


def faulty_save(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """A save that fails, or is slow."""
    step = int(folder.name.split("-")[1].split(".")[0])
    if FAULT["what"] == "slow disk":
        time.sleep(1)
    if FAULT["what"] == "full disk" and step in FAULT["steps"]:
        raise SaveError(f"{folder} cannot be written: No space left on device")
    save_tensors(tensors, folder)


if __name__ == "__main__":
    train.train_step = faulty_step
    manager.save_tensors = faulty_save
    leave(run_main(train.main, sys.argv[2:]))
