"""ggml's tensor types, one codec per file; `TYPES` has those that our files hold."""

from losa_deploy.gguf.types.base import TYPES, GgmlType, WeightType, any_type, own_type
from losa_deploy.gguf.types.plain import F16, F32, I8
from losa_deploy.gguf.types.q1_0 import Q1_0
from losa_deploy.gguf.types.q4_0 import Q4_0
from losa_deploy.gguf.types.q8_0 import Q8_0

__all__ = [
    "F16",
    "F32",
    "I8",
    "Q1_0",
    "Q4_0",
    "Q8_0",
    "TYPES",
    "GgmlType",
    "WeightType",
    "any_type",
    "own_type",
]
