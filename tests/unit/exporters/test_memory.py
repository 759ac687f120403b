"""What an export is expected to take does not grow with the number of blocks."""

from __future__ import annotations

import pytest

from losa_deploy.cli.plan import LIBRARY_BYTES, estimate
from losa_deploy.exporters.gguf.exporter import GgufExporter
from losa_deploy.exporters.onnx.exporter import OnnxExporter
from losa_deploy.interfaces import Exporter
from losa_deploy.planned import packing_bytes
from losa_deploy.recipe import load_recipe

HIDDEN, INNER, VOCABULARY = 1024, 2752, 32000
TABLES = {"embed": (VOCABULARY, HIDDEN), "lm_head": (VOCABULARY, HIDDEN)}


def linears(blocks: int) -> dict[str, tuple[int, int]]:
    shapes = {"q": (HIDDEN, HIDDEN), "k": (HIDDEN, HIDDEN), "v": (HIDDEN, HIDDEN), "o": (HIDDEN, HIDDEN)}
    shapes |= {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}
    return {f"{block}.{name}": shape for block in range(blocks) for name, shape in shapes.items()}


@pytest.mark.parametrize("exporter", [OnnxExporter(), GgufExporter()], ids=["onnx", "gguf"])
def test_more_blocks_take_no_more_memory(exporter: Exporter) -> None:
    """Most is taken by the embedding and the head in f32, twice, where an export is judged block by block."""
    recipe = load_recipe(overrides=[("export.value_type", "i4")])
    peaks = {estimate(exporter, linears(blocks), TABLES, recipe, 1 << 30).peak_ram_bytes for blocks in (1, 2)}
    assert peaks == {LIBRARY_BYTES + 8 * 2 * VOCABULARY * HIDDEN}


def test_packing_takes_what_the_largest_tensor_takes() -> None:
    few, many = (packing_bytes(linears(blocks).values(), TABLES.values()) for blocks in (1, 32))
    assert few == many == 12 * VOCABULARY * HIDDEN
    assert packing_bytes(linears(1).values(), []) == 20 * INNER * HIDDEN
