"""Native libraries and llama.cpp, as Python sees them."""
