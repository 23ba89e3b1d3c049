"""KempnerForge: vision-language models whose ways of joining image and text can be compared fairly."""

__version__ = "0.1.0"
