"""losa-deploy: sparse causal language models that pay on ordinary CPUs."""

__version__ = "0.1.0"
