"""Exporters and runtimes, found through entry points so that the core imports none of them.

A third party adds a format or a runtime by shipping a class with the methods of
`losa_deploy.interfaces` and one entry point in the group below; nothing here changes.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, cast

from losa_deploy.errors import LosaError, MissingError, UsageError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoints

    from losa_deploy.interfaces import Exporter, Runtime

EXPORTERS = "losa_deploy.exporters"
RUNTIMES = "losa_deploy.runtimes"


def exporters() -> tuple[str, ...]:
    """Names of the installed exporters, sorted; nothing is imported."""
    return _names(EXPORTERS)


def runtimes() -> tuple[str, ...]:
    """Names of the installed runtimes, sorted; nothing is imported."""
    return _names(RUNTIMES)


def load_exporter(name: str) -> Exporter:
    """A new exporter; `UsageError` for an unknown name, `MissingError` if its package is broken."""
    return cast("Exporter", _load(EXPORTERS, name, "format", "--format"))


def load_runtime(name: str) -> Runtime:
    """A new runtime; `UsageError` for an unknown name, `MissingError` if its package is broken."""
    return cast("Runtime", _load(RUNTIMES, name, "runtime", "--runtime"))


def usable_runtimes() -> tuple[Runtime, ...]:
    """The runtimes that open a folder without being named, best first; broken packages are left out."""
    loaded = []
    for name in runtimes():
        try:
            loaded.append(load_runtime(name))
        except MissingError:  # `losa-deploy formats` says why
            continue
    return tuple(sorted((r for r in loaded if r.preference >= 0), key=lambda r: (-r.preference, r.name)))


def usable_exporters() -> tuple[Exporter, ...]:
    """All exporters, by name; broken packages are left out."""
    loaded = []
    for name in exporters():
        try:
            loaded.append(load_exporter(name))
        except MissingError:  # `losa-deploy formats` says why
            continue
    return tuple(loaded)


def weight_suffixes() -> tuple[str, ...]:
    """How the names of weight files of any installed format end."""
    return tuple(dict.fromkeys(suffix for exporter in usable_exporters() for suffix in exporter.suffixes))


def _entry_points(group: str) -> EntryPoints:
    # Imported late: this takes a third of the time of `--help`.
    from importlib import metadata

    return metadata.entry_points(group=group)


def _names(group: str) -> tuple[str, ...]:
    return tuple(sorted({entry.name for entry in _entry_points(group)}))


def _load(group: str, name: str, noun: str, flag: str) -> object:
    found = list(_entry_points(group).select(name=name))
    if not found:
        raise _unknown(name, _names(group), noun, flag)
    entry = found[0]
    try:
        return entry.load()()
    except LosaError:
        raise
    except Exception as error:
        package = entry.dist.name if entry.dist else entry.module
        missing = getattr(error, "name", None) if isinstance(error, ImportError) else None
        cause = f"no module named {missing!r}" if missing else f"{type(error).__name__}: {error}"
        raise MissingError(
            f"The {noun} {name!r} of the package {package!r} cannot be loaded: {cause}.",
            hint=f"Install it again with `pip install --force-reinstall {package}`, or remove the package.",
            details={"package": package, "entry_point": entry.value},
        ) from error


def _unknown(name: str, known: tuple[str, ...], noun: str, flag: str) -> UsageError:
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    hint = f"Did you mean `{flag} {near[0]}`?" if near else "See `losa-deploy formats`."
    listed = ", ".join(known) or "none (the package is not installed)"
    return UsageError(f"There is no {noun} {name!r}; installed: {listed}.", hint=hint)
