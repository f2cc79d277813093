"""Data sets of the Hugging Face Hub, fetched once or streamed, at a commit that is known.

What `datasets` would do in silence is refused: read a local folder that has the name of the data set, or another commit from its
cache when the Hub does not answer.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunelib.config.schema import Source
from tunelib.data.readers import RawRow
from tunelib.errors import DataError, TunelibError

if TYPE_CHECKING:
    import datasets

BATCH_ROWS = 256


@dataclass(frozen=True)
class HubData:
    """One split of a data set on the disk; ``digest`` is of its name, subset, split and commit."""

    dataset: "datasets.Dataset"
    commit: str
    digest: str
    size_bytes: int
    notes: tuple[str, ...]


def load_hub(source: Source) -> HubData:
    """Fetch a split into the cache of `datasets`, or find it there.

    Raises:
        DataError: no such data set, subset, split or revision, one that is gated, or no way to the Hub and nothing in the cache.
    """
    builder, commit = _build_checked(source)
    try:
        builder.download_and_prepare()
        dataset = builder.as_dataset(split=source.split)
    except Exception as error:  # whatever a parser, the network or the disk raised; `datasets` wraps some of it
        raise DataError(f"{_name(source)} cannot be fetched: {_describe(error.__cause__ or error)}") from None
    media = [column for column, feature in dataset.features.items() if _holds_media(feature)]
    size_bytes = sum(Path(file["filename"]).stat().st_size for file in dataset.cache_files)
    notes = (f"{source.hub}: columns with images, sound and the like are left out: {', '.join(media)}",) if media else ()
    return HubData(dataset.remove_columns(media), commit, _digest_of(source, commit), size_bytes, notes)


def read_hub(dataset: "datasets.Dataset | datasets.IterableDataset") -> Iterator[RawRow]:
    """The rows with their numbers from 1, read in batches."""
    number, batches = 0, iter(dataset.iter(batch_size=BATCH_ROWS))
    while True:
        try:
            batch = next(batches, None)
        except Exception as error:  # of the network, the disk or a parser, as the library raised it
            raise DataError(f"the rows after row {number} of the data set cannot be read: {_describe(error)}") from None
        if batch is None:
            return
        for values in zip(*batch.values(), strict=True):
            number += 1
            yield RawRow(0, number, dict(zip(batch, values, strict=True)))


def stream_hub(source: Source) -> tuple["datasets.IterableDataset", str, str]:
    """A split that is read from the Hub while it is used, its commit, and the digest of its name, subset, split and commit.

    The stream has ``state_dict`` and ``load_state_dict``, and `datasets.distributed.split_dataset_by_node` shards it.

    Raises:
        DataError: as `load_hub`. What goes wrong later, while the stream is read, is the stream's to raise.
    """
    builder, commit = _build_checked(source)
    try:
        dataset = builder.as_streaming_dataset(split=source.split)
    except Exception as error:
        raise DataError(f"{_name(source)} cannot be streamed: {_describe(error)}") from None
    media = [column for column, feature in (dataset.features or {}).items() if _holds_media(feature)]
    if media:
        dataset = dataset.decode(False).remove_columns(media)
    return dataset, commit, _digest_of(source, commit)


def check_token(token: str | None, error: type[TunelibError]) -> None:
    """Refuse a token that no header can hold, before it stands in a message of the network's library."""
    if token is not None and not re.fullmatch(r"[!-~]*", token):
        raise error("the token for the Hub (HF_TOKEN, or that of a login) holds a space or a character that no token has: copy it again")


def _name(source: Source) -> str:
    return f"{source.hub}/{source.subset}" if source.subset else source.hub


def _digest_of(source: Source, commit: str) -> str:
    words = "\0".join((source.hub, source.subset, source.split, commit))
    return hashlib.blake2b(words.encode(), digest_size=16).hexdigest()


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _build_checked(source: Source) -> tuple[Any, str]:
    """The builder of a subset that has the split, and its commit; nothing but a few small files is fetched."""
    try:
        import datasets
    except ImportError:
        raise DataError(f"{source.hub}: data sets on the Hub need the package datasets: pip install datasets") from None
    import huggingface_hub.utils

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    huggingface_hub.utils.disable_progress_bars()
    huggingface_hub.utils.logging.set_verbosity(huggingface_hub.utils.logging.CRITICAL)
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    if not re.fullmatch(r"[^/\\:]+/[^/\\:]+", source.hub):
        raise DataError(f'dataset.hub = "{source.hub}" is not of the form "owner/name"')
    if Path(source.hub).exists():
        raise DataError(f'dataset.hub = "{source.hub}": a local file or folder has this name too; write dataset.path for it, or start elsewhere')
    commit = _resolve_commit(source)
    try:
        builder = datasets.load_dataset_builder(source.hub, source.subset or None, revision=commit)
    except ValueError as error:
        raise _explain(source, commit, error) from None
    except Exception as error:
        raise DataError(f"{_name(source)} cannot be opened: {_describe(error)}") from None
    if builder.hash != commit:  # the Hub did not answer, and `datasets` took the commit that it used last
        raise DataError(f'{source.hub}: the Hub does not answer for commit {commit}; dataset.revision = "{builder.hash}" is in the cache')
    known = list(map(str, builder.config.data_files or builder.info.splits or ()))
    for part in source.split.split("+"):
        if known and part.partition("[")[0].strip() not in (*known, "all"):
            raise DataError(f"{_name(source)} has no split {part.strip()!r}; set dataset.split to one of {', '.join(map(repr, known))}")
    return builder, commit


def _resolve_commit(source: Source) -> str:
    """The commit that a revision names now, or named when the Hub was last asked if it does not answer."""
    from huggingface_hub import HfApi, get_token, hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    revision = source.revision or "main"
    check_token(get_token(), DataError)
    try:
        try:
            return Path(hf_hub_download(source.hub, "README.md", repo_type="dataset", revision=revision)).parent.name
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:  # answered by the Hub: there is a repository, but no such file in it
            return str(HfApi().dataset_info(source.hub, revision=revision).sha)
    except GatedRepoError:
        raise DataError(
            f"{source.hub} is gated: accept its licence on its page on the Hub, then give a token of that account with HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise DataError(f"the Hub has no data set {source.hub!r} that your token may see: check the name, or give a token with HF_TOKEN") from None
    except RevisionNotFoundError:
        raise DataError(f"{source.hub} has no revision {source.revision!r}") from None
    except HFValidationError as error:
        raise DataError(f'dataset.hub = "{source.hub}" is not the name of a data set: {error}') from None
    except OSError as error:
        why = _describe(error.__cause__ or error)
        raise DataError(
            f"{source.hub} is not in the cache and cannot be fetched ({why}): is there a way to the Hub? HF_ENDPOINT names a mirror"
        ) from None


def _explain(source: Source, commit: str, error: ValueError) -> DataError:
    """What is wrong with a data set that cannot be opened: most often its subset."""
    import datasets

    try:
        subsets = datasets.get_dataset_config_names(source.hub, revision=commit)
    except Exception:
        subsets = []
    names = ", ".join(map(repr, subsets))
    if source.subset and subsets and source.subset not in subsets:
        return DataError(f"{source.hub} has no subset {source.subset!r}; set dataset.subset to one of {names}")
    if not source.subset and len(subsets) > 1:
        return DataError(f"{source.hub} has several subsets; set dataset.subset to one of {names}")
    return DataError(f"{_name(source)} cannot be opened: {_describe(error)}")


def _holds_media(feature: Any) -> bool:
    """Whether a column's values have to be decoded as images, sound and the like."""
    if isinstance(feature, dict):
        return any(map(_holds_media, feature.values()))
    if isinstance(feature, list):
        return any(map(_holds_media, feature))
    if hasattr(feature, "feature"):
        return _holds_media(feature.feature)
    return hasattr(feature, "decode_example") and type(feature).__name__ != "Json"
