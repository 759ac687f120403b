"""Greedy tokens of one folder in one host, as anyone gets them who has never heard of this project.

    python tests/hosts/greedy.py torch build/demo.work/merged > merged.json
    python tests/hosts/greedy.py ort|genai|optimum build/demo --compare merged.json

It imports nothing of losa_deploy, so that it runs in an environment of its own (for Optimum: transformers
4.57 with optimum-onnx 0.1). Exit code 1 if a token differs, with the margin the reference had there.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

PROMPTS = Path(__file__).resolve().parents[2] / "losa_deploy" / "data" / "prompts.txt"
Trace = dict[str, list[float] | list[int]]


def torch_like(model: object, prompt: list[int], steps: int) -> Trace:
    """A transformers-style model, without its cache: every step runs the whole sequence."""
    import torch

    tokens, margins = list(prompt), []
    for _ in range(steps):
        ids = torch.tensor([tokens])
        with torch.no_grad():
            output = model(input_ids=ids, attention_mask=torch.ones_like(ids))  # type: ignore[operator]
        second, first = np.partition(output.logits[0, -1].float().numpy(), -2)[-2:]
        margins.append(float(first - second))
        tokens.append(int(output.logits[0, -1].argmax()))
    return {"tokens": tokens[len(prompt) :], "margins": margins}


def ort_trace(folder: Path, prompts: list[list[int]], steps: int) -> list[Trace]:
    """A plain session of stock ONNX Runtime with an empty cache."""
    import onnxruntime as ort

    session = ort.InferenceSession(str(folder / "model.onnx"))
    config = json.loads((folder / "config.json").read_text("utf-8"))
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    empty = np.zeros((1, heads, 0, size), np.float32)
    traces: list[Trace] = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(steps):
            feeds = {"input_ids": np.array([tokens]), "attention_mask": np.ones((1, len(tokens)), np.int64)}
            for i in session.get_inputs():
                if i.name.startswith("past_key_values"):
                    feeds[i.name] = empty
            tokens.append(int(session.run(["logits"], feeds)[0][0, -1].argmax()))
        traces.append({"tokens": tokens[len(prompt) :]})
    return traces


def genai_trace(folder: Path, prompts: list[list[int]], steps: int) -> list[Trace]:
    """onnxruntime-genai's own greedy search."""
    import onnxruntime_genai as og

    model, traces = og.Model(str(folder)), []
    for prompt in prompts:
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=len(prompt) + steps, do_sample=False)
        generator = og.Generator(model, params)
        generator.append_tokens(np.array(prompt, np.int32))
        tokens: list[int] = []
        while len(tokens) < steps and not generator.is_done():
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
        traces.append({"tokens": tokens})
    return traces


def run(host: str, folder: Path, prompts: list[list[int]], steps: int) -> list[Trace]:
    if host == "ort":
        return ort_trace(folder, prompts, steps)
    if host == "genai":
        return genai_trace(folder, prompts, steps)
    if host == "optimum":
        from optimum.onnxruntime import ORTModelForCausalLM  # type: ignore[import-not-found]

        model = ORTModelForCausalLM.from_pretrained(folder, use_io_binding=False)
    else:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder)
    return [torch_like(model, prompt, steps) for prompt in prompts]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("host", choices=("torch", "ort", "genai", "optimum"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--compare", type=Path, help="JSON of an earlier call with `torch`")
    options = parser.parse_args()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    texts = [line for line in PROMPTS.read_text("utf-8").splitlines() if line.strip()]
    prompts = [list(tokenizer(text)["input_ids"]) for text in texts]
    traces = run(options.host, options.folder, prompts, options.steps)
    if options.compare is None:
        sys.stdout.write(json.dumps(traces) + "\n")
        return 0
    different = 0
    for text, expected, found in zip(texts, json.loads(options.compare.read_text()), traces, strict=True):
        steps = [
            i for i, (a, b) in enumerate(zip(expected["tokens"], found["tokens"], strict=False)) if a != b
        ]
        note = f"differs at step {steps[0]}, margin {expected['margins'][steps[0]]:.3g}" if steps else "equal"
        different += bool(steps)
        sys.stdout.write(f"{options.host}: {text!r}: {note}\n")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
