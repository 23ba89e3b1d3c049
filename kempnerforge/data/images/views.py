"""From an image to the views that the vision encoder sees, and to their block in a row.

A view is an (H, W, 3) uint8 square of the encoder's size. It is normalised on the device, by the encoder:
each tower has its own numbers.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import PIL
from PIL import Image

from kempnerforge.config.images import GLOBAL_MARKER, OF_ROWS, ImagesConfig, tile_marker
from kempnerforge.data.batching.batch import Part
from kempnerforge.data.images.augment import Change, draw_changes
from kempnerforge.data.images.cache import DiskCache, ImageCache, content_key
from kempnerforge.data.images.decode import ImageError, image_name, image_size, opened
from kempnerforge.data.images.tiling import Frame, Grid, Size, frames_of, grid_of, native_grid, shown_parts
from kempnerforge.data.images.video import MISSING, Video, can_read_videos, moments
from kempnerforge.data.sample import ImageSource
from kempnerforge.data.text.interleave import ImageBlock, Layout
from kempnerforge.data.text.tokenizer import Tokenizer
from kempnerforge.util.errors import InputError

VERSION = 2
"""Of what is done to pixels, for the cache on disk."""


class FrameTexts(NamedTuple):
    """A video: the text before each of its frames."""

    texts: tuple[str, ...]


class InRows(NamedTuple):
    """An image whose tiles are in rows: what is shown of the view of all of it, and of each tile."""

    whole: Part | None
    tiles: tuple[tuple[Part, ...], ...]


Shape = Grid | FrameTexts | InRows
"""What decides the block of an image."""


class Views:
    """Makes views as ``data.images`` says.

    Args:
        layout: size of views, positions that one takes, and the colour around an image.
        cache: in memory; may be shared with others.

    Raises:
        ValueError: ``cfg`` does not go with the encoder's image size, its tokens are not in the tokenizer, or
            its cache cannot be used.
    """

    def __init__(self, cfg: ImagesConfig, layout: Layout, tokenizer: Tokenizer, cache: ImageCache) -> None:
        self.cfg, self.layout, self.tokenizer, self.cache = cfg, layout, tokenizer, cache
        self._blocks: dict[tuple[Shape, int | None], ImageBlock] = {}
        self._markers: dict[str, int] = {}
        self._disk: DiskCache | None = None
        if not layout.image_size:
            return
        cfg.check(layout.image_size, layout.token_side)
        if cfg.fit == "native" and not layout.cell:
            raise InputError(
                "data.images.fit = 'native': needs an encoder that sees a part of its square (vision_encoder.type = 'vit' without"
                " stride and cls_token, a NaFlex 'siglip2' or 'qwen_vl'), an adapter that keeps the grid, and image tokens in the stream"
            )
        if cfg.longer_sides and not layout.any_shape:
            raise InputError("data.images.longer_sides = true: needs a NaFlex 'siglip2', whose positions are for any shape")
        if layout.view_limits is not None:
            most, keys = layout.view_limits[0], "adapter.max_num_frames and max_num_media"
            if layout.image_tokens or cfg.tiled or cfg.frame_times:
                raise InputError(f"{keys}: not with image tokens in the stream, data.images.fit = 'tiles' or frame_times")
            if 0 < most < cfg.frames:
                raise InputError(f"data.images.frames = {cfg.frames}: adapter.max_num_frames = {most}")
        if layout.reads_padding and cfg.frames:
            raise InputError(f"data.images.frames = {cfg.frames}: adapter.pad_embed is for images alone")
        if cfg.frames and not can_read_videos():
            raise InputError(f"data.images.frames = {cfg.frames}: {MISSING}")
        for name in cfg.new_tokens():
            found = tokenizer.token_id(name)
            if found is None:
                raise InputError(f"data.images: the tokenizer has no token {name!r}; add it, or set markers = false")
            self._markers[name] = found
        self._pads = layout.reads_padding and cfg.fit in ("letterbox", "tiles")
        self._fill = tuple(int(255 * value) for value in layout.image_mean) if cfg.padding == "mean" else (0, 0, 0)
        deciding = dataclasses.asdict(cfg) | dict.fromkeys(
            ("augment", "cache_dir", "markers", "rows", *OF_ROWS, "number_images", "around", "frame_times")
        )
        cell = [layout.cell] if cfg.fit == "native" else []
        self._transform = json.dumps([VERSION, PIL.__version__, layout.image_size, self._fill, deciding, *cell], sort_keys=True)
        if cfg.cache_dir:
            self._disk = DiskCache(cfg.cache_dir, self._transform, layout.image_size)

    @property
    def marker_ids(self) -> frozenset[int]:
        """Tokens that are before views."""
        return frozenset(self._markers.values())

    # ---- positions -------------------------------------------------------------------------------

    def blocks(self, images: Sequence[ImageSource]) -> list[ImageBlock]:
        """What the images of a sample are in its row. Their pixels are not decoded, and if views do not
        depend on their size nothing is read.

        Raises:
            ImageError: an image cannot be used, as far as its header shows.
        """
        if not self.layout.image_size:
            return [ImageBlock.of([()], 0)] * len(images)
        if self.layout.view_limits is not None and 0 < self.layout.view_limits[1] < len(images):
            raise ImageError(f"{len(images)} images in a sample, adapter.max_num_media = {self.layout.view_limits[1]}")
        numbered = self.cfg.number_images and len(images) > 1
        blocks = [self._block(self._shape(image), k if numbered else None) for k, image in enumerate(images)]
        return [self._with_contents(*both) for both in zip(blocks, images, strict=True)] if self._pads else blocks

    def _with_contents(self, block: ImageBlock, image: ImageSource) -> ImageBlock:
        side = self.layout.image_size
        frames = frames_of(self.cfg, side, image_size(image), self.layout.cell)
        return block.with_contents([content for frame in frames for content in frame.contents(side)], self.layout.token_side)

    def _shape(self, image: ImageSource) -> Shape:
        if self.cfg.tiled:
            return self._tiles(image_size(image))
        if self.cfg.fit == "native":
            return native_grid(image_size(image), self.layout.image_size, self.layout.cell, self.cfg.longer_sides)
        if not self.cfg.frames:
            return 1, 1
        with opened(image, whole=False) as picture:
            if not isinstance(picture, Video):
                return 1, 1
            times = moments(picture.seconds, self.cfg.frames) if self.cfg.frame_times else ()
        return FrameTexts(tuple(f"<{time:.1f} seconds>" for time in times) or ("",) * self.cfg.frames)

    def _tiles(self, size: Size) -> Grid | InRows:
        grid = grid_of(self.cfg, self.layout.image_size, size)
        if not self.cfg.rows:
            return grid
        side = self.layout.token_side
        tiles = shown_parts(self.cfg, side, size, grid) if self.cfg.shows_tiles(grid) else ()
        return InRows(Part(side, side, alone=False) if self.cfg.global_view else None, tiles)

    def _block(self, shape: Shape, number: int | None) -> ImageBlock:
        """The block of an image with this shape, and with ``number`` in front."""
        block = self._blocks.get((shape, number))
        if block is None:
            markers, around = self._before_views(shape), [self._markers[name] for name in self.cfg.around]
            markers[0] = (*around[:1], *markers[0])
            if number is not None:
                markers[0] = (*self.tokenizer.encode(f"<image: {number}>"), *markers[0])
            if self.layout.view_limits is not None:
                block = ImageBlock.together(len(markers), markers[0])
            elif isinstance(shape, InRows):
                block = ImageBlock.in_rows(shape.whole, shape.tiles, [self._markers[name] for name in self.cfg.row_tokens()], markers[0])
            else:
                parts = (Part(*shape),) if self.cfg.fit == "native" and not isinstance(shape, FrameTexts) else ()
                block = ImageBlock.of(markers, self.layout.image_tokens, parts)
            block = block._replace(ids=(*block.ids, *around[1:]))
            if not isinstance(shape, FrameTexts):  # of which there are as many as videos
                self._blocks[shape, number] = block
        return block

    def _before_views(self, shape: Shape) -> list[tuple[int, ...]]:
        """For each view the tokens that are before it."""
        if isinstance(shape, InRows):
            return [()]
        if isinstance(shape, FrameTexts):
            return [tuple(self.tokenizer.encode(text)) if text else () for text in shape.texts]
        if not self.cfg.tiled:
            return [()]
        names = [GLOBAL_MARKER] if self.cfg.global_view else []
        if self.cfg.shows_tiles(shape):
            names += [tile_marker(row + 1, column + 1) for row in range(shape[0]) for column in range(shape[1])]
        return [(self._markers[name],) if self.cfg.markers else () for name in names]

    # ---- pixels ----------------------------------------------------------------------------------

    def load(self, image: ImageSource, expected: int | None = None, rng: np.random.Generator | None = None) -> list[np.ndarray]:
        """The views of an image, in the order of its block; read-only.

        Args:
            expected: how many the block has.
            rng: draws the changes of ``augment``; None changes nothing. What is changed is not kept in a
                cache.

        Raises:
            ImageError: the image cannot be used, or has changed since its block was made.
        """
        views = self._made(image, draw_changes(self.cfg.augment, rng)) if rng is not None else self._kept(image)
        if expected is not None and len(views) != expected:
            raise ImageError(f"image {image_name(image)}: has changed while it was read")
        return views

    def _kept(self, image: ImageSource) -> list[np.ndarray]:
        """The unchanged views: from memory, from disk, or made."""
        if not self.cache.keeps and self._disk is None:
            return self._made(image, Change())
        data, key = (image, content_key(image)) if isinstance(image, bytes) else (None, self.cache.files.key(image))
        views = self._known(key) if key is not None else None
        if views is None and not isinstance(image, bytes):
            data, key = self.cache.files.read(image)
            views = self._known(key)
        assert key is not None
        if views is None:
            views = self._made(image, Change(), data)
            if self._disk is not None:
                self._disk.write(key, views)
            self.cache.put(key, self._transform, views)
        return views

    def _known(self, key: str) -> list[np.ndarray] | None:
        """The views of the image with this content ``key``, if memory or disk has them."""
        views = self.cache.get(key, self._transform)
        if views is None and self._disk is not None:
            views = self._disk.read(key)
            if views is not None:
                self.cache.put(key, self._transform, views)
        return views

    def _made(self, image: ImageSource, change: Change, data: bytes | None = None) -> list[np.ndarray]:
        side = self.layout.image_size
        with opened(image, data) as picture:
            picture.allow(self.cfg.frames)
            frames = frames_of(self.cfg, side, picture.size, self.layout.cell)
            least = max(frame.content[0] for frame in frames), max(frame.content[1] for frame in frames)
            shown = picture.frames(self.cfg.frames, least)
            views = [view for pixels in shown for frame in frames for view in cut_views(pixels, frame, side, change, self._fill)]
        for view in views:
            view.setflags(write=False)
        return views


def cut_views(image: Image.Image, frame: Frame, side: int, change: Change, fill: tuple[int, ...]) -> list[np.ndarray]:
    """The views of one frame.

    Args:
        image: the whole image in RGB, at any scale.
        change: what is done to the image before it is laid on the canvas.
        fill: colour of the canvas, RGB.

    Returns:
        (side, side, 3) uint8 each.
    """
    if image.size != frame.content or change.box != Change().box:
        image = image.resize(frame.content, Image.Resampling.BICUBIC, box=change.part(image.size))
    image = change.recolour(image)
    if frame.content != frame.canvas or frame.offset != (0, 0):
        canvas = Image.new("RGB", frame.canvas, fill)
        canvas.paste(image, frame.offset)
        image = canvas
    pixels = np.asarray(image)  # (H, W, 3)
    if frame.cell:
        pixels = _one_after_another(pixels, frame.cell, side, fill)
    return [np.ascontiguousarray(pixels[top : top + side, left : left + side]) for left, top in frame.corners]


def _one_after_another(pixels: np.ndarray, cell: int, side: int, fill: tuple[int, ...]) -> np.ndarray:
    """(H, W, 3) -> (side, side, 3): the squares of ``cell`` pixels, row by row, in rows of the view; ``fill`` after
    the last.
    """
    across = side // cell
    cells = pixels.reshape(len(pixels) // cell, cell, -1, cell, 3).swapaxes(1, 2).reshape(-1, cell, cell, 3)
    view = np.empty((across * across, cell, cell, 3), np.uint8)
    view[: len(cells)], view[len(cells) :] = cells, fill
    return view.reshape(across, across, cell, cell, 3).swapaxes(1, 2).reshape(side, side, 3)
