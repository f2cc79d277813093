"""The exceptions of the user's world; an assert is for ours.

TunelibError
├── ConfigError       the TOML file, the command line, or the two together   exit code 2
├── DataError         a data file, a row in it, a chat template, a tokenizer  exit code 2
├── FormatError       weights or a config.json that cannot be read as asked   exit code 2
├── CheckpointError   a checkpoint that is missing, damaged or does not fit   exit code 2
│   ├── SaveError     writing one failed: the disk's fault, not the user's    exit code 1
│   └── UnreachableError  the disk with it does not answer just now           exit code 1
└── NumbersError      training ran into numbers that are not finite           exit code 1

Stopped is none of them, and no Exception: a signal asked the run to end, wherever it was       exit code 75
"""

HUNG = 124
"""Exit code where something did not end in its time."""
EXIT_CODE_FILE = "TUNELIB_EXIT_CODE_FILE"
"""Environment variable with the file that a worker of several writes its exit code to: torchrun passes on no code but 1."""


class TunelibError(Exception):
    """A problem that the person who started the run can mend; its text says how."""

    exit_code = 2
    agreed = False
    """Whether every rank raises, so that one of them is enough to print it."""


class ConfigError(TunelibError):
    """One or more problems of the configuration, each a complete sentence with its place.

    Args:
        problems: the messages, in the order in which they are shown.
    """

    def __init__(self, problems: list[str] | str):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class DataError(TunelibError):
    """Data, template or tokenizer that cannot be trained on; names the file and line where it can."""


class FormatError(TunelibError):
    """Weights, or the config beside them, that cannot be read or written as asked; names tensor and file."""


class CheckpointError(TunelibError):
    """A checkpoint that is missing, damaged, or made by a run that differs from this one."""


class SaveError(CheckpointError):
    """A checkpoint or an export could not be written."""

    exit_code = 1


class UnreachableError(CheckpointError):
    """A disk that does not answer just now: nothing is known of what it holds, and nothing is decided."""

    exit_code = 1


class NumbersError(TunelibError):
    """A loss or gradient that is not finite: nothing after it is worth keeping."""

    exit_code = 1


class Stopped(BaseException):
    """The run ended because a signal asked it to, with everything saved; the same command goes on.

    As with KeyboardInterrupt, nobody on the way takes it for a fault of a file or a library.
    """

    exit_code = 75
    agreed = True
