"""Architectures: one file each over ``base.VLM``."""
