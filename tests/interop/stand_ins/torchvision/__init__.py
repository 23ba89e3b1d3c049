"""As much of torchvision as transformers imports to take its own backend; its pixels are a little off, as those of the real one are."""

__version__ = "0.27.0"
