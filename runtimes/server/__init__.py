"""An OpenAI-compatible HTTP server over any runtime."""
