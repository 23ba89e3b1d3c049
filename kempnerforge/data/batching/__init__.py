"""Samples to batches: order, rows, packing, workers."""
