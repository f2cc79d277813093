"""One of several processes that give a spread model its weights from a folder; prints what it read (test_formats_in_training.py)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tunelib.config.schema import ActivationCheckpoint, Comm, Model, Parallelism, Training
from tunelib.formats.load import check_weights, find_weights, give_weights
from tunelib.model.decoder import build_on_meta
from tunelib.parallel.apply import spread_model
from tunelib.parallel.mesh import build_layout
from tunelib.parallel.reduce import local
from tunelib.parallel.runtime import leave, run_main, start


def bytes_read() -> int:
    """What this process has asked the system to read."""
    return int(next(line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("rchar")).split()[1])


def main(words: list[str]) -> None:
    (folder,) = words
    with start(Training(), Comm()) as runtime:
        layout = build_layout(Parallelism(), runtime)
        # Once on the meta device and for imports that happen on the way.
        weights = find_weights(Model(), folder, 0, 0)
        model = build_on_meta(weights.config, runtime.param_dtype)
        spread_model(model, Parallelism(), ActivationCheckpoint(), layout, runtime)
        before = bytes_read()
        weights = find_weights(Model(), folder, 0, 0)
        check_weights(weights)
        give_weights(model, weights, seed=0)
        own = sum(local(parameter.detach()).numel() * 4 for parameter in model.parameters())
        print(f"read {bytes_read() - before} of own {own}", flush=True)


if __name__ == "__main__":
    leave(run_main(main, sys.argv[1:]))
