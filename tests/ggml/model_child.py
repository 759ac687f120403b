"""Runs a model in a process of its own, because a route is chosen once: MODEL THREADS MODE LOGITS → JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import llama_cpp
import numpy as np


def main() -> None:
    path, threads, mode = sys.argv[1:4]
    facts: dict[str, object] = {}
    plugin = None
    if mode != "stock":
        from losa_deploy.ggml import load_plugin

        plugin = load_plugin()
        plugin.start()
        facts |= {"route": plugin.route, "status": plugin.status}
    model = llama_cpp.Llama(
        path,
        n_ctx=1024,
        n_batch=512,
        n_ubatch=512,
        n_threads=int(threads),
        n_threads_batch=int(threads),
        logits_all=True,
        flash_attn=False,
        type_k=0,
        type_v=0,
        verbose=False,
    )
    prompt = [int(token) for token in np.random.default_rng(3).integers(0, 320, 600)]
    model.eval(prompt)
    rows = [model.scores[:600].copy()]
    tokens: list[int] = []
    for _ in range(24):
        tokens.append(int(model.scores[model.n_tokens - 1].argmax()))
        model.eval([tokens[-1]])
        rows.append(model.scores[model.n_tokens - 1 : model.n_tokens].copy())
    np.save(sys.argv[4], np.concatenate(rows))
    if plugin is not None:
        facts |= {"statistics": asdict(plugin.statistics()), "damage": plugin.damage()}
    sys.stdout.write(json.dumps({**facts, "tokens": tokens}) + "\n")


main()
