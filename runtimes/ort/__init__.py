"""ONNX Runtime: `register(session_options)` is all a user of plain ONNX Runtime needs."""

from losa_deploy.bindings.libraries import library_path

from .library import register

__all__ = ["library_path", "register"]
