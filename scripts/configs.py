"""The shipped configs: what there is, for which machine, with how much memory; and a copy of one to change.

    python scripts/configs.py ls
    python scripts/configs.py cp llama2_7b_lora mine/

A copy brings the files that it is based on. Paths inside are relative to the directory that training is started in.
"""

import sys
from pathlib import Path
from typing import Annotated

import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))

from tunelib.config.shipped import copy_shipped, list_shipped
from tunelib.errors import ConfigError


def list_all() -> None:
    """Each shipped config: its name, the machine it is for, estimated memory of each of its GPUs, what it does."""
    found = list_shipped()
    names, machines = max(len(config.name) for config in found), max(len(config.machine) for config in found)
    for config in found:
        print(f"{config.name:{names}}  {config.machine:{machines}}  {config.memory_gib:>6} GiB  {config.description}")


def copy(name: Annotated[str, tyro.conf.Positional], folder: Annotated[Path, tyro.conf.Positional]) -> None:
    """Copy a shipped config, and the files that it is based on, into a folder.

    Args:
        name: such as llama2_7b_lora; `ls` shows them.
        folder: where it goes; made if need be.
    """
    own, *bases = copy_shipped(name, folder)
    based = f", based on {', '.join(path.name for path in bases)} beside it" if bases else ""
    print(f"{own}{based}; train it with: ./run_train.sh {own}")


def main() -> int:
    try:
        tyro.extras.subcommand_cli_from_dict({"ls": list_all, "cp": copy}, description=__doc__)
    except ConfigError as error:
        print("\n".join(error.problems), file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
