"""Weights from elsewhere, under our names."""

from kempnerforge.interop.weights import read_part, read_text_weights, read_weights, take_weights

__all__ = ["read_part", "read_text_weights", "read_weights", "take_weights"]
