"""Checkpoints: written whole or not at all, checked before they are believed, read by any number of ranks."""

from kempnerforge.checkpoint.lock import RunLock
from kempnerforge.checkpoint.state import load_training, load_weights, model_tensors, optimizer_tensors, save_training
from kempnerforge.checkpoint.store import CheckpointError, Manifest, find, load, reading, resolve, save, tensor_info, verify

__all__ = [
    "CheckpointError",
    "Manifest",
    "RunLock",
    "find",
    "load",
    "load_training",
    "load_weights",
    "model_tensors",
    "optimizer_tensors",
    "reading",
    "resolve",
    "save",
    "save_training",
    "tensor_info",
    "verify",
]
