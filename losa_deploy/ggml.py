"""The door of other programs to our llama.cpp backend: `load_plugin().start()` before the first model."""

from losa_deploy.bindings.ggml import Plugin, load_plugin, plugin_path

__all__ = ["Plugin", "load_plugin", "plugin_path"]
