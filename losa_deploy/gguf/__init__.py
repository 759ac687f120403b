"""GGUF files: their bytes, what they are to llama.cpp, and what it must not see."""
