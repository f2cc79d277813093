"""torchrun, with the exit codes of tunelib: ``python -m tunelib.parallel.launch [torchrun's words] train.py …`` (run_train.sh).

torchrun makes every failure exit code 1, leaves its logs in the temporary folder for ever, and shows nothing of a failed rank
that its filter leaves out. Here the first worker that fails writes its code to the file that TUNELIB_EXIT_CODE_FILE names (and the number of the
restart), and the folder of that file, which also holds the logs, is removed at the end. torchrun runs in this very process, so that signals reach it.

Of several machines, each names itself by the address that it has on the way to machine 0: torchrun and gloo would look up its own name, which often
leads to 127.0.0.1, where no other machine finds it.
"""

import contextlib
import fcntl
import glob
import logging
import os
import shutil
import socket
import struct
import sys
import time
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
from torch.distributed.run import main

from tunelib.errors import EXIT_CODE_FILE, HUNG

SAID_IN_PLAIN_WORDS = (2, 75, HUNG)
MEETING_SECONDS = 600
"""How long machine 0 is waited for; torchrun on machine 0 waits as long for the others."""


def launch() -> int:
    """Run torchrun with this program's words; the exit code of the workers."""
    file = Path(os.environ[EXIT_CODE_FILE])
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what it has to say is said below
    try:
        if int(_word_after("--nnodes")) > 1:
            _name_this_machine(_word_after("--rdzv_endpoint"), is_first="is_host=true" in _word_after("--rdzv_conf"))
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
    except KeyboardInterrupt:  # while it waited for machine 0
        return 1
    except RendezvousError as error:
        code = _read_code(file)
        if code not in SAID_IN_PLAIN_WORDS:
            endpoint, reason = _word_after("--rdzv_endpoint"), error.__cause__ or repr(error)
            print(f"the machines do not meet at {endpoint}, or machine 0 has ended: {reason}", file=sys.stderr)
        return code
    finally:
        shutil.rmtree(file.parent, ignore_errors=True)


def _read_code(file: Path) -> int:
    """What a worker wrote; 1 where none did, or where one that wrote 0 was not alone."""
    written = sorted(file.parent.glob(f"{file.name}.*"), key=os.path.getmtime)  # one for each restart
    try:
        return int(written[-1].read_text()) or 1
    except (IndexError, OSError, ValueError):
        return 1


def _name_this_machine(endpoint: str, is_first: bool) -> None:
    """Have torchrun tell the others an address of this machine that they reach, and gloo listen there; what the user has set stays."""
    host, port = parse_rendezvous_endpoint(endpoint, default_port=29400)
    address = _resolve_own(host) if is_first else _wait_for_machine_0(host, port)
    os.environ.setdefault("PET_LOCAL_ADDR", host if is_first else address)  # --local_addr
    if interface := _find_interface(address):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    os.environ.setdefault("TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE", "[rank${rank}]:")  # the rank of all, not that within the machine


def _resolve_own(host: str) -> str:
    """Machine 0's address, from the name that all call it by, or ""; where it knows that name as a loopback address itself, the default route's."""
    address = ""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        address = socket.gethostbyname(host)
        if address.startswith("127.") and host not in (address, "localhost"):
            probe.connect(("198.51.100.1", 9))  # of a block kept for documents; nothing is sent
            return str(probe.getsockname()[0])
    return address


def _wait_for_machine_0(host: str, port: int) -> str:
    """Wait until machine 0 listens; this machine's address on the way there."""
    deadline, waiting = time.monotonic() + MEETING_SECONDS, False
    while True:
        try:
            with socket.create_connection((host, port), timeout=5) as connection:
                return str(connection.getsockname()[0])
        except OSError as error:
            if time.monotonic() > deadline:
                raise RendezvousError(f"machine 0 did not answer within {MEETING_SECONDS} seconds") from error
            if not waiting:
                print(f"waiting for machine 0 at {host}:{port} ({error})", file=sys.stderr)
            waiting = True
            time.sleep(1)


def _find_interface(address: str) -> str:
    """The name of the network interface whose IPv4 address this is; "" where none has it, or where the system is not Linux."""
    get_interface_address = 0x8915
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(probe, get_interface_address, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return ""


def _word_after(option: str) -> str:
    """What this program was given for an option of torchrun's, or ""."""
    return sys.argv[sys.argv.index(option) + 1] if option in sys.argv else ""


def _explain(error: ChildFailedError, folder: Path) -> None:
    """Show the last lines of the rank that failed first: torchrun's filter may have hidden them."""
    rank, failure = error.get_first_failure()
    logs = sorted(glob.glob(f"{folder}/*/attempt_*/{failure.local_rank}/stderr.log"), key=os.path.getmtime)
    if logs and str(failure.local_rank) not in _word_after("--local_ranks_filter").split(","):
        lines = Path(logs[-1]).read_text(errors="replace").splitlines()[-40:]
        print(f"The last lines of rank {rank}:", *lines, sep="\n", file=sys.stderr)
    print(error, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(launch())
