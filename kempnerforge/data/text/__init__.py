"""Texts: tokenizer, templates, and which of their tokens are trained."""
