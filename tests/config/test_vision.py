from __future__ import annotations

import pytest

from kempnerforge.config.vision import SiglipConfig, VisionEncoderConfig, ViTConfig


@pytest.mark.parametrize(
    ("size", "patch", "stride", "cls_token", "tokens"),
    [(224, 14, 0, False, 256), (512, 16, 0, False, 1024), (64, 8, 0, False, 64), (64, 8, 4, False, 256), (224, 16, 0, True, 197)],
)
def test_num_tokens(size: int, patch: int, stride: int, cls_token: bool, tokens: int) -> None:
    assert ViTConfig(image_size=size, patch_size=patch, stride=stride, cls_token=cls_token).num_tokens() == tokens


def test_a_tower_knows_its_tokens_only_when_built() -> None:
    assert SiglipConfig(path="somewhere").num_tokens() is None
    assert VisionEncoderConfig().num_tokens() is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_size": 65, "patch_size": 16}, "image_size = 65: must be a multiple of patch_size = 16"),
        ({"image_size": 64, "patch_size": 8, "stride": 3}, "stride = 3"),
        ({"image_size": 64, "patch_size": 8, "stride": 10}, "stride = 10"),
        ({"image_size": 66, "patch_size": 8, "stride": 4}, "multiple of stride = 4"),
        ({"image_size": 0}, "image_size = 0"),
        ({"dim": 100, "n_heads": 3}, "n_heads = 3: must divide dim = 100"),
        ({"feature_layer": 0}, "feature_layer = 0"),
        ({"feature_layer": -7, "n_layers": 6}, "feature_layer = -7"),
        ({"feature_layer": [-2, -7], "n_layers": 6}, r"feature_layer = \[-2, -7\]: there are only n_layers = 6"),
        ({"feature_layer": [-2, 0]}, r"feature_layer = \[-2, 0\]: count from the end"),
        ({"feature_layer": []}, r"feature_layer = \[\]"),
        ({"feature_layer": [-2, -2]}, r"feature_layer = \[-2, -2\]: names a layer twice"),
        ({"std": [1.0, 0.0, 1.0]}, "std"),
        ({"mean": [0.5]}, "mean"),
    ],
)
def test_bad_values(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ViTConfig(**values)


def test_a_tower_needs_a_path() -> None:
    with pytest.raises(ValueError, match="type 'siglip' needs"):
        SiglipConfig()
