"""Counters of the HTTP layer and the engine in Prometheus' text format.

Written out here: ten counters and three gauges are fewer lines than the client library's setup.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from .engine import Engine

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass
class Metrics:
    """What the HTTP layer counts; changed in the event loop only."""

    requests: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(endpoint, outcome) → requests; outcome is an HTTP status, or `cancelled`."""
    seconds: float = 0.0
    first_token_seconds: float = 0.0
    finished: int = 0
    first_tokens: int = 0

    def text(self, engine: Engine) -> str:
        """The document of /metrics."""
        stats = engine.stats()
        lines = [*_head("losa_requests_total", "counter", "Requests by endpoint and outcome.")]
        lines += [
            f'losa_requests_total{{endpoint="{endpoint}",outcome="{outcome}"}} {count}'
            for (endpoint, outcome), count in sorted(self.requests.items())
        ]
        counters = (
            ("losa_prompt_tokens_total", "Prompt tokens taken in.", stats.prompt_tokens),
            (
                "losa_cached_prompt_tokens_total",
                "Those of them found in a slot's cache.",
                stats.cached_tokens,
            ),
            ("losa_generated_tokens_total", "Tokens generated.", stats.generated_tokens),
            ("losa_drafted_tokens_total", "Tokens drafted from the text.", stats.drafted_tokens),
            ("losa_accepted_tokens_total", "Those of them generated.", stats.accepted_tokens),
            ("losa_request_seconds_sum", "Seconds of answered completion requests.", self.seconds),
            ("losa_request_seconds_count", "Answered completion requests.", self.finished),
            ("losa_first_token_seconds_sum", "Seconds until the first text.", self.first_token_seconds),
            ("losa_first_token_seconds_count", "Requests that got a first text.", self.first_tokens),
        )
        gauges = (
            ("losa_slots", "Requests that can run at once.", engine.slots),
            ("losa_active_requests", "Requests that run now.", stats.active),
            ("losa_waiting_requests", "Requests in the queue now.", stats.waiting),
        )
        for kind, rows in (("counter", counters), ("gauge", gauges)):
            for name, words, value in rows:
                lines += [*_head(name, kind, words), f"{name} {value:.6f}".rstrip("0").rstrip(".")]
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, words: str) -> tuple[str, str]:
    return f"# HELP {name} {words}", f"# TYPE {name} {kind}"
