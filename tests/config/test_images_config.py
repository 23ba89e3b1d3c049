"""``[data.images]``: what is refused, and which tokens it needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kempnerforge.config import ConfigError, load_config, to_toml
from kempnerforge.config.images import AugmentConfig, ImagesConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fit": "stretch"}, "fit = 'stretch': allowed are 'squash', 'crop', 'letterbox', 'native', 'tiles'"),
        ({"fit": "tiles", "tiling": "molmo"}, "tiling = 'molmo': allowed are"),
        ({"max_side": 1024}, "max_side = 1024: only fit = 'tiles' reads it"),
        ({"fit": "crop", "tiling": "anyres"}, "tiling = 'anyres': only fit = 'tiles' reads it"),
        ({"fit": "letterbox", "markers": False}, "markers = False: only fit = 'tiles' reads it"),
        ({"fit": "tiles", "max_tiles": 6}, "max_tiles = 6: only tiling = 'overlap' reads it"),
        ({"fit": "tiles", "markers": False, "marker_grid": 4}, "marker_grid = 4: only markers = true reads it"),
        ({"fit": "tiles", "tiling": "anyres", "max_side": 64}, "max_side = 64: only tiling = 'grid' reads it"),
        ({"fit": "tiles", "tiling": "anyres", "pinpoints": []}, "pinpoints = "),
        ({"fit": "tiles", "tiling": "anyres", "pinpoints": [(0, 2)]}, "pinpoints = "),
        ({"fit": "tiles", "tiling": "overlap", "overlap": 0.6}, "overlap = 0.6: must be between 0 and 0.5"),
        ({"fit": "tiles", "single_tile": True}, "single_tile = True: only tiling = 'overlap' reads it"),
        (
            {"fit": "tiles", "tiling": "overlap", "global_view": False, "single_tile": True},
            "single_tile = True: only global_view = true reads it",
        ),
        ({"fit": "tiles", "max_side": 0}, "max_side = 0: must be >= 1"),
    ],
)
def test_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        ImagesConfig(**settings)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"flip": 1.5}, "flip = 1.5"),
        ({"crop_scale": 0.0}, "crop_scale = 0.0: must be more than 0"),
        ({"crop_ratio": 0.5}, "crop_ratio = 0.5: must be >= 1"),
        ({"crop_ratio": 2.0}, "crop_ratio = 2.0: only crop_scale < 1 reads it"),
        ({"contrast": -0.1}, "contrast = -0.1"),
    ],
)
def test_refused_changes(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        AugmentConfig(**settings)
    assert str(error.value).startswith(message)


def test_nothing_is_changed_by_default() -> None:
    assert not ImagesConfig().augment.enabled
    assert all(AugmentConfig(**{key: 0.5}).enabled for key in ("flip", "crop_scale", "brightness", "contrast", "saturation"))


def test_tokens() -> None:
    found = ImagesConfig(fit="tiles").new_tokens()
    assert len(found) == 65  # nanoVLM's 66 but for <|image|>, which no position of ours needs
    assert found[:3] == ["<|global_image|>", "<row_1_col_1>", "<row_1_col_2>"]
    assert (found[8], found[9], found[-1]) == ("<row_1_col_8>", "<row_2_col_1>", "<row_8_col_8>")
    assert ImagesConfig(fit="tiles", global_view=False, marker_grid=2, max_side=64).new_tokens() == [
        *("<row_1_col_1>", "<row_1_col_2>", "<row_2_col_1>", "<row_2_col_2>")
    ]
    anyres = ImagesConfig(fit="tiles", tiling="anyres", pinpoints=[(1, 3), (2, 2)]).new_tokens()
    assert anyres[1:] == ["<row_1_col_1>", "<row_1_col_2>", "<row_1_col_3>", "<row_2_col_1>", "<row_2_col_2>"]
    overlap = ImagesConfig(fit="tiles", tiling="overlap", max_tiles=3).new_tokens()
    assert overlap[1:] == ["<row_1_col_1>", "<row_1_col_2>", "<row_1_col_3>", "<row_2_col_1>", "<row_3_col_1>"]
    for plain in (ImagesConfig(), ImagesConfig(fit="letterbox"), ImagesConfig(fit="tiles", markers=False)):
        assert plain.new_tokens() == [] and not plain.has_markers


def test_tiles_must_fill_the_long_side() -> None:
    ImagesConfig(fit="tiles").check(512)
    ImagesConfig().check(500)
    ImagesConfig(fit="tiles", tiling="anyres").check(500)
    with pytest.raises(
        ValueError, match=r"data.images.max_side = 2048: must be a multiple of the vision encoder's 384 pixels, such as 1920"
    ):
        ImagesConfig(fit="tiles").check(384)
    with pytest.raises(ValueError, match=r"that is 16 rows, and there are markers for marker_grid = 8"):
        ImagesConfig(fit="tiles").check(128)
    ImagesConfig(fit="tiles", markers=False).check(128)
    ImagesConfig(fit="tiles", marker_grid=16).check(128)


TOML = """
[data]
source = "jsonl"
path = "rows.jsonl"
[data.images]
fit = "tiles"
tiling = "anyres"
pinpoints = [[1, 2], [2, 1]]
[data.images.augment]
flip = 0.5
[vlm]
arch = "joint_decoder"
[train]
max_steps = 1
seq_len = 1024
[model]
max_seq_len = 1024
"""


def test_from_toml_and_back(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(TOML)
    job = load_config(tmp_path / "job.toml")
    assert job.data.images == ImagesConfig(fit="tiles", tiling="anyres", pinpoints=[(1, 2), (2, 1)], augment=AugmentConfig(flip=0.5))
    (tmp_path / "again.toml").write_text(to_toml(job))
    assert load_config(tmp_path / "again.toml") == job
    (tmp_path / "job.toml").write_text(TOML.replace("flip", "flips").replace("[[1, 2]", "[[1, 2, 3]"))
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "job.toml")
    assert "[data] images.augment.flips" in str(error.value) and "[data] images.pinpoints[0]" in str(error.value)
