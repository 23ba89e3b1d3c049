"""Audits and checks read the samples that the tests of the data have."""

from tests.data.conftest import list_source, make_encoder, pictures, png_fixture, tokenizer

__all__ = ["list_source", "make_encoder", "pictures", "png_fixture", "tokenizer"]
