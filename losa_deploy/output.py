"""Outputs that appear whole or not at all: `<out>.partial`, renamed at the end; disk checks."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from losa_deploy.errors import GateError, ResourceError, UsageError

PARTIAL = ".partial"
FAILED = ".failed"
REPLACED = ".replaced"
_OURS = "losa.json"


def sibling(output: Path, suffix: str) -> Path:
    """`<output><suffix>` beside the output, e.g. `build/demo.partial`."""
    return output.parent / (output.name + suffix)


def check_output(output: Path, *, overwrite: bool) -> None:
    """Raise `UsageError` if `output` may not be written; called before any work."""
    if not output.exists() and not output.is_symlink():
        return
    if not output.is_dir():
        raise UsageError(
            f"{output} exists and is a file, expected a folder.", hint="Choose another --output."
        )
    if not overwrite:
        raise UsageError(
            f"{output} already exists.", hint="Add --overwrite to replace it, or choose another --output."
        )
    if any(output.iterdir()) and not (output / _OURS).is_file():
        raise UsageError(
            f"{output} holds files but no {_OURS}, so losa-deploy did not write it and will not delete it.",
            hint="Choose another --output, or remove the folder yourself.",
        )


@contextmanager
def staged_output(output: Path, *, overwrite: bool) -> Iterator[Path]:
    """An empty folder to write into; it becomes `output` when the block ends without an error.

    A `GateError` keeps it as `<output>.failed`; any other error, and Ctrl-C, removes it. What was
    at `output` before is deleted only after the new folder is complete. A full disk is a
    `ResourceError`.
    """
    output = output.absolute()
    check_output(output, overwrite=overwrite)
    partial = sibling(output, PARTIAL)
    remove(partial)
    try:
        partial.mkdir(parents=True)
        yield partial
        _publish(partial, output)
    except GateError as error:
        failed = sibling(output, FAILED)
        remove(failed)
        partial.rename(failed)
        error.details["kept"] = str(failed)
        raise
    except BaseException as error:
        remove(partial)
        shortage = shortage_error(error)
        if shortage is not None:
            raise shortage from error
        raise


def remove(path: Path) -> None:
    """Delete a folder or file if it is there; a link is unlinked, never followed."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def _publish(partial: Path, output: Path) -> None:
    if not output.exists():
        partial.rename(output)
        return
    old = sibling(output, REPLACED)
    remove(old)
    output.rename(old)
    try:
        partial.rename(output)
    except BaseException:
        old.rename(output)
        raise
    remove(old)


def free_bytes(path: Path) -> int:
    """Free bytes of the disk that holds `path`, which need not exist yet."""
    folder = path.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def require_disk(path: Path, needed: int, purpose: str) -> None:
    """Raise `ResourceError` if the disk of `path` has fewer than `needed` bytes free."""
    free = free_bytes(path)
    if free < needed:
        raise ResourceError(
            f"{purpose} needs {needed / 1e6:,.0f} MB on the disk of {path}, {free / 1e6:,.0f} MB are free.",
            hint="Free some space, or choose an --output on another disk.",
            details={"needed_bytes": needed, "free_bytes": free},
        )


def shortage_error(error: BaseException) -> ResourceError | None:
    """A `ResourceError` if `error` means a full disk or no memory, in whatever type a library raised it."""
    if isinstance(error, ResourceError):
        return None
    full = {errno.ENOSPC, errno.EDQUOT}
    text = str(error)
    if (isinstance(error, OSError) and error.errno in full) or "No space left on device" in text:
        return ResourceError(
            f"The disk is full: {text or 'no space left on device'}.",
            hint="Free some space and run the same command again; finished stages are kept.",
        )
    if isinstance(error, MemoryError) or "can't allocate memory" in text or "bad allocation" in text:
        return ResourceError(
            f"Not enough memory: {text or type(error).__name__}.",
            hint="Close other programs, or lower --samples or --sequence-length.",
        )
    return None
