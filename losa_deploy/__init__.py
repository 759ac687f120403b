"""losa-deploy: sparse causal language models that pay on ordinary CPUs.

The names below are loaded when they are first used; `docs/python.md` shows them at work.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from losa_deploy.pipeline import (
        compress,
        evaluate,
        export,
        generate,
        load_source,
        measure,
        merge,
        open_session,
        verify,
    )
    from losa_deploy.recipe import Recipe, load_recipe

__version__ = "0.1.0"
__all__ = [
    "Recipe",
    "compress",
    "evaluate",
    "export",
    "generate",
    "load_recipe",
    "load_source",
    "measure",
    "merge",
    "open_session",
    "verify",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "losa_deploy.recipe" if name in ("Recipe", "load_recipe") else "losa_deploy.pipeline"
    return getattr(import_module(home), name)
