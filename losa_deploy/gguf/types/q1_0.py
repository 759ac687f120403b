"""Q1_0: declared in views only, for its size. No file of ours has it, so it is not registered."""

from losa_deploy.gguf.types.base import GgmlType

Q1_0 = GgmlType(41, "Q1_0", 128, 18)
