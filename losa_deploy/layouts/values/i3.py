"""i3: one of 8 levels, by default -4..3, and a scale per group."""

from __future__ import annotations

from losa_deploy.layouts.values.base import register
from losa_deploy.layouts.values.grouped import Grouped


class I3(Grouped):
    """Two bits of a code in one plane, the highest in another."""

    name, number, planes = "i3", 4, (2, 1)
    levels = (-4, 3)
    ggml = "Q4_0"


register(I3())
