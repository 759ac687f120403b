"""lm-eval's view of our sessions: its tasks ask, a `Session` of any runtime answers.

The only module that imports lm-eval; it is imported when tasks are run, never before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets
import lm_eval.tasks
import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.tasks._yaml_loader import load_yaml

from losa_deploy.errors import InputError
from losa_deploy.interfaces import Session
from losa_deploy.progress import Progress
from losa_deploy.text.tokenizer import Tokenizer
from losa_deploy.verify.distance import Logits, log_softmax

DESCRIPTIONS: Mapping[str, str] = {
    "piqa": "piqa/piqa.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "rte": "glue/rte/default.yaml",
}
"""Task → its description in the package; searching all fourteen thousand takes seconds."""

Request = tuple[tuple[str, str], list[int], list[int]]
"""Context and continuation as texts, then as tokens."""


class SessionModel(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """Log-likelihoods of continuations; how text becomes tokens is lm-eval's own rule."""

    def __init__(self, session: Session, tokenizer: Tokenizer, progress: Progress) -> None:
        super().__init__()
        self._session = session
        self._tokens = tokenizer
        self._progress = progress
        self._last: tuple[list[int], Logits] | None = None
        self.truncated = 0
        """Requests whose context lost its beginning because the model's context is shorter."""

    @property
    def eot_token_id(self) -> int:
        """The token between documents."""
        found = self._tokens.separator_id
        if found is None:
            raise InputError("The tokenizer has neither an end nor a start token, expected one of them.")
        return found

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is replaced with: the BOS if there is one."""
        return self.eot_token_id if self._tokens.bos_id is None else self._tokens.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Tokens with what the tokenizer puts around a text, unless the text starts with its BOS already."""
        if add_special_tokens is None:
            bos = self._tokens.bos_id
            start = "" if bos is None else self._tokens.decode([bos], special=True)
            add_special_tokens = not (start and string.startswith(start))
        return self._tokens.encode(string, special=add_special_tokens)

    def loglikelihood(self, requests: Sequence[object], **_: object) -> list[tuple[float, bool]]:
        """Sum of log p over the continuation, in nats, and whether it is the greedy one; per request."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(self, requests: Sequence[Request], **_: object) -> list[tuple[float, bool]]:
        """The longest first, so that memory runs out at once if it does; equal inputs are run once."""
        order = sorted(range(len(requests)), key=lambda i: _longest_first(requests[i]))
        found: dict[int, tuple[float, bool]] = {}
        for done, index in enumerate(order):
            self._progress(done, len(order), f"{len(requests[index][1])} tokens of context")
            found[index] = self._score(*requests[index])
        self._progress(len(order), len(order), "done")
        self._last = None
        return [found[i] for i in range(len(requests))]

    def _score(
        self, texts: tuple[str, str], context: list[int], continuation: list[int]
    ) -> tuple[float, bool]:
        room = self._session.context_length
        if not continuation or (room and len(continuation) > room):
            raise InputError(
                f"The answer {texts[1][:40]!r} has {len(continuation)} tokens, expected at least one "
                f"and no more than the context of the model holds ({room}).",
                hint="Check the rows, or use a model with a longer context.",
            )
        whole = context + continuation
        if room and len(whole) > room + 1:
            self.truncated += 1
            whole = whole[-(room + 1) :]
        logits = self._logits(whole[:-1])[-len(continuation) :]
        logs = log_softmax(logits)
        likelihood = float(logs[np.arange(len(continuation)), continuation].sum())
        return likelihood, bool((logits.argmax(-1) == continuation).all())

    def _logits(self, tokens: list[int]) -> Logits:
        """Of the last input again without running it: answers of one token share theirs."""
        if self._last is None or self._last[0] != tokens:
            self._last = None  # the old logits go before the new ones come
            self._last = tokens, self._session.logits(tokens)
        return self._last[1]

    def loglikelihood_rolling(self, requests: Sequence[object], **_: object) -> list[float]:
        """Not asked for by any of our tasks."""
        raise NotImplementedError("perplexity is measured by losa_deploy.benchmarks.literature")

    def generate_until(self, requests: Sequence[object], **_: object) -> list[str]:
        """Not asked for by any of our tasks."""
        raise NotImplementedError("our tasks compare the likelihoods of given answers")


def evaluate_tasks(
    model: SessionModel, rows: Mapping[str, list[dict[str, object]]]
) -> Mapping[str, Mapping[str, object]]:
    """lm-eval's results of every task on its rows, without examples in the prompt: task → metric → number."""
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        tasks = {name: make_task(name, found) for name, found in rows.items()}
        document = evaluate(lm=model, task_dict={"tasks": tasks}, log_samples=False)
    finally:
        if bars:
            datasets.enable_progress_bars()
    results: Mapping[str, Mapping[str, object]] = document["results"]
    return results


def make_task(name: str, rows: list[dict[str, object]]) -> ConfigurableTask:
    """lm-eval's own description of a task, with our rows in place of the download."""
    config = load_yaml(Path(lm_eval.tasks.__file__).parent / DESCRIPTIONS[name])
    for key in ("dataset_path", "dataset_name", "training_split", "test_split", "fewshot_split"):
        config.pop(key, None)
    data = datasets.DatasetDict({"validation": datasets.Dataset.from_list(rows)})
    config.update(custom_dataset=lambda **_: data, validation_split="validation", num_fewshot=0)
    return ConfigurableTask(config=config)


def _longest_first(request: Request) -> tuple[int, list[int]]:
    tokens = request[1] + request[2]
    return -len(tokens), tokens
