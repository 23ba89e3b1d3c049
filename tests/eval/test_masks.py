"""Masks of ``<seg>`` codes: the decoder against one written out from its equations, files, drawing, the task."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.metrics import answer
from kempnerforge.eval.codecs import Box, Marks, encode_boxes
from kempnerforge.eval.draw import draw_marks
from kempnerforge.eval.masks import CODES, MaskDecoder, load_mask_decoder
from kempnerforge.eval.tasks.masks import Masks, mean_overlap
from kempnerforge.util.errors import InputError
from tests.training.tiny import call

SEEN = Box(0.25, 0.5, 0.75, 1.0, "cat", tuple(range(16)))


def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
    np.savez(path, **arrays)


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    """Random weights by the names of the published file, with fewer channels and an encoder."""
    draws = torch.Generator().manual_seed(0)
    made = MaskDecoder(code_dim=12, dim=16)
    found = {name: 0.3 * torch.randn(p.shape, generator=draws) for name, p in made.named_parameters()}
    return {CODES if name == "codes" else name: 3 * p for name, p in found.items()} | {"encoder.0.weight": torch.zeros(2)}


@pytest.fixture(scope="module")
def file(tensors: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vae") / "vae.npz"
    write(path, tensors)
    return path


def written_out(t: dict[str, Tensor], codes: list[int]) -> np.ndarray:
    """One mask. The doublings as their code has them: zeros between the pixels, then a convolution with two pixels around."""
    conv = lambda x, name, padding=0: F.conv2d(x, t[f"{name}.weight"], t[f"{name}.bias"], padding=padding)
    x = t[CODES][codes].T.reshape(1, -1, 4, 4)
    x = conv(x, "decoder.0").relu()
    for block in ("decoder.2.net", "decoder.3.net"):
        x = x + conv(conv(conv(x, f"{block}.0", 1).relu(), f"{block}.2", 1).relu(), f"{block}.4")
    for layer in ("decoder.4", "decoder.6", "decoder.8", "decoder.10"):
        wide = torch.zeros(1, x.shape[1], 2 * x.shape[2] - 1, 2 * x.shape[3] - 1)
        wide[:, :, ::2, ::2] = x
        x = F.conv2d(wide, t[f"{layer}.weight"].transpose(0, 1).flip(2, 3), t[f"{layer}.bias"], padding=2).relu()
    return np.clip(conv(x, "decoder.12")[0, 0].numpy() * 0.5 + 0.5, 0, 1)


def test_masks_are_those_of_the_equations(tensors: dict[str, Tensor], file: Path, tmp_path: Path) -> None:
    save_file({name: p.contiguous() for name, p in tensors.items()}, tmp_path / "vae.safetensors")
    codes = [list(range(16)), [127] * 16, list(range(100, 116))]
    want = np.stack([written_out(tensors, row) for row in codes])
    assert want.shape == (3, 64, 64) and 0.05 < (want > 0.5).mean() < 0.95
    for path in (file, tmp_path / "vae.safetensors"):
        np.testing.assert_allclose(load_mask_decoder(path)(codes), want, rtol=1e-4, atol=1e-5)


def test_a_mask_is_where_its_box_is(file: Path) -> None:
    decoder = load_mask_decoder(file)
    mask = decoder.on_image(SEEN, 256, 128)
    assert mask.shape == (128, 256) and not mask[:64].any() and not mask[:, :64].any() and not mask[:, 192:].any()
    part = np.asarray(Image.fromarray(decoder([SEEN.codes])[0]).resize((128, 64), Image.Resampling.BILINEAR)) > 0.5
    assert (mask[64:, 64:192] == part).all() and part.any()
    assert decoder.on_image(Box(0.5, 0.5, 0.5, 1.0, "", SEEN.codes), 100, 100).sum() == 0
    assert decoder.on_image(Box(0.0, 0.0, 0.5, 1.0), 100, 100).sum() == 5000


def test_masks_are_drawn(file: Path) -> None:
    grey, decoder = Image.new("RGB", (512, 512), (128, 128, 128)), load_mask_decoder(file)
    plain, tinted = (np.asarray(draw_marks(grey, Marks((SEEN,)), each)).astype(int) for each in (None, decoder))
    changed, mask = (plain != tinted).any(-1), decoder.on_image(SEEN, 512, 512)
    assert changed.sum() > 1000 and not changed[~mask].any()


@pytest.mark.parametrize("what", ["absent", "text", "pickle", "a key less", "another shape", "a key more", "no codes"])
def test_files_that_hold_no_decoder(what: str, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    path, changed = tmp_path / "vae.npz", dict(tensors)
    if what == "text":
        path.write_text("not a zip")
    elif what == "pickle":
        path.write_bytes(pickle.dumps(changed))
    elif what != "absent":
        changed["decoder.99.weight"] = torch.zeros(1)
        changed.pop({"a key less": "decoder.3.net.4.bias", "no codes": CODES}.get(what, "decoder.99.weight"))
        if what in ("a key more", "another shape"):
            changed["decoder.12.weight" if what == "another shape" else "decoder.14.weight"] = torch.zeros(1, 3, 1, 1)
        write(path, changed)
    with pytest.raises(InputError, match=r"vae.npz"):
        load_mask_decoder(path)


def test_objects_in_a_file_are_not_unpickled(tmp_path: Path) -> None:
    arrays: dict[str, Any] = {CODES: np.array([{"a": 1}], dtype=object)}
    np.savez(tmp_path / "vae.npz", **arrays)
    with pytest.raises(InputError, match="cannot be read"):
        load_mask_decoder(tmp_path / "vae.npz")


def test_scores(file: Path) -> None:
    task, decoder = Masks(decoder=str(file)), load_mask_decoder(file)
    other = Box(0.0, 0.0, 0.25, 0.25, "dog", tuple(range(40, 56)))
    truth = encode_boxes([SEEN, other])
    assert task.points(answer(truth, truth)) == 1
    assert task.points(answer(encode_boxes([other, SEEN]), truth)) == 1, "in any order"
    assert task.points(answer(encode_boxes([SEEN]), truth)) == 0.5
    assert task.points(answer("a cat", truth)) == 0
    box = Box(SEEN.x0, SEEN.y0, SEEN.x1, SEEN.y1)  # all of it for a mask of a part of it
    mask = decoder.on_image(SEEN, 512, 512)
    assert mean_overlap([box], [SEEN], decoder) == pytest.approx(mask.sum() / 256**2)
    asked = answer("", truth).question
    assert task.question(asked) is asked
    assert task.question(answer("", encode_boxes([box])).question) is None
    with pytest.raises(InputError, match="nowhere.npz"):
        Masks(decoder="nowhere.npz").question(asked)
    with pytest.raises(InputError, match="decoder = ''"):
        Masks()


def test_arguments_of_generate(tmp_path: Path) -> None:
    ended = call("generate", tmp_path, "--mask-decoder", tmp_path / "vae.npz")
    assert ended.code == 2 and "--mask-decoder: only --draw reads it" in ended.err
    ended = call("generate", tmp_path, "--draw", tmp_path / "a.png", "--mask-decoder", tmp_path / "vae.npz")
    assert ended.code == 2 and "vae.npz" in ended.err
