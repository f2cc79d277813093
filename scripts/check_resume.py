"""Does a run of this config come back, bit for bit, when it is killed in the midst of a save? On this machine, with its own model and data.

    python scripts/check_resume.py --job.config_file CONFIG.toml [--ngpu N] [--other_ngpu N] [--steps 6] [--section.key value …]

It trains a few steps; trains them again, and kills that run with SIGKILL while a checkpoint is being written; resumes it on as many processes, and
on another number; and compares rows, losses, weights and optimizer with the run that was not stopped (docs/checkpoints.md). The run folder of the
config is not touched. Exit code 0: it comes back; 1: it does not, or a run failed; 2: the config is wrong.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from tunelib.checkpoint.drill import FEWEST_STEPS, Plan, carry_out, count_processes, find_other_number, needed_settings
from tunelib.checkpoint.drill_traces import LIMITS
from tunelib.config import Config, LoadedConfig, load_config, load_or_exit, resolve_dump_folder, resolved_toml
from tunelib.config.fields import show_value
from tunelib.config.load import read_value
from tunelib.errors import ConfigError, TunelibError
from tunelib.parallel.runtime import resolve_dtypes


@dataclass(frozen=True)
class Words:
    """What the script takes besides the settings of a run."""

    ngpu: int
    other_ngpu: int | None
    steps: int
    folder: Path | None
    timeout_seconds: float
    keep: bool


def read_words(argv: list[str]) -> tuple[Words, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    given = os.environ.get("NGPU", "1")
    parser.add_argument("--ngpu", type=int, default=given, metavar="N", help="processes on this machine (default: $NGPU, else 1)")
    parser.add_argument("--other_ngpu", type=int, metavar="N", help="resume on so many besides; 0: on no other (default: half as many, 2 for 1)")
    parser.add_argument("--steps", type=int, default=6, metavar="N", help=f"steps of each run, at least {FEWEST_STEPS} (default 6)")
    parser.add_argument("--folder", type=Path, help="where to make a folder for the runs, which goes at the end (default: beside job.dump_folder)")
    parser.add_argument("--timeout_seconds", type=float, default=1800, metavar="S", help="that each run may take (default 1800)")
    parser.add_argument("--keep", action="store_true", help="keep the folder of the runs; one that shows a fault is kept anyway")
    own, others = parser.parse_known_args(argv)
    words = Words(**vars(own))
    if words.ngpu < 1 or (words.other_ngpu is not None and (words.other_ngpu < 0 or words.other_ngpu == words.ngpu)):
        raise ConfigError("command line: --ngpu is at least 1, and --other_ngpu another number, or 0 for none")
    if words.steps < FEWEST_STEPS or words.timeout_seconds <= 0:
        raise ConfigError(f"command line: --steps is at least {FEWEST_STEPS}, and --timeout_seconds above 0")
    return words, others


def find_changes(loaded: LoadedConfig, steps: int) -> dict[str, str]:
    """What the drill needs otherwise than the config has it, as TOML writes it."""
    needed = needed_settings(steps)
    if loaded.config.lora.save_adapter_weights_only:
        del needed["checkpoint.verify_export"]  # there is none
    return {key: show_value(value).strip('"') for key, value in needed.items() if read_value(loaded.config, key) != value}


def choose_others(words: Words, config: Config, run_words: list[str]) -> tuple[list[int], str]:
    """Numbers of processes to resume on besides, and what is to be said of them."""

    def find_fault(number: int) -> str:
        try:
            load_config(run_words, world_size=number)
        except ConfigError as error:
            return error.problems[0].partition(": ")[2]  # without the place, which is a line of the drill's own file
        return ""

    why_not = ""
    if config.dataset.streaming:
        why_not = "the order of a stream (dataset.streaming) depends on it"
    elif config.lora.dropout:
        why_not = "lora.dropout leaves out other inputs there"
    if words.other_ngpu is not None:
        if words.other_ngpu and (why_not := why_not or find_fault(words.other_ngpu)):
            raise ConfigError(f"command line: --other_ngpu {words.other_ngpu}: {why_not}")
        return [words.other_ngpu] if words.other_ngpu else [], ""
    most, number = torch.cuda.device_count() if torch.cuda.is_available() else 2 * words.ngpu, 0
    if not why_not:
        number, why_not = find_other_number(words.ngpu, most, find_fault)
    if not number:
        return [], f"resuming on another number of processes is left out: {why_not}"
    return [number], f"resuming on {count_processes(number)} besides, since half as many will not do: {why_not}" if why_not else ""


def make_plan(words: Words, loaded: LoadedConfig, folder: Path) -> tuple[Plan, list[int]]:
    """What the drill does, in a folder that is there; told in a line or two."""
    changes, toml = find_changes(loaded, words.steps), folder / "config.toml"
    toml.write_text(resolved_toml(loaded), encoding="utf-8")
    run_words = (str(toml), *[word for key, value in changes.items() for word in (f"--{key}", value)])
    config = load_config(list(run_words), world_size=words.ngpu).config
    others, remark = choose_others(words, config, list(run_words))
    print(f"in {folder}; otherwise than in the config: {', '.join(f'{key} = {value}' for key, value in changes.items())}", flush=True)
    print(f"{remark}\n" if remark else "", end="", flush=True)
    dtypes = resolve_dtypes(config.training, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    limits = LIMITS[str(max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)).removeprefix("torch.")]
    return Plan(run_words, folder, config.checkpoint.folder, words.ngpu, words.steps, words.timeout_seconds, limits), others


def main(argv: list[str]) -> int:
    words, others = read_words(argv)
    loaded = load_or_exit(others, world_size=words.ngpu)
    beside = resolve_dump_folder(loaded.config)
    parent = words.folder.absolute() if words.folder else beside.parent
    parent.mkdir(parents=True, exist_ok=True)
    folder, keep = Path(tempfile.mkdtemp(prefix=f"{beside.name}.check_resume-", dir=parent)), True
    try:
        is_good = carry_out(*make_plan(words, loaded, folder), lambda line: print(line, flush=True))
        keep = words.keep or not is_good
        return int(not is_good)
    except (ConfigError, KeyboardInterrupt, SystemExit):
        keep = words.keep
        raise
    finally:
        if keep:
            print(f"the runs are in {folder}", flush=True)
        else:
            shutil.rmtree(folder)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C, so that no run is left behind
    try:
        sys.exit(main(sys.argv[1:]))
    except TunelibError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
