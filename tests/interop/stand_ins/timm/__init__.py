"""Installed, as transformers sees it, and broken: it stands here so that a test fails where anything imports it."""

raise ImportError("timm was imported")
