"""The configuration: a TOML file and a command line become one frozen, checked ``Config``. Nothing here imports torch."""

from tunelib.config.load import LoadedConfig, check_own_config, describe_changes, load_config, load_or_exit, read_written, resolved_toml
from tunelib.config.resolve import resolve_data_ranks, resolve_dump_folder, resolve_local_batch_size, resolve_shard_degree
from tunelib.config.schema import Config
from tunelib.config.settings import Origin

__all__ = [
    "Config",
    "LoadedConfig",
    "Origin",
    "check_own_config",
    "describe_changes",
    "load_config",
    "load_or_exit",
    "read_written",
    "resolve_data_ranks",
    "resolve_dump_folder",
    "resolve_local_batch_size",
    "resolve_shard_degree",
    "resolved_toml",
]
