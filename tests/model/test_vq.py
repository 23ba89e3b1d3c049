"""Pictures as tokens: the tokenizer, its loss, and its folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kempnerforge.model.vq import VQVAE, ClassifierConfig, PictureClassifier, VQConfig, scaled

SMALL = VQConfig(image_size=8, codes=5, code_dim=4, width=8)


def some(count: int, side: int = 8) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8))


def test_codes_are_the_nearest_and_the_loss_is_eq_3() -> None:
    torch.manual_seed(0)
    codec, pictures = VQVAE(SMALL), scaled(some(3))
    out = codec(pictures)
    features = codec.encoder(pictures).permute(0, 2, 3, 1)  # (N, G, G, E)
    distance = (features[..., None, :] - codec.codebook).square().sum(-1)
    assert torch.equal(out.codes, distance.argmin(-1).flatten(1))
    chosen = codec.codebook[out.codes].unflatten(1, (2, 2))
    want = (out.pictures - pictures).square().mean() + 1.25 * (chosen - features).square().mean()
    torch.testing.assert_close(out.loss, want)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in codec.parameters()), "the encoder learns through the codes"


def test_what_is_encoded_is_what_training_sees() -> None:
    codec, pictures = VQVAE(SMALL).eval(), some(3)
    codes = codec.encode(pictures)
    assert [len(one) for one in codes] == [SMALL.tokens] * 3
    with torch.no_grad():
        out = codec(scaled(pictures))
    assert out.codes.tolist() == codes
    decoded = codec.decode(codes)
    assert decoded.shape == (3, 8, 8, 3) and decoded.dtype == np.uint8
    np.testing.assert_allclose(decoded, ((out.pictures.permute(0, 2, 3, 1) + 1) * 127.5).clamp(0, 255), atol=0.51)


def test_a_folder_is_read_strictly(tmp_path: Path) -> None:
    codec, pictures = VQVAE(SMALL), some(2)
    codec.save(tmp_path / "codec")
    assert VQVAE.load(tmp_path / "codec", "data.codec").encode(pictures) == codec.encode(pictures)
    judge = PictureClassifier(ClassifierConfig(["a", "b"], image_size=8, width=4))
    judge.save(tmp_path / "judge")
    assert PictureClassifier.load(tmp_path / "judge", "key").name(pictures) == judge.name(pictures)
    with pytest.raises(ValueError, match=r"data.codec = '.*judge'|classes"):
        VQVAE.load(tmp_path / "judge", "data.codec")
    with pytest.raises(ValueError, match="data.codec = 'none': no folder with config.json"):
        VQVAE.load("none", "data.codec")
    weights = tmp_path / "codec" / "model.safetensors"
    tensors = load_file(weights)
    save_file({name: value for name, value in tensors.items() if name != "codebook"}, weights)
    with pytest.raises(ValueError, match="codebook"):
        VQVAE.load(tmp_path / "codec", "data.codec")
    with pytest.raises(ValueError, match="image_size = 10: must be a multiple of 4"):
        VQConfig(image_size=10)
    with pytest.raises(ValueError, match="needs two or more"):
        ClassifierConfig(["a", "a"])
