"""A decoder in torch, opened block by block: the stream of hidden states through its blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from losa_deploy.assemble import assemble
from losa_deploy.checkpoint import Checkpoint
from losa_deploy.compress.masked import MaskedLinear
from losa_deploy.families import Family
from losa_deploy.pretrained import load_model

ATTENTION = "sdpa"
BlockArguments = Mapping[str, object]


def batch_size(samples: int, largest: int = 8) -> int:
    """The largest divisor of `samples` up to `largest`: all batches of a stream have one size."""
    return max(size for size in range(1, min(samples, largest) + 1) if samples % size == 0)


class _Recorder(nn.Module):
    """Stands in for a block: keeps what the model passes to it and hands the hidden states on."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.seen: tuple[Tensor, BlockArguments] | None = None
        # Models read such attributes of a block to choose its mask (sliding or full attention).
        self.attention_type = getattr(block, "attention_type", "full_attention")

    def forward(self, hidden: Tensor, **arguments: object) -> Tensor:
        self.seen = (hidden, arguments)
        return hidden


@dataclass(frozen=True)
class Stream:
    """Hidden states [samples, tokens, hidden] before some block, with every block's other arguments.

    `arguments[i]` is what block i gets besides the hidden states, for one batch of `batch` samples.
    """

    hidden: Tensor
    arguments: tuple[BlockArguments, ...]
    batch: int

    def batches(self) -> Iterator[slice]:
        """Slices of `batch` samples; the number of samples is a multiple of `batch`."""
        for start in range(0, self.hidden.shape[0], self.batch):
            yield slice(start, start + self.batch)


class Decoder:
    """A causal LM in f32 on the CPU, without gradients, addressed by its family's names."""

    def __init__(self, checkpoint: Checkpoint, *, assembled: bool = False) -> None:
        """As transformers loads the folder, or put together from the checkpoint's own tensors.

        Raises `InputError` if the folder cannot be loaded, or (assembled) a weight is not finite.
        """
        self.family: Family = checkpoint.family
        self.names = tuple(checkpoint.linears)
        if assembled:
            model = assemble(checkpoint, attention=ATTENTION)
        else:
            model = load_model(checkpoint.folder, attention=ATTENTION)
        self.model: nn.Module = model.requires_grad_(False)

    @property
    def blocks(self) -> nn.ModuleList:
        blocks = self.model.get_submodule(self.family.blocks)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    def block_linears(self, block: int) -> tuple[str, ...]:
        """Full names of the linears of one block."""
        return tuple(f"{self.family.blocks}.{block}.{name}" for name in self.family.block_linears())

    def linear(self, name: str) -> nn.Linear:
        """A linear of the dense model."""
        module = self.model.get_submodule(name)
        assert isinstance(module, nn.Linear)
        return module

    def masked(self, name: str) -> MaskedLinear:
        """A linear of a model prepared by `mask_linears`."""
        module = self.model.get_submodule(name)
        assert isinstance(module, MaskedLinear)
        return module

    def mask_linears(self) -> None:
        """Replace every block linear by a `MaskedLinear` with a full mask (same function)."""
        for name in self.names:
            parent, _, child = name.rpartition(".")
            setattr(self.model.get_submodule(parent), child, MaskedLinear.from_linear(self.linear(name)))

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits [samples, tokens, vocab] of `tokens` [samples, tokens] int64; differentiable."""
        output = self.model(input_ids=tokens, use_cache=False)
        logits: Tensor = output.logits
        return logits

    @torch.no_grad()
    def stream(self, tokens: Tensor, batch: int) -> Stream:
        """Embed `tokens` [samples, tokens]: the stream before block 0.

        `samples` must be a multiple of `batch`: all batches share masks and position embeddings.
        """
        parent_name, _, child = self.family.blocks.rpartition(".")
        parent = self.model.get_submodule(parent_name)
        blocks = self.blocks
        hidden: list[Tensor] = []
        arguments: tuple[BlockArguments, ...] = ()
        try:
            for start in range(0, tokens.shape[0], batch):
                recorders = [_Recorder(block) for block in blocks]
                setattr(parent, child, nn.ModuleList(recorders))
                parent(input_ids=tokens[start : start + batch], use_cache=False)
                seen = [recorder.seen for recorder in recorders]
                assert all(item is not None for item in seen)
                hidden.append(seen[0][0])  # type: ignore[index]
                arguments = tuple(item[1] for item in seen)  # type: ignore[index]
        finally:
            setattr(parent, child, blocks)
        return Stream(torch.cat(hidden), arguments, batch)

    def run_block(self, block: int, hidden: Tensor, arguments: BlockArguments) -> Tensor:
        """One block on one batch [batch, tokens, hidden]; differentiable."""
        output = self.blocks[block](hidden, **arguments)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    @torch.no_grad()
    def advance(self, block: int, stream: Stream) -> Stream:
        """The stream after `block`."""
        parts = [
            self.run_block(block, stream.hidden[part], stream.arguments[block]) for part in stream.batches()
        ]
        return Stream(torch.cat(parts), stream.arguments, stream.batch)
