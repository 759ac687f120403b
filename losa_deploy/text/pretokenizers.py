"""How llama.cpp's named pre-tokenizers split text, as the `pre_tokenizer` of a tokenizer.json.

llama.cpp knows a fixed list of splitting rules by name. The exporter recognises the name from the rules
in a tokenizer.json; a GGUF source gives its name, from which the rules are restored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _bytes(*, regex: bool) -> dict[str, object]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": regex}


def _split(pattern: str) -> dict[str, object]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


RULES: Mapping[str, Sequence[Mapping[str, object]]] = {
    "gpt-2": [_bytes(regex=True)],
    "smollm": [{"type": "Digits", "individual_digits": True}, _bytes(regex=True)],
    "llama-bpe": [_split(LLAMA3), _bytes(regex=False)],
    "smaug-bpe": [_split(LLAMA3), _bytes(regex=False)],
    "qwen2": [_split(QWEN2), _bytes(regex=False)],
    "tekken": [_split(TEKKEN), _bytes(regex=False)],
}
"""Name → the steps, in order."""
WHOLE_WORDS = {"llama-bpe": True, "smaug-bpe": False}
"""Names with equal rules, told apart by `ignore_merges`: a word that is a token stays whole."""
IGNORES = ("trim_offsets", "prepend_scheme")
"""Fields that do not change how text is split."""


def rules(name: str) -> dict[str, object] | None:
    """The `pre_tokenizer` of a tokenizer.json for this name, None if it is not in the table."""
    steps = RULES.get(name)
    if steps is None:
        return None
    if len(steps) == 1:
        return dict(steps[0])
    return {"type": "Sequence", "pretokenizers": [dict(step) for step in steps]}


def recognise(tokenizer: Mapping[str, object]) -> str | None:
    """The name of the rules of a parsed tokenizer.json with a byte-level BPE, None if they are not known.

    A canonical composition (NFC) beforehand is accepted: llama.cpp's converter leaves it out, too.
    """
    normal = [step.get("type") for step in _steps(tokenizer.get("normalizer"), "normalizers")]
    if normal not in ([], ["NFC"]):
        return None
    found = [_canonical(step) for step in _steps(tokenizer.get("pre_tokenizer"), "pretokenizers")]
    model = tokenizer.get("model")
    whole = isinstance(model, Mapping) and bool(model.get("ignore_merges"))
    for name, steps in RULES.items():
        if found == [_canonical(step) for step in steps] and WHOLE_WORDS.get(name, whole) == whole:
            return name
    return None


def _canonical(step: Mapping[str, object]) -> dict[str, object]:
    defaults = {"use_regex": True} if step.get("type") == "ByteLevel" else {}
    return defaults | {key: value for key, value in step.items() if key not in IGNORES}


def _steps(part: object, key: str) -> list[Mapping[str, object]]:
    """A step, or the flattened steps of a sequence."""
    if not isinstance(part, Mapping):
        return []
    if part.get("type") != "Sequence":
        return [part]
    inner = part.get(key)
    return [step for item in (inner if isinstance(inner, list) else []) for step in _steps(item, key)]
