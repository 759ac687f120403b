"""Real models side by side: quality of each on the same windows, and what comes of it as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median, pstdev

from losa_deploy.errors import LosaError
from losa_deploy.interfaces import Session
from losa_deploy.progress import Progress, no_progress
from losa_deploy.recipe import VerifyRecipe
from losa_deploy.text.tokenizer import Tokenizer
from losa_deploy.verify.questions import evaluation_text

from .accuracy import summarize, text_windows, window_losses
from .contest_verdict import Entry
from .svg import Point, scatter, stack
from .synthetic.peers import Contender

Record = Mapping[str, object]
OWN, OURS = "this model", "our kernels"
GROUPS: Mapping[str, str] = {
    "llamacpp": OURS,
    "ort": OURS,
    "llamacpp-stock": "llama.cpp",
    "ort-stock": "ONNX Runtime",
    "ik": "ik_llama.cpp",
    "openvino": "OpenVINO",
}
"""Runtime → the name that its points have in a picture; others are called as they are."""


def measure_quality(
    contenders: Sequence[Contender],
    tokenizer: Tokenizer,
    threads: int,
    tokens: int | None = None,
    progress: Progress = no_progress,
) -> dict[str, str]:
    """Fill in quality and losses on the text of reports, or its first `tokens` tokens.

    Every contender meets the windows of the first. Returns peer → reason, of those that cannot be opened. A
    peer that opens but gives no logits says why in `quality_missing`. Errors of the user's own are raised.
    """
    verify = VerifyRecipe()
    windows: list[list[int]] = []
    size, most = verify.window, tokens or verify.max_tokens
    missing: dict[str, str] = {}
    for done, contender in enumerate(contenders):
        progress(done, len(contenders), f"perplexity of {contender.name}")
        try:
            session = contender.runtime.open(contender.folder, threads=threads)
        except LosaError as error:
            if contender.own:
                raise
            missing[contender.name] = error.message
            continue
        try:
            if not windows:
                size = min(size, session.context_length or size)
                windows = text_windows(tokenizer, evaluation_text(verify.text), size, most)
            _score(contender, session, windows, size)
        finally:
            session.close()
    progress(len(contenders), len(contenders), "done")
    return missing


def _score(contender: Contender, session: Session, windows: Sequence[Sequence[int]], size: int) -> None:
    try:
        contender.losses = window_losses(session, windows)
    except LosaError as error:
        if contender.own:
            raise
        contender.quality_missing = error.message
    else:
        contender.quality = summarize(contender.losses, size)


def spread(contender: Contender) -> float:
    """Relative standard deviation of the decode speed."""
    return pstdev(contender.decode_rates) / median(contender.decode_rates)


def entries(contenders: Sequence[Contender]) -> list[Entry]:
    """What the verdict looks at: all that have quality and speed."""
    return [
        Entry(
            c.name,
            c.bytes,
            median(c.decode_rates),
            spread(c),
            c.quality.perplexity,
            c.losses,
            c.own,
        )
        for c in contenders
        if c.quality and c.decode_rates
    ]


def short_names(contenders: Sequence[Contender]) -> list[str]:
    """For a picture: of a path the last part, unless two files share it."""
    last = [Path(c.name).name if c.own else c.name for c in contenders]
    return [short if last.count(short) == 1 else c.name for short, c in zip(last, contenders, strict=True)]


def quality_plots(contenders: Sequence[Contender]) -> str:
    """Perplexity (logarithmic) against decode speed and, below, against megabytes; one SVG.

    Error bars are one standard error of the perplexity and one standard deviation of the speed.
    """
    by_speed, by_size = [], []
    for name, c in zip(short_names(contenders), contenders, strict=True):
        if c.quality is None or not c.decode_rates:
            continue
        group = OWN if c.own else GROUPS.get(c.runtime.name, c.runtime.name)
        found, error = c.quality.perplexity, c.quality.stderr
        decode = median(c.decode_rates)
        by_speed.append(Point(decode, found, error, name, group, spread(c) * decode))
        by_size.append(Point(c.bytes / 1e6, found, error, name, group))
    return stack(
        [
            scatter(by_speed, "Quality against speed", "decode, tokens/s", "perplexity", scale="near"),
            scatter(by_size, "Quality against bytes", "MB", "perplexity", scale="log"),
        ]
    )
