"""What the user can mend ends with exit code 2, a failed write with 1; nothing is lost of several problems."""

import pytest

from tunelib.errors import CheckpointError, ConfigError, DataError, FormatError, SaveError, TunelibError


@pytest.mark.parametrize(("kind", "code"), [(ConfigError, 2), (DataError, 2), (FormatError, 2), (CheckpointError, 2), (SaveError, 1)])
def test_each_error_has_its_exit_code(kind: type[TunelibError], code: int) -> None:
    assert issubclass(kind, TunelibError)
    assert kind.exit_code == code


def test_config_error_says_every_problem() -> None:
    assert str(ConfigError(["one", "two"])) == "one\ntwo"
    assert ConfigError("alone").problems == ["alone"]
