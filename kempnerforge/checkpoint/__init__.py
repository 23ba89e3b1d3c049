"""Checkpoints: written whole or not at all, verified before use, read by any number of ranks."""

from kempnerforge.checkpoint.background import BackgroundSave
from kempnerforge.checkpoint.lock import RunLock
from kempnerforge.checkpoint.manifest import CheckpointError, Manifest, verify
from kempnerforge.checkpoint.reader import load, tensor_info
from kempnerforge.checkpoint.state import load_training, load_weights, model_tensors, optimizer_tensors, save_training, training_tensors
from kempnerforge.checkpoint.store import find, reading, resolve, save

__all__ = [
    "BackgroundSave",
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
    "training_tensors",
    "verify",
]
