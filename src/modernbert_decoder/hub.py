"""Downloading a checkpoint from the Hugging Face Hub into its local cache, with every failure put into words.

Only the files that a model needs are fetched, never pickles. `huggingface_hub` is imported inside the
functions because it takes longer to load than a small model does. This module does not know what the files
mean.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from modernbert_decoder.errors import CheckpointError, UserError

_WANTED = ("config.json", "generation_config.json", "tokenizer*", "*.safetensors", "*.safetensors.index.json")
_IN_SUBFOLDERS = ("*/*",)  # training checkpoints, exports to other formats
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


class DownloadError(UserError):
    """Why the Hub did not yield a checkpoint, and what to do; the caller says what else was tried."""


def download_checkpoint(
    repo_id: str, *, revision: str | None = None, cache_dir: Path | None = None, show_progress: bool = True
) -> Path:
    """Fetch what is not yet in the cache and return the snapshot's folder; offline, the cache alone is asked.

    Args:
        repo_id: "organisation/name" or "name".
        revision: branch, tag or commit; the default branch when None.
        cache_dir: instead of the Hub's usual cache (`HF_HOME`, `HF_HUB_CACHE`).
        show_progress: draw progress bars, if standard error is a terminal.

    Raises:
        DownloadError: nothing could be fetched.
        CheckpointError: the repository holds no safetensors weights.
    """
    from huggingface_hub import snapshot_download

    bars = nullcontext() if show_progress and sys.stderr.isatty() else _without_progress_bars()
    try:
        with bars:
            snapshot = snapshot_download(
                repo_id,
                revision=revision,
                cache_dir=cache_dir,
                allow_patterns=list(_WANTED),
                ignore_patterns=list(_IN_SUBFOLDERS),
            )
    except Exception as error:  # its HTTP client, and so the exceptions' base, changed between releases
        raise DownloadError(_explanation(error, repo_id, revision=revision, cache_dir=cache_dir)) from error
    folder = Path(snapshot)
    if not any(folder.glob("*.safetensors")):
        _refuse_without_safetensors(repo_id, revision=revision)
    return folder


def pickles_refused(place: str, pickles: list[str], model: str) -> CheckpointError:
    """The error for a model that exists only as pickle files, with the way out."""
    return CheckpointError(
        f"{place} holds no safetensors weights, only pickle files ({', '.join(sorted(pickles)[:5])}). "
        "Pickle files are refused because loading one can run any code. If you trust their source, convert "
        "them once:\n"
        '  pip install "modernbert-decoder[torch]"\n'
        '  python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
        f"M.from_pretrained('{model}').save_pretrained('converted', safe_serialization=True); "
        f"T.from_pretrained('{model}').save_pretrained('converted')\"\n"
        "and use the folder `converted`"
    )


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Hide the Hub's bars for the block, unless the user's environment has decided about them."""
    from huggingface_hub import constants
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if constants.HF_HUB_DISABLE_PROGRESS_BARS is not None or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _refuse_without_safetensors(repo_id: str, *, revision: str | None) -> None:
    """Raise the error that fits a snapshot without weights: pickles only, incomplete, or no model at all."""
    from huggingface_hub import HfApi

    place = f"the Hub repository {repo_id}"
    try:
        names = HfApi().list_repo_files(repo_id, revision=revision)
    except Exception as error:
        raise DownloadError(
            f"the local cache holds {repo_id} without its weights, and the Hub cannot be asked for them "
            f"({type(error).__name__}); connect to the network and try again"
        ) from error
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES) and "/" not in name]
    if pickles:
        raise pickles_refused(place, pickles, repo_id)
    raise CheckpointError(f"{place} holds no *.safetensors file, so it is not a model that can be loaded")


def _explanation(error: Exception, repo_id: str, *, revision: str | None, cache_dir: Path | None) -> str:
    """What went wrong and what to do, in the user's terms."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    cache = cache_dir or constants.HF_HUB_CACHE
    if isinstance(error, GatedRepoError):
        page = f"{constants.ENDPOINT}/{repo_id}"
        return f"access is restricted; accept the conditions at {page} and run `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return "no such repository, or a private one; check the spelling, or run `hf auth login`"
    if isinstance(error, RevisionNotFoundError):
        return f"the repository exists but has no revision {revision!r}; check the branch, tag or commit"
    if isinstance(error, LocalEntryNotFoundError):
        if constants.HF_HUB_OFFLINE:
            return (
                f"offline mode is on (HF_HUB_OFFLINE) and the cache {cache} does not hold all of it; "
                "unset the variable and connect to the network, or use a folder"
            )
        return (
            f"the Hub ({constants.ENDPOINT}) cannot be reached and the cache {cache} does not hold all of "
            "it; connect to the network, or use a folder"
        )
    if isinstance(error, HFValidationError):
        return "not a valid Hub id; it should look like organisation/name"
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, HfHubHTTPError):
        return f"the cache {cache} cannot be written ({first_line}); choose another with HF_HOME"
    return f"the download failed ({type(error).__name__}: {first_line}); try again later"
