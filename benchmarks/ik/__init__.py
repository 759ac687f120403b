"""ik_llama.cpp as a peer: its quantizer, and its run-time in a process of its own.

Nothing of ours runs in it, and it is no dependency: the package `ik-llama-cpp-python` brings its library,
its quantizer and the layouts of its structures.
"""
