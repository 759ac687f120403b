"""Models from the Hugging Face hub: from its cache first, over the network only if allowed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from losa_deploy.errors import InputError, LosaError, OfflineError, UsageError
from losa_deploy.families import find_family
from losa_deploy.progress import Progress
from losa_deploy.sources.checkpoint import SIDE_FILES, Checkpoint

PATTERNS = (
    *SIDE_FILES,
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "README.md",
)
"""The only files that are downloaded."""


def split_revision(model: str, revision: str | None) -> tuple[str, str | None]:
    """`id@revision` → (id, revision); `UsageError` if `--revision` says something else."""
    name, at, tail = model.partition("@")
    if at and revision and tail != revision:
        raise UsageError(
            f"--model {model} and --revision {revision} name two revisions.", hint="Give only one of them."
        )
    return name, tail or revision


def fetch_snapshot(
    name: str, revision: str | None, *, offline: bool, cache_dir: Path | None, progress: Progress
) -> Path:
    """Folder of the hub model `name`; its architecture is checked before any weights are fetched.

    Raises `OfflineError` if a file is neither cached nor to be had, `InputError` for an unknown,
    gated or unsupported model.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    def config(local: bool) -> Path:
        return Path(
            hf_hub_download(
                name, "config.json", revision=revision, cache_dir=cache_dir, local_files_only=local
            )
        )

    def snapshot(local: bool) -> Path:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                cache_dir=cache_dir,
                allow_patterns=list(PATTERNS),
                local_files_only=local,
            )
        )

    progress(0, 2, f"looking up {name}")
    path = _cached_or_fetched(config, _readable, name, offline)
    find_family(json.loads(path.read_text("utf-8")))
    progress(1, 2, f"weights of {name}")
    folder = _cached_or_fetched(snapshot, _complete, name, offline)
    progress(2, 2, name)
    return folder


def _readable(path: Path) -> None:
    try:
        json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}.", hint="Download the model again.") from None


def _complete(folder: Path) -> None:
    Checkpoint.open(folder)


def _cached_or_fetched(
    get: Callable[[bool], Path], check: Callable[[Path], None], name: str, offline: bool
) -> Path:
    """`get(True)` from the cache if that passes `check`, else `get(False)` from the network."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    missing = f"{name} is not in the hub cache"
    try:
        with _no_connections():
            path = get(True)
        check(path)
        return path
    except LocalEntryNotFoundError:
        pass
    except InputError as error:
        missing = f"{name} is not complete in the hub cache ({error.message.rstrip('.')})"
    except Exception as error:
        raise _hub_error(error, name) from error
    if offline:
        raise OfflineError(f"{missing}, and the network is not to be used.", hint=_way_out(name))
    try:
        path = get(False)
    except Exception as error:
        raise _hub_error(error, name) from error
    check(path)
    return path


@contextmanager
def _no_connections() -> Iterator[None]:
    """`local_files_only` alone does not keep the hub library from asking the network for other things."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _hub_error(error: Exception, name: str) -> LosaError:
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return InputError(
            f"{name} is gated: its owner has to grant access.",
            hint="Ask for access on its page, then set HF_TOKEN or run `hf auth login`.",
        )
    if isinstance(error, RepositoryNotFoundError | HFValidationError):
        return InputError(
            f"The hub has no model {name!r} (or it is private).",
            hint="Check the name, or give --model a local folder; for a private model set HF_TOKEN.",
        )
    if isinstance(error, RevisionNotFoundError):
        return InputError(f"{name} has no such revision: {error}.", hint="Leave --revision out for `main`.")
    if isinstance(error, LocalEntryNotFoundError | OSError):
        return OfflineError(f"{name} cannot be downloaded: {_first_line(error)}.", hint=_way_out(name))
    return InputError(f"{name} cannot be loaded: {_first_line(error)}.", hint="Check the name.")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _way_out(name: str) -> str:
    return (
        f"On a machine with network run `hf download {name}` and copy the folder, "
        "or give --model a local folder or .gguf file."
    )
