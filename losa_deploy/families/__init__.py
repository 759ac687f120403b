"""Model families, one file each; `find_family` maps a `config.json` to one of them."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Mapping

from losa_deploy.errors import InputError
from losa_deploy.families.base import Family

__all__ = ["Family", "all_families", "find_family"]


def all_families() -> tuple[Family, ...]:
    """Every family shipped, sorted by name; a new file in this folder is found by itself."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != "base")
    modules = (importlib.import_module(f"{__name__}.{name}") for name in names)
    return tuple(module.FAMILY for module in modules)


def find_family(config: Mapping[str, object]) -> Family:
    """The family of a parsed `config.json`; raises `InputError` naming near matches."""
    model_type = str(config.get("model_type", ""))
    known = {kind: family for family in all_families() for kind in family.model_types}
    if model_type in known:
        return known[model_type]
    near = difflib.get_close_matches(model_type, known, n=3, cutoff=0.4)
    raise InputError(
        f"The architecture {model_type or '(none)'!r} in config.json is not supported; "
        f"known: {', '.join(sorted(known))}.",
        hint=f"Nearest: {', '.join(near)}." if near else "See `losa-deploy formats`.",
    )
