"""llama.cpp: `enable()` is all a user of plain llama-cpp-python needs."""

from .backend import enable

__all__ = ["enable"]
