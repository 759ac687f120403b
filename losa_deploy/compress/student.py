"""The decoder that is compressed: its linears have masks, and its blocks come from what was done so far."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn

from losa_deploy.assemble import fill, set_parameter
from losa_deploy.compress.decoder import Decoder
from losa_deploy.compress.device import CPU
from losa_deploy.compress.masked import AdaptedLinear, MaskedLinear
from losa_deploy.sources.checkpoint import Checkpoint


@dataclass(frozen=True)
class StoredBlock:
    """A block as an earlier step or this one left it, by full names."""

    linears: Mapping[str, AdaptedLinear] = field(default_factory=dict)
    rest: Mapping[str, Tensor] = field(default_factory=dict)
    """Trained norms and biases."""


class Student(Decoder):
    """A `Decoder` with a `MaskedLinear` for each linear of its blocks; f32."""

    def __init__(self, checkpoint: Checkpoint, dense: Decoder | None = None) -> None:
        """Full masks: the function of the checkpoint, with the embedding, the head and the device of `dense`.

        Raises `InputError` as `Decoder` does.
        """
        super().__init__(checkpoint, device=CPU if dense is None else dense.device)
        if dense is not None:
            self._share(dense)
        self.stored: Callable[[int], StoredBlock] = lambda block: StoredBlock()
        """What a block has instead of the checkpoint's weights."""
        for name in self.names:
            parent, _, child = name.rpartition(".")
            setattr(self.model.get_submodule(parent), child, MaskedLinear.from_linear(self.linear(name)))

    def _share(self, dense: Decoder) -> None:
        """Take over the large tensors outside of the blocks, which no phase trains."""
        own = (f"{self.family.blocks}.", f"{self.family.final_norm}.")
        names = [name for name, _ in self.model.named_parameters() if not name.startswith(own)]
        for name in names:
            set_parameter(self.model, name, dense.model.get_parameter(name).data)
        self.model.tie_weights()  # type: ignore[operator]

    def masked(self, name: str) -> MaskedLinear:
        """A linear of a block; it has values while the block is open."""
        module = self.model.get_submodule(name)
        assert isinstance(module, MaskedLinear)
        return module

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

    def block_parameters(self, block: int) -> tuple[str, ...]:
        """Without what only a `MaskedLinear` has."""
        weights = (f"{name}.weight" for name in self.block_linears(block))
        return (*weights, *self.rest(block))

    def load_block(self, block: int) -> None:
        """Read a block: what is stored of it, the rest from the checkpoint."""
        found = self.stored(block)
        known = {f"{name}.weight" for name in found.linears} | set(found.rest) | self.pinned
        names = [name for name in self.block_parameters(block) if name not in known]
        fill(self.checkpoint, self.model, names, device=self.device)
        self.restore_rest({name: value for name, value in found.rest.items() if name not in self.pinned})
        for name in self.block_linears(block):
            self.masked(name).take(found.linears.get(name), self.device)

    def drop_block(self, block: int) -> None:
        """Forget the values of a block; its shapes, ranks, scales of adapters and grids stay."""
        super().drop_block(block)
        for name in self.block_linears(block):
            self.masked(name).drop()

    @contextmanager
    def rest_pinned(self) -> Iterator[None]:
        """Norms and biases of all blocks stay in memory inside, as they were and as they become."""
        for block in range(len(self.blocks)):
            with self.open(block):
                self.pinned |= set(self.rest(block))
        try:
            yield
        finally:
            self.pinned.clear()
            for block in range(len(self.blocks)):
                if not self.is_open(block):
                    self.drop_block(block)

    def restore_rest(self, values: Mapping[str, Tensor]) -> None:
        """Put norms and biases in their places."""
        for name, value in values.items():
            set_parameter(self.model, name, value.to(self.device))
