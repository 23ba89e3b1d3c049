"""Geometry of views against the published table, the processors of transformers, and cases worked out by hand."""

from __future__ import annotations

import io
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.image_processing_utils import select_best_resolution

from kempnerforge.config.images import ImagesConfig
from kempnerforge.data import Layout, Tokenizer
from kempnerforge.data.images.cache import ImageCache
from kempnerforge.data.images.tiling import (
    Frame,
    best_pinpoint,
    cropped,
    frames_of,
    grid_of,
    grid_tiles,
    letterboxed,
    overlap_grid,
    stretched_grid,
)
from kempnerforge.data.images.views import Views

SIZES = [(64, 48), (48, 64), (50, 50), (17, 90), (90, 17), (33, 32), (7, 5), (200, 120)]


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def views_of(image: Image.Image, side: int, mean: float = 0.0, **cfg: Any) -> list[np.ndarray]:
    buffer = io.BytesIO()
    image.save(buffer, "BMP")
    layout = Layout(1, side, 8, 64, 8, (mean,) * 3)
    markers = {"markers": False} if cfg.get("fit") == "tiles" else {}
    return Views(ImagesConfig(**cfg, **markers), layout, TOKENIZER, ImageCache(0)).load(buffer.getvalue())


TOKENIZER = Tokenizer.train(["."], 300)

# ---- nanoVLM -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "height", "to_max", "grid", "views"),
    [
        (640, 480, True, (3, 4), 13),
        (480, 640, True, (4, 3), 13),
        (512, 512, True, (4, 4), 17),
        (512, 512, False, (1, 1), 1),
        (1920, 1080, True, (3, 4), 13),
        (1080, 1920, True, (4, 3), 13),
        (2000, 300, True, (1, 4), 5),
        (300, 2000, True, (4, 1), 5),
        (300, 2000, False, (4, 1), 5),
        (640, 480, False, (2, 2), 5),
        (513, 512, False, (2, 2), 5),
        (5000, 4000, False, (4, 4), 17),
        (1, 1, False, (1, 1), 1),
        (273, 364, True, (4, 3), 13),  # exactly 3:4, where floating point would round up to four
    ],
)
def test_the_table_of_nanovlm(width: int, height: int, to_max: bool, grid: tuple[int, int], views: int) -> None:
    cfg = ImagesConfig(fit="tiles", resize_to_max_side=to_max)
    assert grid_of(cfg, 512, (width, height)) == grid
    frames = frames_of(cfg, 512, (width, height))
    assert sum(len(frame.corners) for frame in frames) == views
    tokenizer = Tokenizer.train(["."], 300)
    tokenizer.add_tokens(cfg.new_tokens())
    block = Views(cfg, Layout(64, 512, 8, 2048, 8), tokenizer, ImageCache(0))._block(grid, None)
    markers = [i for i in block.ids if i >= 0]
    assert (len(block.starts), len(block.ids) - len(markers), len(markers)) == (views, 64 * views, views)
    names = [tokenizer.backend.id_to_token(i) for i in markers]
    expected = [f"<row_{r + 1}_col_{c + 1}>" for r in range(grid[0]) for c in range(grid[1])] if views > 1 else []
    assert names == ["<|global_image|>", *expected]


@settings(deadline=None, max_examples=300)
@given(st.integers(1, 4000), st.integers(1, 4000), st.sampled_from([(512, 2048), (16, 64), (8, 8), (100, 700)]), st.booleans())
def test_any_size_in_a_grid(width: int, height: int, sides: tuple[int, int], to_max: bool) -> None:
    side, most = sides
    rows, columns = stretched_grid((width, height), side, most, to_max)
    along, across = max(rows, columns), min(rows, columns)
    assert 1 <= across <= along <= most // side
    assert along == most // side if to_max else (along == most // side or along * side >= max(width, height) > (along - 1) * side)
    assert (columns >= rows) if width >= height else (rows >= columns)
    exact = Fraction(min(width, height) * along, max(width, height))  # tiles that the short side covers without stretching
    assert across - 1 < exact <= across


def test_tiles_cover_the_enlarged_image_without_gap() -> None:
    image = picture(50, 30)
    overview, *parts = views_of(image, 16, fit="tiles", max_side=64)
    assert np.array_equal(overview, np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC)))
    assert len(parts) == 12  # 3 rows of 4
    whole = np.concatenate([np.concatenate(parts[row * 4 : row * 4 + 4], axis=1) for row in range(3)], axis=0)
    assert np.array_equal(whole, np.asarray(image.resize((64, 48), Image.Resampling.BICUBIC)))
    assert np.array_equal(overview, views_of(image, 16)[0]), "the global view is the squashed image"


# ---- one view -----------------------------------------------------------------------------------------------------------


def test_crop_and_letterbox_by_hand() -> None:
    assert cropped((64, 48), 24) == Frame((32, 24), (24, 24), (-4, 0))
    assert cropped((48, 64), 24) == Frame((24, 32), (24, 24), (0, -4))
    assert cropped((50, 50), 24) == Frame((24, 24), (24, 24), (0, 0))
    assert letterboxed((64, 48), (24, 24)) == Frame((24, 18), (24, 24), (0, 3))
    assert letterboxed((48, 64), (24, 24)) == Frame((18, 24), (24, 24), (3, 0))
    assert letterboxed((1000, 1), (24, 24)) == Frame((24, 1), (24, 24), (0, 11))
    assert letterboxed((10, 20), (60, 40)) == Frame((20, 40), (60, 40), (20, 0))


def test_crop_keeps_the_middle_and_letterbox_fills_the_rest() -> None:
    pixels = np.zeros((10, 30, 3), dtype=np.uint8)
    pixels[:, 10:20] = (255, 0, 0)
    (middle,) = views_of(Image.fromarray(pixels), 10, fit="crop")
    assert (middle == (255, 0, 0)).all()
    (boxed,) = views_of(Image.fromarray(pixels), 30, mean=0.4815, fit="letterbox")
    assert (boxed[:10] == 122).all() and (boxed[20:] == 122).all()  # int(255 * 0.4815), as LLaVA rounds
    assert np.array_equal(boxed[10:20], pixels)
    (tall,) = views_of(Image.fromarray(pixels.transpose(1, 0, 2)), 30, mean=0.5, fit="letterbox")
    assert (tall[:, :10] == 127).all() and (tall[:, 20:] == 127).all() and np.array_equal(tall[:, 10:20], pixels.transpose(1, 0, 2))


@pytest.mark.parametrize("size", SIZES)
def test_against_the_processors_of_transformers(size: tuple[int, int]) -> None:
    from transformers import CLIPImageProcessorPil, LlavaNextImageProcessorPil, SiglipImageProcessorPil

    raw = {"do_rescale": False, "do_normalize": False}

    def of(processor: Any) -> np.ndarray:
        found = processor(image, return_tensors="np")["pixel_values"]
        return np.asarray(found).reshape(-1, *np.asarray(found).shape[-3:]).transpose(0, 2, 3, 1)

    image = picture(*size)
    squashed = of(SiglipImageProcessorPil(size={"height": 24, "width": 24}, resample=3, **raw))
    assert np.array_equal(views_of(image, 24)[0], squashed[0])
    clip = of(CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}, **raw))
    assert np.array_equal(views_of(image, 24, fit="crop")[0], clip[0])
    pinpoints = [(1, 2), (2, 1), (2, 2), (1, 3), (3, 1)]
    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": 24},
        crop_size={"height": 24, "width": 24},
        image_grid_pinpoints=[[24 * rows, 24 * columns] for rows, columns in pinpoints],
        **raw,
    )
    ours, theirs = views_of(image, 24, fit="tiles", tiling="anyres"), of(processor)
    assert len(ours) == len(theirs) and all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


# ---- LLaVA-NeXT and Molmo -----------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 3000), st.integers(1, 3000))
def test_the_pinpoint_keeps_most_and_wastes_least(width: int, height: int) -> None:
    pinpoints = [(1, 2), (2, 1), (2, 2), (1, 3), (3, 1)]
    rows, columns = best_pinpoint((width, height), 336, pinpoints)

    def kept(grid: tuple[int, int]) -> Fraction:
        scale = min(Fraction(grid[1] * 336, width), Fraction(grid[0] * 336, height))
        return min(scale * width * scale * height, Fraction(width * height))

    rounding = 336 * 3
    assert all(kept(other) <= kept((rows, columns)) + rounding for other in pinpoints)
    assert best_pinpoint((height, width), 336, [(c, r) for r, c in pinpoints]) == (columns, rows)


@pytest.mark.parametrize("size", [(55, 112), (111, 57), (49, 95), (97, 49), (30, 30)])
def test_close_pinpoints_are_chosen_as_by_transformers(size: tuple[int, int]) -> None:
    """In the first four what floating point loses decides."""
    pinpoints = [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]
    height, width = select_best_resolution(size[::-1], [[14 * rows, 14 * columns] for rows, columns in pinpoints])
    assert best_pinpoint(size, 14, pinpoints) == (height // 14, width // 14)


@pytest.mark.parametrize(
    ("size", "grid", "canvas"),
    [
        ((336, 336), (1, 1), (336, 336)),
        ((640, 480), (2, 3), (784, 560)),  # 528 x 368 without margins: 3 x 2 windows of 224 enlarge it by 1.22
        ((2000, 1000), (2, 5), (1232, 560)),  # needs 9 x 4 windows; of 12 at most, 5 x 2 shrink it least
        ((100, 100), (1, 1), (336, 336)),
    ],
)
def test_overlapping_tiles_by_hand(size: tuple[int, int], grid: tuple[int, int], canvas: tuple[int, int]) -> None:
    cfg = ImagesConfig(fit="tiles", tiling="overlap")
    assert overlap_grid(size, 336, cfg.overlap, cfg.max_tiles) == grid
    frame = grid_tiles(cfg, 336, size, grid)
    assert frame.canvas == canvas
    assert frame.corners == tuple((224 * column, 224 * row) for row in range(grid[0]) for column in range(grid[1]))
    overview = frames_of(cfg, 336, size)[0]
    assert overview.canvas == (336, 336) and overview == letterboxed(size, (336, 336))


def test_overlapping_tiles_share_pixels() -> None:
    image = picture(64, 48)
    overview, *parts = views_of(image, 24, fit="tiles", tiling="overlap")
    rows, columns = overlap_grid((64, 48), 24, 1 / 3, 12)
    assert len(parts) == rows * columns > 2
    assert np.array_equal(parts[0][:, 16:], parts[1][:, :8]) and np.array_equal(parts[0][16:], parts[columns][:8])
    assert np.array_equal(overview, views_of(image, 24, fit="letterbox")[0])


def test_a_single_tile_beside_the_global_view() -> None:
    """In Molmo a small image is a low-resolution crop and one crop; both are the same pixels."""
    small = picture(20, 20)
    assert len(views_of(small, 24, fit="tiles", tiling="overlap")) == 1
    overview, tile = views_of(small, 24, fit="tiles", tiling="overlap", single_tile=True)
    assert np.array_equal(overview, tile)
    assert len(views_of(picture(64, 48), 24, fit="tiles", tiling="overlap", single_tile=True)) == len(
        views_of(picture(64, 48), 24, fit="tiles", tiling="overlap")
    )


@settings(deadline=None, max_examples=150)
@given(
    st.integers(1, 120),
    st.integers(1, 120),
    st.sampled_from(
        [
            {"fit": "tiles", "max_side": 32},
            {"fit": "tiles", "max_side": 32, "resize_to_max_side": False},
            {"fit": "tiles", "max_side": 32, "global_view": False},
            {"fit": "tiles", "tiling": "anyres"},
            {"fit": "tiles", "tiling": "overlap", "max_tiles": 6},
            {"fit": "crop"},
            {"fit": "letterbox"},
        ]
    ),
)
def test_views_lie_on_their_canvas(width: int, height: int, cfg: dict[str, Any]) -> None:
    made = ImagesConfig(**cfg)
    for frame in frames_of(made, 8, (width, height)):
        assert min(frame.content) >= 1 and min(frame.canvas) >= 8
        for left, top in frame.corners:
            assert 0 <= left <= frame.canvas[0] - 8 and 0 <= top <= frame.canvas[1] - 8
        right, bottom = (offset + content for offset, content in zip(frame.offset, frame.content, strict=True))
        assert right > 0 and bottom > 0 and frame.offset[0] < frame.canvas[0] and frame.offset[1] < frame.canvas[1]
    views = views_of(picture(width, height), 8, **cfg)
    assert all(view.shape == (8, 8, 3) and view.dtype == np.uint8 for view in views)
