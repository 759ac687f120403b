"""ONNX Runtime: `register(session_options)` is all a user of plain ONNX Runtime needs."""

from .library import library_path, register

__all__ = ["library_path", "register"]
