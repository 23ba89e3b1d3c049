"""EfficientNet-Lite0 against the network that its weights were published with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from efficientnet_lite_pytorch import EfficientNet
from safetensors.torch import save_file

from kempnerforge.config.vision import EfficientNetLite0Config
from kempnerforge.model.efficientnet import EfficientNetLite0, published_names
from kempnerforge.model.vision import build_vision_encoder


@pytest.fixture(scope="module")
def published() -> EfficientNet:
    """With batch normalisation that does something."""
    torch.manual_seed(0)
    model = EfficientNet.from_name("efficientnet-lite0")
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, std=0.2)
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def file(published: EfficientNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lite0") / "efficientnet-lite0.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in published.state_dict().items()}, path)
    return path


@pytest.mark.parametrize("size", [224, 64])
def test_features_are_those_of_the_published_network(published: EfficientNet, file: Path, size: int) -> None:
    encoder = build_vision_encoder(EfficientNetLite0Config(path=str(file), image_size=size))
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    with torch.no_grad():
        theirs = published.extract_features((images.float() - 127) / 128)  # (N, 1280, H / 32, H / 32)
        ours = encoder(images)
    assert ours.shape == (2, (size // 32) ** 2, 1280) and encoder.num_tokens == (size // 32) ** 2
    torch.testing.assert_close(ours, theirs.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-4)
    assert ours.std() > 0.1  # the comparison is one of numbers, not of zeros


def test_all_that_it_has_is_parameters_and_all_of_them_learn(file: Path) -> None:
    encoder = EfficientNetLite0(EfficientNetLite0Config(path=str(file), image_size=64))
    encoder(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)).sum().backward()
    assert encoder.state_dict().keys() == dict(encoder.named_parameters()).keys()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in encoder.parameters())
    assert encoder(torch.zeros(0, 3, 64, 64, dtype=torch.uint8)).shape == (0, 4, 1280)
    assert sum(p.numel() for p in encoder.parameters()) == 3_350_000


def test_training_mode_changes_nothing(file: Path) -> None:
    encoder = EfficientNetLite0(EfficientNetLite0Config(path=str(file), image_size=64))
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    assert torch.equal(encoder.train()(images), encoder.eval()(images))


def test_without_weights() -> None:
    encoder = EfficientNetLite0(EfficientNetLite0Config(pretrained=False, image_size=64))
    assert encoder(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).shape == (1, 4, 1280)
    with torch.device("meta"):
        assert EfficientNetLite0(EfficientNetLite0Config(path="not/read.safetensors")).num_tokens == 49


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("_bn1.bias"), "is no EfficientNet-Lite0; _bn1.bias missing or unknown"),
        (lambda t: t.update(_se=torch.zeros(1)), "is no EfficientNet-Lite0; _se missing or unknown"),
        (lambda t: t.update({"_conv_head.weight": torch.zeros(8, 320, 1, 1)}), r"_conv_head.weight is \(8, 320, 1, 1\), not \(1280, 320, 1, 1\)"),
    ],
)  # fmt: skip
def test_other_weights_are_named(published: EfficientNet, tmp_path: Path, change: object, message: str) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in published.state_dict().items()}
    change(tensors)  # pyright: ignore[reportCallIssue]
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=message):
        EfficientNetLite0(EfficientNetLite0Config(path=str(tmp_path / "x.safetensors")))


def test_no_file(tmp_path: Path) -> None:
    (tmp_path / "torn.safetensors").write_bytes(b"\0" * 20)
    for name in ("none.safetensors", "torn.safetensors"):
        with pytest.raises(ValueError, match=f"{name}.*cannot be read.*kempnerforge data fetch efficientnet-lite0"):
            EfficientNetLite0(EfficientNetLite0Config(path=str(tmp_path / name)))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "path = ''"),
        ({"path": "x", "pretrained": False}, "path = 'x': pretrained = false reads no file"),
        ({"path": "x", "image_size": 100}, "image_size = 100: must be a multiple of 32"),
        ({"path": "x", "feature_layer": -2}, "feature_layer = -2"),
        ({"path": "x", "std": [1.0, 0.0, 1.0]}, "std above 0"),
    ],
)
def test_settings(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EfficientNetLite0Config(**keys)  # pyright: ignore[reportArgumentType]


def test_names_are_all_different() -> None:
    convolutions = [conv for conv, _ in published_names().values()]
    assert len(convolutions) == len(set(convolutions)) == 49
