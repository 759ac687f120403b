"""Answers of the tiny trained model through the official client, compared with `generate`."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from losa_deploy.runtimes.generate import GenerateOptions, generate, stream_text
from losa_deploy.runtimes.reference import ReferenceRuntime
from losa_deploy.text.tokenizer import load_tokenizer

from .conftest import Running

PROMPT = "Anna has 2 red apples. Ben has"
TALK = [{"role": "user", "content": "Carla has"}]


def expected(folder: Path, prompt: list[int], stop: tuple[str, ...] = (), **options: float) -> str:
    tokenizer = load_tokenizer(folder)
    session = ReferenceRuntime().open(folder, threads=1)
    chosen = GenerateOptions(stop_ids=tokenizer.eos_ids, **options)  # type: ignore[arg-type]
    text = "".join(stream_text(session, tokenizer, prompt, chosen, stop))
    session.close()
    return text


def test_completion_is_what_generate_says(client: openai.OpenAI, tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    ids = tokenizer.encode(PROMPT)
    wanted = expected(tiny_llama, ids, max_tokens=12)
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=12, temperature=0)
    assert answer.choices[0].text == wanted
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 12)
    assert answer.usage.total_tokens == len(ids) + 12
    by_ids = client.completions.create(model="tiny", prompt=ids, max_tokens=12, temperature=0)
    assert by_ids.choices[0].text == wanted


def test_default_length_of_a_completion_is_16(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt=PROMPT, temperature=0)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


def test_several_prompts_are_answered_in_order(client: openai.OpenAI) -> None:
    prompts = ["Dora has", "Emil has", PROMPT]
    one_by_one = [
        client.completions.create(model="tiny", prompt=p, max_tokens=8, temperature=0).choices[0].text
        for p in prompts
    ]
    answer = client.completions.create(model="tiny", prompt=prompts, max_tokens=8, temperature=0)
    assert [c.text for c in answer.choices] == one_by_one
    assert [c.index for c in answer.choices] == [0, 1, 2]
    streamed = ["", "", ""]
    for event in client.completions.create(
        model="tiny", prompt=prompts, max_tokens=8, temperature=0, stream=True
    ):
        for choice in event.choices:
            streamed[choice.index] += choice.text
    assert streamed == one_by_one


def test_chat_uses_the_template(client: openai.OpenAI, tiny_llama: Path) -> None:
    wanted = expected(tiny_llama, load_tokenizer(tiny_llama).chat(TALK), max_tokens=10)
    answer = client.chat.completions.create(model="tiny", messages=TALK, max_tokens=10, temperature=0)
    assert answer.choices[0].message.content == wanted
    assert answer.choices[0].message.role == "assistant"
    parts = [
        {"role": "user", "content": [{"type": "text", "text": "Carla"}, {"type": "text", "text": " has"}]}
    ]
    again = client.chat.completions.create(
        model="tiny",
        messages=parts,  # type: ignore[arg-type]
        max_completion_tokens=10,
        temperature=0,
    )
    assert again.choices[0].message.content == wanted


def test_a_reply_can_be_sent_back(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(model="tiny", messages=TALK, max_tokens=5)
    history = [*TALK, first.choices[0].message, {"role": "user", "content": "And Dora?"}]
    again = client.chat.completions.create(model="tiny", messages=history, max_tokens=5)  # type: ignore[arg-type]
    assert again.usage is not None
    assert first.usage is not None
    assert again.usage.prompt_tokens > first.usage.prompt_tokens


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 0.9, "seed": 5, "top_p": 0.8}])
def test_streamed_equals_whole(client: openai.OpenAI, options: dict[str, float]) -> None:
    common = {"model": "tiny", "messages": TALK, "max_tokens": 20, **options}
    whole = client.chat.completions.create(**common)  # type: ignore[call-overload]
    events = list(
        client.chat.completions.create(  # type: ignore[call-overload]
            **common, stream=True, stream_options={"include_usage": True}
        )
    )
    pieces = [e.choices[0].delta.content or "" for e in events if e.choices]
    assert len([p for p in pieces if p]) > 3
    assert "".join(pieces) == whole.choices[0].message.content
    assert events[0].choices[0].delta.role == "assistant"
    assert [e.choices[0].finish_reason for e in events if e.choices][-1] == whole.choices[0].finish_reason
    assert events[-1].choices == []
    assert events[-1].usage == whole.usage
    assert all(e.usage is None for e in events[:-1])


def test_sampling_follows_the_seed_as_generate_does(client: openai.OpenAI, tiny_llama: Path) -> None:
    ids = load_tokenizer(tiny_llama).encode(PROMPT)
    texts = {
        seed: client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=20, temperature=1.5, top_p=0.95, seed=seed
        )
        .choices[0]
        .text
        for seed in (1, 2)
    }
    for seed, text in texts.items():
        assert text == expected(tiny_llama, ids, max_tokens=20, temperature=1.5, top_p=0.95, seed=seed)
    assert texts[1] != texts[2]
    assert client.completions.create(model="tiny", prompt=PROMPT, max_tokens=2, seed=-1, top_p=0).choices


def test_stop_strings_reach_across_tokens(client: openai.OpenAI, tiny_llama: Path) -> None:
    ids = load_tokenizer(tiny_llama).encode(PROMPT)
    full = expected(tiny_llama, ids, max_tokens=24)
    stop = full[7:12]
    wanted = full[: full.index(stop)]
    tokens = load_tokenizer(tiny_llama).encode(full, special=False)
    pieces = [load_tokenizer(tiny_llama).decode([t]) for t in tokens]
    assert stop not in pieces, "the stop string is one token; choose another place"
    answer = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=24, temperature=0, stop=[stop, "never"], logprobs=0
    )
    assert answer.choices[0].text == wanted
    assert answer.choices[0].finish_reason == "stop"
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.text_offset is not None
    assert max(logprobs.text_offset) < len(wanted)
    streamed = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=24, temperature=0, stop=stop, stream=True
    )
    assert "".join(e.choices[0].text for e in streamed) == wanted


def test_the_end_token_ends_a_reply(server: Running, tiny_llama: Path) -> None:
    """With seeds tried until the model says it: it was not trained to."""
    tokenizer = load_tokenizer(tiny_llama)
    session = ReferenceRuntime().open(tiny_llama, threads=1)
    ids = tokenizer.encode(PROMPT)
    options = {"max_tokens": 30, "temperature": 2.0}
    for seed in range(400):
        chosen = GenerateOptions(seed=seed, stop_ids=tokenizer.eos_ids, **options)  # type: ignore[arg-type]
        length = len(list(generate(session, ids, chosen)))
        if length < 30:
            break
    session.close()
    assert length < 30
    answer = server.client().completions.create(
        model="tiny", prompt=PROMPT, seed=seed, max_tokens=30, temperature=2.0
    )
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == length


def test_logprobs_are_of_the_models_distribution(client: openai.OpenAI, tiny_llama: Path) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=TALK, max_tokens=6, temperature=0, logprobs=True, top_logprobs=3
    )
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.content is not None
    assert "".join(t.token for t in found.content) == answer.choices[0].message.content
    session = ReferenceRuntime().open(tiny_llama, threads=1)
    logits = session.prefill(load_tokenizer(tiny_llama).chat(TALK)).astype(float)
    session.close()
    first = found.content[0]
    exact = float(logits.max() - math.log(sum(math.exp(v) for v in logits)))
    assert first.logprob == pytest.approx(exact, abs=1e-4)
    assert first.bytes == list(first.token.encode())
    assert len(first.top_logprobs) == 3
    assert first.top_logprobs[0].token == first.token
    values = [t.logprob for t in first.top_logprobs]
    assert values == sorted(values, reverse=True)
    streamed = client.chat.completions.create(
        model="tiny", messages=TALK, max_tokens=6, temperature=0, logprobs=True, top_logprobs=3, stream=True
    )
    pieces = [t for e in streamed if e.choices[0].logprobs for t in e.choices[0].logprobs.content or []]
    assert [p.model_dump() for p in pieces] == [t.model_dump() for t in found.content]


def test_eight_clients_at_once_get_what_one_gets(server: Running) -> None:
    names = ["Anna", "Ben", "Carla", "Dora", "Emil", "Fred", "Greta", "Hugo"]

    def ask(name: str) -> str:
        answer = server.client().completions.create(
            model="tiny", prompt=f"{name} has", max_tokens=10, temperature=0
        )
        return answer.choices[0].text

    alone = [ask(name) for name in names]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, names)) == alone


def test_models_health_and_metrics(server: Running) -> None:
    client = server.client()
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "losa-deploy"
    before = server.metric("losa_generated_tokens_total")
    client.completions.create(model="tiny", prompt=PROMPT, max_tokens=7, temperature=0)
    assert server.metric("losa_generated_tokens_total") == before + 7
    assert server.metric("losa_slots") == 1
    assert server.metric('losa_requests_total{endpoint="/v1/completions",outcome="200"}') > 0
