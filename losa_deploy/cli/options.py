"""The flags: one table of recipe options for all commands, and the flags that are no recipe keys.

Every row of `RECIPE_OPTIONS` sets exactly one key of the recipe; those of `phases` are shorthand that is
laid over every phase (see `losa_deploy.phases`). Nothing here imports the recipe
itself, so that help pages stay fast; a test holds the table against it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from losa_deploy.console import Console
from losa_deploy.errors import UsageError

if TYPE_CHECKING:
    from losa_deploy.recipe import Recipe

COMPRESS = (
    "seed",
    "sparsity",
    "calibration",
    "allocation",
    "prune",
    "schedule",
    "rank",
    "phases",
    "precision",
)
MERGE = ("merge",)
EXPORT = ("export", "verify")


@dataclass(frozen=True)
class RecipeOption:
    """One flag for one dotted recipe key; `choices` are the values the recipe allows."""

    flag: str
    key: str
    kind: Literal["number", "text", "switch", "list"]
    help: str
    choices: tuple[str, ...] = ()

    @property
    def section(self) -> str:
        """First part of the key: decides which commands take the flag."""
        return self.key.split(".")[0]

    @property
    def target(self) -> str:
        """The key that is set: the shorthand `adapt` for phases."""
        return self.key.replace("phases.", "adapt.", 1)

    @property
    def dest(self) -> str:
        """Attribute of the parsed arguments."""
        return f"recipe:{self.key}"


def _choice(flag: str, key: str, choices: str, text: str) -> RecipeOption:
    return RecipeOption(flag, key, "text", text, tuple(choices.split("|")))


RECIPE_OPTIONS: tuple[RecipeOption, ...] = (
    RecipeOption("--sparsity", "sparsity.target", "number", "fraction of zeros, e.g. 0.5"),
    RecipeOption(
        "--pattern",
        "sparsity.pattern",
        "text",
        "`unstructured`; `pair`: neighbouring rows share a mask; N:M = N kept of every M, 2:4 and N:16 run "
        "fastest; `sliding`: windows of 4 that move on by 2; `sliding:2.5`: by 2.5",
    ),
    RecipeOption("--mixed", "sparsity.mixed", "switch", "N:M: more important blocks keep more than N of M"),
    _choice("--scope", "sparsity.scope", "row|columns", "what gets an equal count in unstructured pruning"),
    RecipeOption(
        "--exclude", "sparsity.exclude", "list", "linears to leave dense, e.g. '*.v_proj'; repeatable"
    ),
    RecipeOption(
        "--calibration", "calibration.source", "text", "`self` (sampled from the model), a file or a folder"
    ),
    RecipeOption("--samples", "calibration.samples", "number", "calibration sequences"),
    RecipeOption("--sequence-length", "calibration.sequence_length", "number", "tokens per sequence"),
    RecipeOption(
        "--calibration-temperature", "calibration.temperature", "number", "sampling temperature of `self`"
    ),
    RecipeOption("--seed", "seed", "number", "seed of everything random"),
    _choice("--allocation", "allocation.method", "rmi|slope|uniform", "how blocks share the sparsity"),
    _choice("--prune-method", "prune.method", "magnitude|wanda|sparsegpt", "how masks are chosen"),
    RecipeOption("--regrow", "prune.regrow", "switch", "let a later step bring a pruned weight back"),
    RecipeOption("--steps", "schedule.steps", "number", "alternations of pruning and adaptation"),
    _choice("--ramp", "schedule.ramp", "cubic|none", "how sparsity grows over the steps"),
    _choice("--rank-method", "rank.method", "error|uniform", "how blocks share the adapter rank"),
    RecipeOption("--rank-start", "rank.start", "number", "mean adapter rank in the first step"),
    RecipeOption("--rank-end", "rank.end", "number", "mean adapter rank in the last step"),
    RecipeOption("--rank-scale", "rank.scale", "number", "s of the adapters in W + s·(B·A)∘M"),
    _choice("--adapt", "phases.mode", "adapters|reconstruct|direct|none", "one plain phase of this kind"),
    _choice("--loss", "phases.loss", "ce|kd", "of phases through the model: cross-entropy or distillation"),
    RecipeOption("--learning-rate", "phases.learning_rate", "number", "step size of all phases"),
    RecipeOption("--adapt-steps", "phases.steps", "number", "optimizer steps of all phases"),
    RecipeOption("--batch-size", "phases.batch_size", "number", "sequences per optimizer step of all phases"),
    _choice("--precision", "precision", "auto|f32|bf16", "products while training; auto: what the CPU has"),
    _choice("--dtype", "merge.dtype", "source|f32|f16|bf16", "dtype of the merged weights"),
    _choice(
        "--layout",
        "export.layout",
        "auto|dense|bitmask|nm|tiled|sliding",
        "storage of the weights; auto says why",
    ),
    _choice("--value-type", "export.value_type", "f32|f16|i8|i4|i3", "storage of the kept values"),
    RecipeOption("--group-size", "export.group_size", "number", "i4 positions per scale: 32, 64 or 128"),
    _choice("--head", "export.head", "same|f32|f16|i8|i4", "value type of embedding and head"),
    RecipeOption("--portable", "export.portable", "switch", "dense weights and standard operators only"),
    RecipeOption(
        "--packed", "export.packed", "switch", "gguf: a small file for our backend; with --portable both"
    ),
    RecipeOption(
        "--bundle-runtime", "export.bundle_runtime", "switch", "put the native operators beside the model"
    ),
    _choice("--verify", "verify.level", "off|quick|full", "check of the exported model"),
    RecipeOption("--text", "verify.text", "text", "text for the perplexities: `builtin` or a file"),
    RecipeOption("--window", "verify.window", "number", "tokens per perplexity window"),
    RecipeOption("--text-tokens", "verify.max_tokens", "number", "tokens of the text that are used"),
    RecipeOption(
        "--verify-minutes",
        "verify.minutes",
        "number",
        "shorten the text so that all perplexities take so long",
    ),
    _choice(
        "--rival", "verify.rival", "q4_0|none", "llama.cpp file of the dense model to measure beside ours"
    ),
)

BITS_HELP = "bits per weight of the pruned linears, e.g. 2.75, instead of --sparsity"


def number(text: str) -> int | float:
    """A whole number if the text is one, so that messages repeat it as typed."""
    try:
        return int(text)
    except ValueError:
        return float(text)


def add_recipe_options(parser: argparse.ArgumentParser, sections: Iterable[str]) -> None:
    """Add `--preset`, `--recipe`, `--set`, `--print-recipe` and the flags of these recipe sections."""
    group = parser.add_argument_group("recipe")
    group.add_argument(
        "--preset", metavar="NAME", help="quick (default), standard, max or faithful (the paper)"
    )
    group.add_argument("--recipe", type=Path, metavar="FILE", help="YAML file over the preset")
    group.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any recipe key; repeatable"
    )
    group.add_argument("--print-recipe", action="store_true", help="print the effective recipe and stop")
    wanted = set(sections)
    for option in RECIPE_OPTIONS:
        if option.section in wanted:
            _add(group, option)
        if option.key == "sparsity.target" and option.section in wanted:
            group.add_argument("--bits", type=number, metavar="N", help=BITS_HELP)


def _add(group: argparse._ArgumentGroup, option: RecipeOption) -> None:
    text = f"{option.help} [{option.key}]"
    if option.kind == "switch":
        group.add_argument(
            option.flag, dest=option.dest, action=argparse.BooleanOptionalAction, default=None, help=text
        )
        return
    metavar = "|".join(option.choices) or {"number": "N", "list": "PATTERN"}.get(option.kind, "TEXT")
    group.add_argument(
        option.flag,
        dest=option.dest,
        type=number if option.kind == "number" else str,
        choices=option.choices or None,
        action="append" if option.kind == "list" else "store",
        metavar=metavar,
        help=text,
    )


def recipe_overrides(args: argparse.Namespace) -> list[tuple[str, object]]:
    """(key, value) of every recipe flag given, then of every `--set`."""
    given = vars(args)
    overrides: list[tuple[str, object]] = [
        (option.target, given[option.dest]) for option in RECIPE_OPTIONS if given.get(option.dest) is not None
    ]
    return overrides + [_assignment(text) for text in given["set"]]


def _assignment(text: str) -> tuple[str, object]:
    import yaml

    from losa_deploy.recipe import parse_yaml

    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError(f"--set {text!r} is not KEY=VALUE.", hint="Example: --set sparsity.target=0.6")
    try:
        return key, parse_yaml(value)
    except yaml.YAMLError:
        return key, value


def make_recipe(args: argparse.Namespace) -> Recipe:
    """The effective recipe of a command line: preset ← --recipe ← flags ← --set."""
    from losa_deploy.recipe import load_recipe

    overrides = recipe_overrides(args)
    recipe = load_recipe(preset=args.preset, path=args.recipe, overrides=overrides)
    bits = getattr(args, "bits", None)
    if bits is None:
        return recipe
    if any(key == "sparsity.target" for key, _ in overrides):
        raise UsageError("--sparsity and --bits both say how much to prune.", hint="Leave one of them out.")
    from losa_deploy.structure import sparsity_for_bits

    export = recipe.export
    target = sparsity_for_bits(recipe.sparsity.structure, bits, export.value_type, export.group_size)
    overrides.append(("sparsity.target", target))
    return load_recipe(preset=args.preset, path=args.recipe, overrides=overrides)


def revise_recipe(recipe: Recipe, args: argparse.Namespace) -> Recipe:
    """`recipe` (of an earlier stage) with what this command line says about it on top."""
    from losa_deploy.recipe import load_recipe

    stored = list(_leaves(recipe.model_dump(mode="json")))
    if args.recipe or args.preset:
        later = make_recipe(args).model_dump(mode="json")
        stored += [(key, value) for key, value in _leaves(later) if key.split(".")[0] in (*MERGE, *EXPORT)]
    return load_recipe(
        preset=recipe.preset, overrides=[kv for kv in stored if kv[0] != "preset"] + recipe_overrides(args)
    )


def _leaves(tree: dict[str, object], prefix: str = "") -> Iterable[tuple[str, object]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def printed_recipe(args: argparse.Namespace, recipe: Recipe, console: Console) -> bool:
    """Print the recipe if `--print-recipe` asks for it; True if it did, and the command is done."""
    if not args.print_recipe:
        return False
    if args.json:
        console.result_json(recipe.model_dump(mode="json"))
    else:
        console.result(recipe.to_yaml().rstrip())
    return True
