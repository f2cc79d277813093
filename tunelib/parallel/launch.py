"""torchrun, with the exit codes of tunelib: ``python -m tunelib.parallel.launch [torchrun's words] train.py …`` (run_train.sh).

torchrun makes every failure exit code 1, leaves its logs in the temporary folder for ever, and shows nothing of a failed rank
that its filter leaves out. Here the first worker that fails writes its code to the file that TUNELIB_EXIT_CODE_FILE names (and the number of the
restart), and the folder of that file, which also holds the logs, is removed at the end. torchrun runs in this very process, so that signals reach it.
"""

import glob
import logging
import os
import shutil
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

from tunelib.errors import EXIT_CODE_FILE

SAID_IN_PLAIN_WORDS = (2, 75)


def launch() -> int:
    """Run torchrun with this program's words; the exit code of the workers."""
    file = Path(os.environ[EXIT_CODE_FILE])
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what it has to say is said below
    try:
        main()
        return 0
    except ChildFailedError as error:
        code = _read_code(file)
        if code not in SAID_IN_PLAIN_WORDS:
            _explain(error, file.parent)
        return code
    except SignalException as error:  # torchrun itself was signalled, and passed it on to the workers
        code = _read_code(file)
        if code not in SAID_IN_PLAIN_WORDS:
            print(error, file=sys.stderr)
        return code
    finally:
        shutil.rmtree(file.parent, ignore_errors=True)


def _read_code(file: Path) -> int:
    """What a worker wrote; 1 where none did, or where one that wrote 0 was not alone."""
    written = sorted(file.parent.glob(f"{file.name}.*"), key=lambda path: int(path.suffix[1:]))  # one for each restart
    try:
        return int(written[-1].read_text()) or 1
    except (IndexError, OSError, ValueError):
        return 1


def _explain(error: ChildFailedError, folder: Path) -> None:
    """Show the last lines of the rank that failed first: torchrun's filter may have hidden them."""
    rank, failure = error.get_first_failure()
    logs = sorted(glob.glob(f"{folder}/*/attempt_*/{failure.local_rank}/stderr.log"), key=os.path.getmtime)
    shown = sys.argv[sys.argv.index("--local_ranks_filter") + 1].split(",") if "--local_ranks_filter" in sys.argv else []
    if logs and str(failure.local_rank) not in shown:
        lines = Path(logs[-1]).read_text(errors="replace").splitlines()[-40:]
        print(f"The last lines of rank {rank}:", *lines, sep="\n", file=sys.stderr)
    print(error, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(launch())
