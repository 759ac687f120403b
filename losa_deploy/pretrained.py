"""The only door to transformers' `from_pretrained`: files of this machine, and never code from a folder.

A model folder may bring Python files and name them in its configuration. transformers runs them if it is
told to trust them, and asks on the terminal if it is told nothing, so every call says that it does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING

from losa_deploy.errors import InputError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def load_config(folder: Path) -> PretrainedConfig:
    """`config.json` with the class defaults of its architecture; `InputError` if a value is unusable."""
    from transformers import AutoConfig

    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # each configuration class has its own checks and error types
        raise InputError(
            f"transformers cannot read {folder / 'config.json'}: {first_line(error)}.",
            hint="Copy the model's config.json again.",
        ) from error
    return config


def full_config(folder: Path) -> Mapping[str, object]:
    """The same as a mapping, e.g. `rope_parameters`, `layer_types` and `tie_word_embeddings` filled in."""
    found: dict[str, object] = load_config(folder).to_dict()
    return found


def load_model(folder: Path, *, attention: str | None = None) -> PreTrainedModel:
    """The causal LM in `folder` as transformers loads it, f32, in evaluation mode.

    `attention` is transformers' name of an implementation, None for its default. Raises `InputError` if
    it cannot be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            attn_implementation=attention,
        )
    except MemoryError:
        raise
    except Exception as error:  # wrong shapes, types and values surface as whatever they break first
        raise InputError(
            f"transformers cannot open {folder}: {first_line(error)}.",
            hint="Check config.json and the weight files.",
        ) from error
    model.train(False)
    return model


def empty_model(config: PretrainedConfig, *, attention: str | None = None) -> PreTrainedModel:
    """A causal LM of this configuration in f32 whose weights are still to be set; a tied head is tied."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=torch.float32, trust_remote_code=False, attn_implementation=attention
        )
    model.tie_weights()
    model.train(False)
    return model


def cache_argument(model: nn.Module) -> str:
    """What `forward` calls keys and values: `cache` in transformers 5.24, whose older name goes in 5.40."""
    return "cache" if "cache" in signature(model.forward).parameters else "past_key_values"


def load_hf_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`; `InputError` if transformers cannot read it without code from there."""
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the tokenizers library raises bare Exception on a damaged file
        raise InputError(
            f"The tokenizer in {folder} cannot be read: {first_line(error)}.",
            hint="Copy tokenizer.json and tokenizer_config.json of the original model again.",
        ) from error
    return tokenizer


def first_line(error: BaseException) -> str:
    """What an exception says, without what follows its first line."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")
