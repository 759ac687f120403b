"""Flags that are no recipe keys, with one name and one meaning in all commands."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    """Flags every command has: how it talks."""
    group = parser.add_argument_group("messages")
    group.add_argument("--json", action="store_true", help="result and errors as one JSON document")
    group.add_argument("--quiet", action="store_true", help="no progress; warnings and errors only")
    group.add_argument("--verbose", action="store_true", help="more detail, and what libraries print")
    group.add_argument("--no-color", action="store_true", help="no colour (also: NO_COLOR)")


def add_model(parser: argparse.ArgumentParser) -> None:
    """The dense source model and where it may come from."""
    parser.add_argument(
        "-m",
        "--model",
        metavar="MODEL",
        help="model folder, .gguf file, or hub id[@revision]; without it, the embedded SmolLM2-135M",
    )
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    parser.add_argument("--offline", action="store_true", help="never use the network (also: HF_HUB_OFFLINE)")
    parser.add_argument("--cache-dir", type=Path, metavar="DIR", help="hub cache, instead of Hugging Face's")


def add_output(parser: argparse.ArgumentParser, default: str) -> None:
    """The output folder and whether it may be replaced."""
    parser.add_argument(
        "-o", "--output", type=Path, metavar="DIR", help=f"output folder (default: {default})"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an output of losa-deploy")


def add_format(parser: argparse.ArgumentParser) -> None:
    """The artifact format; see `losa-deploy formats`."""
    parser.add_argument(
        "-f", "--format", required=True, metavar="FORMAT", help="artifact format (see `losa-deploy formats`)"
    )


def add_threads(parser: argparse.ArgumentParser) -> None:
    """Number of threads; 0 = one per physical core."""
    parser.add_argument(
        "--threads", type=positive, default=0, metavar="N", help="threads (default: one per physical core)"
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Where a compression computes."""
    parser.add_argument(
        "--device",
        default="cpu",
        metavar="DEVICE",
        help="compress on auto, cpu (default), cuda, cuda:<n> or mps; all else runs on the CPU",
    )


def add_memory(parser: argparse.ArgumentParser) -> None:
    """How much memory a compression may take."""
    parser.add_argument(
        "--memory",
        type=byte_count,
        metavar="SIZE",
        help="memory of the device to stay within, e.g. 8G: larger models are read block by block "
        "(default: what is free)",
    )


def byte_count(text: str) -> int:
    """Bytes of `8G`, `500M` or a plain number, for argparse; units are powers of 1,000."""
    units = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
    number, unit = (text[:-1], units[text[-1].upper()]) if text[-1:].upper() in units else (text, 1)
    try:
        found = int(float(number) * unit)
    except (ValueError, OverflowError):
        found = 0
    if found < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; expected one like 8G or 500M")
    return found


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def thread_count(args: argparse.Namespace) -> int:
    """`--threads`, or the number of physical cores this process may use."""
    if args.threads:
        return int(args.threads)
    from losa_deploy.pipeline import physical_cores

    return physical_cores()


def is_offline(args: argparse.Namespace) -> bool:
    """True under `--offline` or a true `HF_HUB_OFFLINE`."""
    return bool(args.offline) or os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
