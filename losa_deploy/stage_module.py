"""Modules that are called like the stage they are named after.

`losa_deploy.compress` is a folder of modules and, for programs, a stage. Python makes a submodule an
attribute of its package as soon as it is imported, so the module itself has to answer the call.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType


class StageModule(ModuleType):
    """A module that passes calls on to the function of `losa_deploy.pipeline` with its name."""

    def __call__(self, *arguments: object, **named: object) -> object:
        name = self.__name__.rpartition(".")[2]
        return getattr(import_module("losa_deploy.pipeline"), name)(*arguments, **named)


def call_as_stage(name: str) -> None:
    """Let the module `name`, which is being imported, be called."""
    sys.modules[name].__class__ = StageModule
