"""Fetch a model folder from the Hugging Face Hub, just what training needs of it: one form of the weights, and the tokenizer."""

import contextlib
import glob
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, get_token, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import filter_repo_objects

from tunelib.data.hub import check_token
from tunelib.errors import FormatError
from tunelib.files import lies_inside

COMPANIONS = (
    *("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "chat_template*"),
)
ORIGINAL = "original"  # where many Llama repositories hold the same weights once more, in Meta's form
# The forms of weights, best first: the folder, the files of weights, and what lies beside them.
FORMS = (
    ("", "*.safetensors", "*.safetensors.index.json"),
    ("", "pytorch_model*.bin", "pytorch_model*.bin.index.json"),
    ("", "consolidated*.pth", "params.json"),
    (ORIGINAL, "consolidated*.pth", "params.json"),
)
# Second copies of the weights in Mistral's repositories and in other types, and what is no model's weights.
NOT_WEIGHTS = ("consolidated*.safetensors*", "model.*.safetensors", "pytorch_model.*.bin", "adapter_*", "optimizer*")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".gguf", ".onnx", ".h5", ".msgpack", ".ot")


def download_folder(
    repo_id: str,
    output_dir: Path,
    token: str | None = None,
    revision: str | None = None,
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
) -> Path:
    """Fetch a repository's files into a folder, but for those that an earlier attempt has left there; the folder that its weights are in.

    Args:
        token: of an account that may read the repository; by default HF_TOKEN or the one that was logged in with.
        include: patterns of files to fetch instead of what training needs.
        exclude: patterns of files to leave out; training then needs what it can use of the others.

    Returns:
        ``output_dir``, or ``output_dir/original`` where the only weights are Meta's, and there.

    Raises:
        FormatError: a gated repository, a wrong name or revision, no weights, or no way to the Hub; the text says what to do.
    """
    check_token(get_token() if token is None else token, FormatError)
    with _saying_what_to_do(repo_id, revision, output_dir):
        info = HfApi(token=token).model_info(repo_id, revision=revision)
    files = [sibling.rfilename for sibling in info.siblings or ()]
    if not include:
        _check_weights(repo_id, files)
    left = list(filter_repo_objects(files, allow_patterns=list(include) or None, ignore_patterns=list(exclude)))
    wanted = left if include else choose_files(left)
    if not wanted:
        raise FormatError(f"--include and --exclude leave nothing of {repo_id}, which has {_first_of(files)}")
    if outside := [name for name in wanted if not lies_inside(name)]:
        raise FormatError(f"{repo_id} has {outside[0]!r}, which would lie outside of {output_dir}; nothing is fetched")
    with _saying_what_to_do(repo_id, revision, output_dir):
        names = [glob.escape(name) for name in wanted]
        path = Path(snapshot_download(repo_id, revision=info.sha, local_dir=output_dir, token=token, allow_patterns=names))
    # Where the Hub falls silent by now, snapshot_download gives back a folder as it is.
    if lacking := [name for name in wanted if not (path / name).is_file()]:
        raise FormatError(f"{path} lacks {_first_of(lacking)} after the download of {repo_id}: start it once more, and it goes on from there")
    return path / _find_weights(wanted)[0]


def choose_files(files: list[str]) -> list[str]:
    """What training needs of a repository's files: one form of the weights, the best there is, and the tokenizer's files."""
    folder, patterns = _find_weights(files)
    companions = [name for name in files if "/" not in name and _matches(name, COMPANIONS)]
    weights = [name for name in files if _is_in(name, folder) and _matches(name, patterns) and not _matches(name, NOT_WEIGHTS)]
    return companions + weights + [name for name in files if name == f"{ORIGINAL}/tokenizer.model"]


def _find_weights(files: list[str]) -> tuple[str, tuple[str, ...]]:
    """The folder of the best form of weights among files, and the patterns of its files; no patterns where there are none."""
    for folder, weights, beside in FORMS:
        if any(_is_in(name, folder) and _matches(name, (weights,)) and not _matches(name, NOT_WEIGHTS) for name in files):
            return folder, (weights, beside)
    return "", ()


def _check_weights(repo_id: str, files: list[str]) -> None:
    if not _find_weights(files)[1]:
        others = [name for name in files if name.endswith(WEIGHT_SUFFIXES)]
        raise FormatError(
            f"{repo_id} has no weights that training can start from: neither *.safetensors nor pytorch_model*.bin nor consolidated*.pth"
            + (f"; it has {_first_of(others)}" if others else "")
            + ". --include names files to fetch all the same"
        )


def _is_in(name: str, folder: str) -> bool:
    return name.rpartition("/")[0] == folder


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(PurePosixPath(name).name, pattern) for pattern in patterns)


def _first_of(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


@contextlib.contextmanager
def _saying_what_to_do(repo_id: str, revision: str | None, output_dir: Path) -> Iterator[None]:
    """Turn what the Hub's client raises into a FormatError."""
    try:
        yield
    except GatedRepoError:
        raise FormatError(
            f"{repo_id} is gated: accept its licence on its page on the Hub, then give a token of that account with --hf_token or HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise FormatError(f"the Hub has no repository {repo_id!r} that this token may see: check the name, or give a token with --hf_token") from None
    except RevisionNotFoundError:
        raise FormatError(f"{repo_id} has no revision {revision!r}: give a branch, a tag or a commit of it") from None
    except HFValidationError as error:
        raise FormatError(f"{repo_id!r} is not the name of a repository: {error}") from None
    except Exception as error:  # httpx's own errors too, whose package differs between versions of huggingface_hub
        what = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            advice = "check the token in --hf_token or HF_TOKEN, and what it may read"
        elif isinstance(error, OSError) and error.errno is not None:
            advice = f"can {output_dir} be written to?"
        else:
            advice = "is there a way to the Hub? HF_ENDPOINT names a mirror"
        raise FormatError(f"{repo_id} cannot be fetched ({what}): {advice}") from None
