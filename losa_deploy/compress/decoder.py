"""A decoder in torch whose blocks are in memory while they are open, and the stream through them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from losa_deploy.assemble import fill, set_parameter, skeleton
from losa_deploy.compress.device import CPU
from losa_deploy.compress.precision import products
from losa_deploy.compress.streams import Streams
from losa_deploy.families import Family
from losa_deploy.sources.checkpoint import Checkpoint

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


class _Recomputed(nn.Module):
    """Stands in for a block: the backward pass computes it a second time from its input."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.attention_type = getattr(block, "attention_type", "full_attention")

    def forward(self, hidden: Tensor, **arguments: object) -> object:
        return checkpoint(self.block, hidden, use_reentrant=False, **arguments)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Stream:
    """Hidden states [samples, tokens, hidden] before some block, with every block's other arguments.

    `arguments[i]` is what block i gets besides the hidden states. It is that of one sample: masks and
    position embeddings are the same for all, and broadcast over a batch of any size.
    """

    hidden: Tensor
    arguments: tuple[BlockArguments, ...]
    batch: int

    def rows(self, part: slice | Tensor) -> Tensor:
        """The hidden states of some samples, in f32 where they are stored in less."""
        return self.hidden[part].to(torch.promote_types(self.hidden.dtype, torch.float32))

    def batches(self) -> Iterator[slice]:
        """Slices of `batch` samples; the last one may hold fewer."""
        return slices(0, self.hidden.shape[0], self.batch)


class Decoder:
    """A causal LM on a device, without gradients, addressed by its family's names.

    A block has its weights while it is open, and is read from the checkpoint again each time.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype = torch.float32,
        attention: str = ATTENTION,
        device: torch.device = CPU,
    ) -> None:
        """Put together from the checkpoint's own tensors, f32 or another `dtype`; no block is open.

        `attention` is transformers' name of an implementation. Raises `InputError` here or when a block is
        opened if a weight is missing or not finite.
        """
        self.checkpoint = checkpoint
        self.family: Family = checkpoint.family
        self.names = tuple(checkpoint.linears)
        self.dtype = dtype
        self.device = device
        self.model: nn.Module = skeleton(checkpoint, attention=attention, dtype=dtype, device=device)
        self.streams: Streams | None = None
        """Where streams lie; None: in memory."""
        self.pinned: set[str] = set()
        """Parameters of blocks that stay as they are when these open and close."""
        self._users: Counter[int] = Counter()

    @contextmanager
    def open(self, *blocks: int) -> Iterator[None]:
        """Blocks have their weights inside; what becomes of these is lost with the last who has it open."""
        with ExitStack() as stack:
            for block in blocks:
                self._enter(block)
                stack.callback(self._close, block)
            yield

    def _close(self, block: int) -> None:
        self._users[block] -= 1
        if not self._users[block]:
            self.drop_block(block)

    def is_open(self, block: int) -> bool:
        return self._users[block] > 0

    def keep(self, *blocks: int) -> Self:
        """Open these blocks or all, until `release`."""
        for block in blocks or range(len(self.blocks)):
            self._enter(block)
        return self

    def release(self) -> None:
        """End of `keep`."""
        for block in range(len(self.blocks)):
            self._close(block)

    def load_block(self, block: int) -> None:
        """Read the weights of a block."""
        names = [name for name in self.block_parameters(block) if name not in self.pinned]
        fill(self.checkpoint, self.model, names, self.dtype, self.device)

    def drop_block(self, block: int) -> None:
        """Forget the weights of a block; their shapes stay."""
        for name in set(self.block_parameters(block)) - self.pinned:
            set_parameter(self.model, name, self.model.get_parameter(name).to("meta"))

    def block_parameters(self, block: int) -> tuple[str, ...]:
        """Full names of a block's parameters in the checkpoint."""
        prefix = f"{self.family.blocks}.{block}"
        return tuple(f"{prefix}.{name}" for name, _ in self.blocks[block].named_parameters())

    @property
    def blocks(self) -> nn.ModuleList:
        blocks = self.model.get_submodule(self.family.blocks)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    def block_linears(self, block: int) -> tuple[str, ...]:
        """Full names of the linears of one block."""
        return tuple(f"{self.family.blocks}.{block}.{name}" for name in self.family.block_linears())

    def linear(self, name: str) -> nn.Linear:
        """A linear of the model; see `open`."""
        module = self.model.get_submodule(name)
        assert isinstance(module, nn.Linear)
        return module

    @property
    def head(self) -> nn.Linear:
        """The linear that gives logits."""
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        assert isinstance(head, nn.Linear)
        return head

    def features(self, tokens: Tensor, precision: str = "f32", *, recompute: bool = False) -> Tensor:
        """What the head reads, [samples, tokens, hidden] f32, of `tokens` [samples, tokens] int64.

        Differentiable; with `recompute` the backward pass computes each block a second time and only its
        input is kept (Chen et al. 2016, arXiv 1604.06174).
        """
        decoder = self.model.get_decoder()  # type: ignore[operator]
        inside = self._replaced([_Recomputed(block) for block in self.blocks]) if recompute else nullcontext()
        with products(precision, self.device), self.passing(), inside:
            hidden: Tensor = decoder(input_ids=tokens.to(self.device), use_cache=False).last_hidden_state
        return hidden.float()

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Inside, the model opens each block while it computes it. Gradients need open blocks, see `keep`."""
        handles = []
        for block, module in enumerate(self.blocks):
            if not self.is_open(block):
                handles += [
                    module.register_forward_pre_hook(lambda *_, number=block: self._enter(number)),
                    module.register_forward_hook(lambda *_, number=block: self._close(number)),
                ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, block: int) -> None:
        self._users[block] += 1
        if self._users[block] == 1:
            self.load_block(block)

    def logits(self, tokens: Tensor, precision: str = "f32") -> Tensor:
        """Logits [samples, tokens, vocab] f32 of `tokens` [samples, tokens] int64; differentiable."""
        logits: Tensor = self.head(self.features(tokens, precision))
        return logits

    @torch.no_grad()
    def stream(self, tokens: Tensor, batch: int) -> Stream:
        """Embed `tokens` [samples, tokens], `batch` samples at a time: the stream before block 0."""
        first, arguments = self._embed(tokens[:1])
        hidden = self._room((*tokens.shape, first.shape[-1]))
        for part in slices(0, tokens.shape[0], batch):
            hidden[part] = self._embed(tokens[part])[0]
        return Stream(hidden, arguments, batch)

    def _room(self, shape: Sequence[int]) -> Tensor:
        """Room for hidden states."""
        if self.streams is None:
            return torch.empty(*shape, dtype=torch.float32, device=self.device)
        return self.streams.empty(shape, self.device, self.streams.dtype)

    def _embed(self, tokens: Tensor) -> tuple[Tensor, tuple[BlockArguments, ...]]:
        """What the model passes to block 0, and what to every block besides the hidden states."""
        blocks = self.blocks
        recorders = [_Recorder(block) for block in blocks]
        with self._replaced(recorders) as parent:
            parent(input_ids=tokens.to(self.device), use_cache=False)
        seen = [recorder.seen for recorder in recorders if recorder.seen is not None]
        assert len(seen) == len(blocks)
        return seen[0][0], tuple(arguments for _, arguments in seen)

    @torch.no_grad()
    def finish(self, stream: Stream) -> Tensor:
        """What the head reads, [samples, tokens, hidden], of the stream after the last block."""
        width = self.last_norm(stream.rows(slice(1))[:, :1]).shape[-1]  # OPT projects to another one
        result = self._room((*stream.hidden.shape[:2], width))
        for part in stream.batches():
            result[part] = self.last_norm(stream.rows(part))
        return result

    def last_norm(self, hidden: Tensor) -> Tensor:
        """What the head reads of the last block's output [samples, tokens, hidden]; differentiable."""
        with self._replaced([_Replay(self.blocks[0], hidden)]) as parent:
            tokens = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
            found: Tensor = parent(input_ids=tokens, use_cache=False).last_hidden_state
        return found

    def logits_by_block(self, tokens: Tensor, change: Callable[[int], None]) -> Tensor:
        """Logits [samples, tokens, vocab] with what `change` does to each block after it was opened."""
        stream = self.stream(tokens, batch_size(tokens.shape[0]))
        for block in range(len(self.blocks)):
            with self.open(block):
                change(block)
                stream = self.advance(block, stream)
        logits: Tensor = self.head(self.finish(stream))
        return logits

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
        """One open block on a batch [any, tokens, hidden] with a stream's arguments; differentiable."""
        output = self.blocks[block](hidden, **arguments)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    @torch.no_grad()
    def advance(self, block: int, stream: Stream, precision: str = "f32") -> Stream:
        """The stream after `block`; sums are f32 (see `precision.products`)."""
        result = self._room(stream.hidden.shape)
        with self.open(block), products(precision, self.device):
            for part in stream.batches():
                result[part] = self.run_block(block, stream.rows(part), stream.arguments[block])
        return Stream(result, stream.arguments, stream.batch)
