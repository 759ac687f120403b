"""i4: one of 16 levels, by default -8..7, and a scale per group."""

from __future__ import annotations

from losa_deploy.layouts.values.base import register
from losa_deploy.layouts.values.grouped import Grouped


class I4(Grouped):
    """Half a byte per weight."""

    name, number, planes = "i4", 3, (4,)
    levels = (-8, 7)
    ggml = "Q4_0"


LINEAR_TABLE = I4().linear_table
register(I4())
