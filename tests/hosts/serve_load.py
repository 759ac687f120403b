"""Load on an OpenAI-compatible server: N clients ask one thing after the other; the figures as JSON.

    python tests/hosts/serve_load.py http://127.0.0.1:8080/v1 --clients 8 --seconds 120

It imports nothing of losa_deploy. Half of the clients stream. Exit code 1 if a request failed; a 503 is
counted on its own and tried again after the time that the server names.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import threading
import time
from dataclasses import dataclass, field

import openai

QUESTIONS = (
    "Name three colours.",
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Count from one to ten.",
    "Why is the sky blue? Answer in one sentence.",
)


@dataclass
class Tally:
    """What the clients saw; guarded by `lock`."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    latencies: list[float] = field(default_factory=list)
    first_texts: list[float] = field(default_factory=list)
    tokens: int = 0
    busy: int = 0
    errors: list[str] = field(default_factory=list)


def ask(
    client: openai.OpenAI, model: str, question: str, limit: int, stream: bool
) -> tuple[int, float | None]:
    """Tokens of one answer, and the seconds until its first text if it is streamed."""
    messages = [{"role": "user", "content": question}]
    start, first, tokens = time.perf_counter(), None, 0
    if not stream:
        whole = client.chat.completions.create(model=model, messages=messages, max_tokens=limit)  # type: ignore[arg-type]
        return (whole.usage.completion_tokens if whole.usage else 0), None
    events = client.chat.completions.create(
        model=model,
        messages=messages,  # type: ignore[arg-type]
        max_tokens=limit,
        stream=True,
        stream_options={"include_usage": True},
    )
    for event in events:
        if first is None and event.choices and event.choices[0].delta.content:
            first = time.perf_counter() - start
        if event.usage:
            tokens = event.usage.completion_tokens
    return tokens, first


def run_client(number: int, options: argparse.Namespace, model: str, end: float, tally: Tally) -> None:
    """Requests of one client until `end` (of time.perf_counter)."""
    client = openai.OpenAI(base_url=options.url, api_key=options.api_key, max_retries=0, timeout=300)
    index = number
    while time.perf_counter() < end:
        start = time.perf_counter()
        try:
            question = QUESTIONS[index % len(QUESTIONS)]
            tokens, first = ask(client, model, question, options.max_tokens, number % 2 == 0)
        except openai.InternalServerError as error:
            if error.status_code == 503:
                with tally.lock:
                    tally.busy += 1
                time.sleep(float(error.response.headers.get("Retry-After", "1")))
                continue
            with tally.lock:
                tally.errors.append(str(error))
        except Exception as error:
            with tally.lock:
                tally.errors.append(f"{type(error).__name__}: {error}")
        else:
            with tally.lock:
                tally.latencies.append(time.perf_counter() - start)
                tally.tokens += tokens
                if first is not None:
                    tally.first_texts.append(first)
        index += 1


def percentile(values: list[float], percent: int) -> float | None:
    """By linear interpolation; None without values."""
    if len(values) < 2:
        return values[0] if values else None
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def load(options: argparse.Namespace) -> dict[str, object]:
    """Run the clients and return the figures."""
    client = openai.OpenAI(base_url=options.url, api_key=options.api_key)
    model = options.model or next(iter(client.models.list())).id
    tally, start = Tally(), time.perf_counter()
    threads = [
        threading.Thread(target=run_client, args=(n, options, model, start + options.seconds, tally))
        for n in range(options.clients)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    return {
        "model": model,
        "clients": options.clients,
        "seconds": round(seconds, 3),
        "requests": len(tally.latencies) + len(tally.errors),
        "errors": len(tally.errors),
        "first_errors": tally.errors[:3],
        "busy_503": tally.busy,
        "tokens": tally.tokens,
        "tokens_per_second": round(tally.tokens / seconds, 2),
        "p50_seconds": percentile(tally.latencies, 50),
        "p95_seconds": percentile(tally.latencies, 95),
        "p50_first_text_seconds": percentile(tally.first_texts, 50),
        "p95_first_text_seconds": percentile(tally.first_texts, 95),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("url", help="base URL with /v1")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--model", help="default: the first of /v1/models")
    parser.add_argument("--api-key", default=os.environ.get("LOSA_API_KEY", "none"))
    figures = load(parser.parse_args())
    sys.stdout.write(json.dumps(figures, indent=2) + "\n")
    return 1 if figures["errors"] or not figures["requests"] else 0


if __name__ == "__main__":
    sys.exit(main())
