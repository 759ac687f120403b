"""`--for-this-machine` and `--kernels`: the pattern of a recipe by what runs fastest on some kernels."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from losa_deploy.cli.options import make_recipe, recipe_overrides
from losa_deploy.console import Console
from losa_deploy.errors import MissingError, UsageError

if TYPE_CHECKING:
    from losa_deploy.recipe import Recipe

PATTERN = "sparsity.pattern"


def add_machine(parser: argparse.ArgumentParser) -> None:
    """The kernels that choose the pattern, instead of `--pattern`."""
    group = parser.add_argument_group("pattern by machine").add_mutually_exclusive_group()
    group.add_argument(
        "--for-this-machine",
        action="store_true",
        help="prune in a pattern that is fast on this CPU and loses least, instead of --pattern",
    )
    group.add_argument(
        "--kernels",
        metavar="NAME",
        help="the same for other CPUs: avx2, avxvnni, avx512f, avx512 (VBMI2 and VNNI) or neon",
    )


def recipe_for_machine(args: argparse.Namespace, console: Console) -> Recipe:
    """The effective recipe of a command line, with the pattern for its kernels if it names some.

    Raises `UsageError` if a pattern is given too, and if none that runs fast is near the sparsity.
    """
    recipe, kernels = make_recipe(args), _kernels(args)
    if not kernels:
        return recipe
    from losa_deploy.recipe import is_given, load_recipe
    from losa_deploy.targets import NO_PATTERN, fastest

    flag = "--kernels" if args.kernels else "--for-this-machine"
    overrides = recipe_overrides(args)
    if is_given(PATTERN, args.recipe, overrides):
        raise UsageError(
            f"{flag} chooses the pattern, but {PATTERN} is given too ({recipe.sparsity.pattern}).",
            hint=f"Leave out --pattern or {flag}.",
        )
    export = recipe.export
    pick = fastest(kernels, export.value_type, export.group_size, recipe.sparsity.target, args.bits)
    console.info(f"Pattern for {pick.target}: {pick.pattern}; {pick.reason}")
    if pick.pattern == NO_PATTERN:
        return recipe
    return load_recipe(preset=args.preset, path=args.recipe, overrides=[*overrides, (PATTERN, pick.pattern)])


def _kernels(args: argparse.Namespace) -> str:
    """The target that is named, or that this machine takes; empty if neither is asked for."""
    if not args.for_this_machine:
        return str(args.kernels or "")
    from losa_deploy import _native

    name = _native.target_name()
    if name == "none":
        raise MissingError(
            f"There are no such kernels here: {_native.target_reason()}.",
            hint=f"Set LOSA_KERNELS to one of {', '.join(_native.targets())}, or unset it.",
        )
    return name
