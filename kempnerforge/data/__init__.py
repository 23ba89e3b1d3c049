"""Data: sources of samples, tokenizer, encoding, sampling, batches."""

from kempnerforge.data.batching.batch import IGNORE, Batch, Kind
from kempnerforge.data.batching.collate import collate, prompt_batch
from kempnerforge.data.batching.loader import build_loader
from kempnerforge.data.batching.sampler import StepSampler
from kempnerforge.data.images.decode import ImageError, load_image
from kempnerforge.data.sample import ImageSource, Sample, SampleError, Text
from kempnerforge.data.source import Source
from kempnerforge.data.sources.build import build_source
from kempnerforge.data.text.encode import Encoded, Encoder
from kempnerforge.data.text.interleave import Layout, Prompt
from kempnerforge.data.text.tokenizer import Tokenizer

__all__ = [
    "IGNORE",
    "Batch",
    "Encoded",
    "Encoder",
    "ImageError",
    "ImageSource",
    "Kind",
    "Layout",
    "Prompt",
    "Sample",
    "SampleError",
    "Source",
    "StepSampler",
    "Text",
    "Tokenizer",
    "build_loader",
    "build_source",
    "collate",
    "load_image",
    "prompt_batch",
]
