"""Fetch a model folder from the Hugging Face Hub, just what training needs of it."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

from tunelib.errors import FormatError

NEEDED = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*", "special_tokens_map.json")
NEEDED_TOO = ("added_tokens.json", "vocab.json", "merges.txt", "chat_template*")
# The same weights in Meta's form, which many Llama repositories hold beside the others.
NOT_NEEDED = ("original/*",)


def download_folder(
    repo_id: str,
    output_dir: Path,
    token: str | None = None,
    revision: str | None = None,
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
) -> Path:
    """Fetch a repository's files into a folder, going on where an earlier attempt stopped; the folder's path.

    Args:
        token: of an account that may read the repository; by default HF_TOKEN or the one that was logged in with.
        include: patterns of files to fetch instead of what training needs.
        exclude: patterns of files to leave out.

    Raises:
        FormatError: a gated repository, a wrong name or revision, or no way to the Hub; the text says what to do.
    """
    try:
        path = snapshot_download(
            repo_id,
            revision=revision,
            local_dir=output_dir,
            token=token,
            allow_patterns=list(include or NEEDED + NEEDED_TOO),
            ignore_patterns=list(exclude or NOT_NEEDED),
        )
    except GatedRepoError:
        raise FormatError(
            f"{repo_id} is gated: accept its licence on its page on the Hub, then give a token of that account with --hf_token or HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise FormatError(f"the Hub has no repository {repo_id!r} that this token may see: check the name, or give a token with --hf_token") from None
    except RevisionNotFoundError:
        raise FormatError(f"{repo_id} has no revision {revision!r}") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        what = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise FormatError(f"{repo_id} cannot be fetched ({what}): is there a way to the Hub? HF_ENDPOINT names a mirror") from None
    except ValueError as error:
        raise FormatError(f"{repo_id!r} is not the name of a repository: {error}") from None
    return Path(path)
