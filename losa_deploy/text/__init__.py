"""Tokenizers, and text cut for calibration and evaluation."""
