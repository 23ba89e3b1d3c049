"""The tokens that end an answer, as a model's files list them: the same in every family, when it is loaded, imported, asked and exported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from kempnerforge import load_pretrained
from kempnerforge.convert.commands import export_model, import_model
from kempnerforge.convert.verify import load_class
from kempnerforge.inference.model import TrainedModel
from tests.interop.test_hostile_configs import TEXTS, VLMS
from tests.params import quick

MODELS: dict[str, Callable[[Path], object]] = TEXTS | VLMS
OURS = ("nanovlm",)
"""Without a class in transformers, also when they are written here."""
READ_ALONE = ("llava original",)
"""Files that no class of transformers reads; what is exported is the class of another one here."""
OTHER_INPUTS = ("mllama", "qwen2_5_vl", "qwen3_vl")
"""Their classes take tiles, or patches with grids."""
NEW = 24
FRAMED = "User:<image>what is it?<end_of_utterance>\nAssistant:"
PROMPTS = dict.fromkeys(("llava", "llava_next"), "USER: <image>\nwhat is it? ASSISTANT:") | {"idefics3": FRAMED, "smolvlm": FRAMED}
"""As their processors take them."""


def generated(model: Any, inputs: Any, **more: Any) -> list[int]:
    """What the class of transformers writes, its last token included."""
    with torch.no_grad():
        made = model.generate(**dict(inputs), max_new_tokens=NEW, do_sample=False, pad_token_id=0, **more)
    return made[0, inputs.input_ids.shape[1] :].tolist()


def say(path: Path, stop: list[int], where: str) -> None:
    """Lists ``stop`` in ``generation_config.json``, or in ``config.json`` alone."""
    generation = path / "generation_config.json"
    if where == "generation_config.json":
        told = json.loads(generation.read_text()) if generation.is_file() else {}
        generation.write_text(json.dumps(told | {"eos_token_id": stop}))
        return
    generation.unlink(missing_ok=True)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"eos_token_id": stop}))


@pytest.mark.parametrize("name", quick(MODELS, *list(MODELS)[::4]))
def test_every_listed_token_ends_an_answer(name: str, tmp_path: Path) -> None:
    source, run, out = (tmp_path / part for part in ("source", "run", "out"))
    MODELS[name](source)
    if name == "mllama":  # an export of it has no files of a processor
        (source / "preprocessor_config.json").unlink()
    images = {"images": Image.effect_noise((28, 28), 90)} if name in VLMS else {}
    model, processor = load_pretrained(source, device="cpu", verify=False)
    inputs = processor(text=PROMPTS.get(name, "what is it"), **images)
    free = model.generate(inputs.__class__(**{**vars(inputs), "end_id": -1}), max_new_tokens=NEW)[0]
    at = next((k for k, token in enumerate(free) if k > 1 and token not in free[:k] and token > 4), 0)
    stop, want = free[at], free[:at]
    assert stop not in (0, 2)
    say(source, [2, stop], "config.json" if name in ("llama", "llava") else "generation_config.json")

    for path in (source, run) if name in READ_ALONE else (source, run, out):
        if path == run:
            import_model(source, run, verify=False)
            asker = TrainedModel.restore(run)
            assert {2, stop} <= asker.processor.encoder.texts[0].stops
            if name in TEXTS:
                answer = asker.ask("what is it", (), NEW)
                assert (answer.finish(), answer.num_tokens) == (asker.processor.encoder.tokenizer.decode(want), len(want) + 1)
        if path == out:
            export_model(run, out, "kempnerforge" if name in OURS else "hf", verify=False)
        model, processor = load_pretrained(path, device="cpu", verify=False)
        inputs = processor(text=PROMPTS.get(name, "what is it"), **images)
        assert {2, stop} <= inputs.end_id
        assert model.generate(inputs, max_new_tokens=NEW)[0] == want, path.name
        if path != run and name not in (*OURS, *READ_ALONE):
            theirs = load_class(path, json.loads((path / "config.json").read_text())["architectures"][0])
            assert {2, stop} <= {*theirs.generation_config.eos_token_id}
            if name not in OTHER_INPUTS:
                assert generated(theirs, inputs) == [*want, stop], path.name
