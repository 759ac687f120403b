"""A decoder in torch, opened block by block: the stream of hidden states through its blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from losa_deploy.assemble import assemble
from losa_deploy.checkpoint import Checkpoint
from losa_deploy.compress.masked import MaskedLinear
from losa_deploy.compress.precision import products
from losa_deploy.families import Family
from losa_deploy.pretrained import load_model

ATTENTION = "sdpa"
LARGEST_BATCH = 8
BlockArguments = Mapping[str, object]


def batch_size(samples: int) -> int:
    """Samples per batch of a stream of `samples`; its last batch may be shorter."""
    return min(samples, LARGEST_BATCH)


def slices(start: int, stop: int, size: int) -> Iterator[slice]:
    """`start` to `stop` in slices of `size`; the last one may be shorter."""
    for begin in range(start, stop, size):
        yield slice(begin, min(begin + size, stop))


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


class _Replay(nn.Module):
    """Stands in for all blocks: gives hidden states that are known already."""

    def __init__(self, block: nn.Module, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden
        self.attention_type = getattr(block, "attention_type", "full_attention")

    def forward(self, hidden: Tensor, **arguments: object) -> Tensor:
        return self.hidden


@dataclass(frozen=True)
class Stream:
    """Hidden states [samples, tokens, hidden] before some block, with every block's other arguments.

    `arguments[i]` is what block i gets besides the hidden states. It is that of one sample: masks and
    position embeddings are the same for all, and broadcast over a batch of any size.
    """

    hidden: Tensor
    arguments: tuple[BlockArguments, ...]
    batch: int

    def batches(self) -> Iterator[slice]:
        """Slices of `batch` samples; the last one may hold fewer."""
        return slices(0, self.hidden.shape[0], self.batch)


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

    def rest(self, block: int | None) -> dict[str, nn.Parameter]:
        """What phases call norms: norms, and biases of linears, of one block or (None) behind the last one.

        By full name, as in the checkpoint.
        """
        prefix = self.family.final_norm if block is None else f"{self.family.blocks}.{block}"
        module = self.model.get_submodule(prefix)
        inner = {name for name, child in module.named_modules() if isinstance(child, MaskedLinear)}
        return {
            f"{prefix}.{name}": parameter
            for name, parameter in module.named_parameters()
            if name.endswith("bias") or name.rpartition(".")[0] not in inner
        }

    @property
    def head(self) -> nn.Linear:
        """The linear that gives logits."""
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        assert isinstance(head, nn.Linear)
        return head

    def features(self, tokens: Tensor, precision: str = "f32") -> Tensor:
        """What the head reads, [samples, tokens, hidden] f32, of `tokens` [samples, tokens] int64.

        Differentiable.
        """
        decoder = self.model.get_decoder()  # type: ignore[operator]
        with products(precision):
            hidden: Tensor = decoder(input_ids=tokens, use_cache=False).last_hidden_state
        return hidden.float()

    def logits(self, tokens: Tensor, precision: str = "f32") -> Tensor:
        """Logits [samples, tokens, vocab] f32 of `tokens` [samples, tokens] int64; differentiable."""
        logits: Tensor = self.head(self.features(tokens, precision))
        return logits

    @torch.no_grad()
    def stream(self, tokens: Tensor, batch: int) -> Stream:
        """Embed `tokens` [samples, tokens], `batch` samples at a time: the stream before block 0."""
        _, arguments = self._embed(tokens[:1])
        hidden = [self._embed(part)[0] for part in torch.split(tokens, batch)]
        return Stream(torch.cat(hidden), arguments, batch)

    def _embed(self, tokens: Tensor) -> tuple[Tensor, tuple[BlockArguments, ...]]:
        """What the model passes to block 0, and what to every block besides the hidden states."""
        blocks = self.blocks
        recorders = [_Recorder(block) for block in blocks]
        with self._replaced(recorders) as parent:
            parent(input_ids=tokens, use_cache=False)
        seen = [recorder.seen for recorder in recorders if recorder.seen is not None]
        assert len(seen) == len(blocks)
        return seen[0][0], tuple(arguments for _, arguments in seen)

    @torch.no_grad()
    def finish(self, stream: Stream) -> Tensor:
        """What the head reads, [samples, tokens, hidden], of the stream after the last block."""
        parts = []
        for part in stream.batches():
            hidden = stream.hidden[part]
            with self._replaced([_Replay(self.blocks[0], hidden)]) as parent:
                tokens = torch.zeros(hidden.shape[:2], dtype=torch.int64)
                parts.append(parent(input_ids=tokens, use_cache=False).last_hidden_state)
        return torch.cat(parts)

    @contextmanager
    def _replaced(self, modules: Sequence[nn.Module]) -> Iterator[nn.Module]:
        """The module that holds the blocks, with others in their place for a while."""
        parent_name, _, child = self.family.blocks.rpartition(".")
        parent, blocks = self.model.get_submodule(parent_name), self.blocks
        setattr(parent, child, nn.ModuleList(modules))
        try:
            yield parent
        finally:
            setattr(parent, child, blocks)

    def run_block(self, block: int, hidden: Tensor, arguments: BlockArguments) -> Tensor:
        """One block on a batch [any, tokens, hidden] with a stream's arguments; differentiable."""
        output = self.blocks[block](hidden, **arguments)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    @torch.no_grad()
    def advance(self, block: int, stream: Stream, precision: str = "f32") -> Stream:
        """The stream after `block`; hidden states stay f32 (see `precision.products`)."""
        result = torch.empty_like(stream.hidden)
        for part in stream.batches():
            with products(precision):
                result[part] = self.run_block(block, stream.hidden[part], stream.arguments[block])
        return Stream(result, stream.arguments, stream.batch)
