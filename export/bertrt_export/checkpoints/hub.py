"""Checkpoints from the Hugging Face hub."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from bertrt.errors import CheckpointNotFoundError, DownloadError
from bertrt_export.checkpoints.weights import SAFETENSORS_NAMES, TORCH_NAMES

# Files that describe a checkpoint and its tokenizer; those of them that the hub has.
DESCRIPTION_NAMES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)
_SAFETENSORS = (*SAFETENSORS_NAMES, "model-*-of-*.safetensors")
_TORCH = (*TORCH_NAMES, "pytorch_model-*-of-*.bin")

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


def is_hub_name(source: str) -> bool:
    """Whether a text can be the name of a model on the hub, ``model`` or ``owner/model``."""
    return _HUB_NAME.fullmatch(source) is not None


def download(name: str, revision: str | None) -> tuple[Path, str]:
    """Bring the files that an export needs into huggingface_hub's cache, safetensors if the hub has them.

    Args:
        name: of the model on the hub.
        revision: a branch, tag or commit; ``None`` for the main branch.

    Returns:
        The folder in the cache, and the commit.

    Raises:
        DownloadError: huggingface_hub is not installed, the hub cannot be reached or does not have the model.
        CheckpointNotFoundError: the model has no weights in a format that is read.
    """
    folder = _snapshot(name, revision, (*DESCRIPTION_NAMES, *_SAFETENSORS))
    commit = folder.name
    if not _COMMIT.fullmatch(commit):
        raise DownloadError(
            f"the hub gave {name!r} without a commit ({commit!r}); give a local folder instead"
        )
    if not any((folder / file).is_file() for file in SAFETENSORS_NAMES):
        # By its commit, so that all files are of one revision even if the branch moves meanwhile.
        folder = _snapshot(name, commit, _TORCH)
    if not any((folder / file).is_file() for file in (*SAFETENSORS_NAMES, *TORCH_NAMES)):
        raise CheckpointNotFoundError(
            f"the hub's {name!r} at {commit[:12]} has no weights that BertRT reads "
            f"({', '.join((*SAFETENSORS_NAMES, *TORCH_NAMES))}), or they are not in the cache and there is "
            "no network; choose another model, or give a local folder"
        )
    return folder, commit


def _snapshot(name: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    local = "give the path of a local checkpoint folder instead, or 'demo', which is built in"
    try:
        import huggingface_hub
        from huggingface_hub.errors import (
            GatedRepoError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ImportError as error:
        raise DownloadError(
            f"{name!r} is no local folder, and downloading it needs huggingface_hub, which is not installed "
            f"(pip install 'bertrt[export]'); {local}"
        ) from error
    try:
        with _progress_on_a_terminal_only():
            folder = huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(patterns))
        return Path(folder)
    except GatedRepoError as error:
        raise DownloadError(
            f"the hub gives {name!r} only to users who have accepted its terms; accept them and log in with "
            f"'hf auth login', or {local}"
        ) from error
    except RevisionNotFoundError as error:
        raise DownloadError(
            f"the hub's {name!r} has no revision {revision!r}; give a branch, a tag or a commit of it"
        ) from error
    except RepositoryNotFoundError as error:
        raise DownloadError(
            f"there is no local folder {name!r}, and no such public model on the hub; "
            f"check the name, or {local}"
        ) from error
    except LocalEntryNotFoundError as error:
        raise DownloadError(
            f"there is no local folder {name!r}, and the hub cannot be reached (no network, or "
            f"HF_HUB_OFFLINE is set), nor is the model in its cache; {local}"
        ) from error
    # huggingface_hub lets through what its HTTP client, the disk and its own checks raise.
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise DownloadError(
            f"downloading {name!r} from the hub failed: {reason}; try again, or {local}"
        ) from error


@contextlib.contextmanager
def _progress_on_a_terminal_only() -> Iterator[None]:
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    terminal = sys.stderr is not None and sys.stderr.isatty()
    if terminal or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
