"""OpenVINO as a peer: it reads GGUF files that llama.cpp has quantized, and runs in a process of its own.

Nothing of ours runs in it, and it is no dependency: `openvino-genai` brings the reader, the run-time and its
kernels.
"""
