"""Geometry of views: which part of which enlargement of an image each of them shows. No pixels here; what
decides is computed in whole numbers, except where a published rule does otherwise.

All sizes are (width, height) in pixels, all grids (rows, columns). A view is a square of ``side`` pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from kempnerforge.config.images import ImagesConfig
from kempnerforge.data.batching.batch import Part

Size = tuple[int, int]
Grid = tuple[int, int]


class Frame(NamedTuple):
    """A canvas with the image on it, and the views that are cut from it.

    Attributes:
        content: size to which the whole image is resized.
        canvas: what it is laid on.
        offset: where its left upper corner comes to lie; below 0, a part of it is lost.
        corners: left upper corners of the views on the canvas, row by row.
        cell: if not 0, squares of so many pixels of the canvas, row by row, are one after the other in rows of
            a single view, which the canvas may be wider or higher than.
    """

    content: Size
    canvas: Size
    offset: Size = (0, 0)
    corners: tuple[Size, ...] = ((0, 0),)
    cell: int = 0

    def contents(self, side: int) -> list[tuple[int, int, int, int]]:
        """What each view shows of the image: its first row and column, and those after the last ones."""
        left, top = self.offset
        right, bottom = left + self.content[0], top + self.content[1]
        inside = lambda at, corner: min(side, max(0, at - corner))
        return [(inside(top, y), inside(left, x), inside(bottom, y), inside(right, x)) for x, y in self.corners]


def grid_of(cfg: ImagesConfig, side: int, size: Size) -> Grid:
    """The grid of tiles of an image with ``data.images.fit = "tiles"``."""
    if cfg.tiling == "grid":
        return stretched_grid(size, side, cfg.max_side, cfg.resize_to_max_side)
    if cfg.tiling == "anyres":
        return best_pinpoint(size, side, cfg.pinpoints)
    return overlap_grid(size, side, cfg.overlap, cfg.max_tiles)


def frames_of(cfg: ImagesConfig, side: int, size: Size, cell: int = 0) -> list[Frame]:
    """The frames of an image, in the order of its views; ``cell`` as of ``native_grid``."""
    if cfg.fit == "native":
        rows, columns = native_grid(size, side, cell, cfg.longer_sides)
        content = columns * cell, rows * cell
        return [Frame(content, content, cell=cell) if max(content) > side else Frame(content, (side, side))]
    if cfg.fit == "squash":
        return [Frame((side, side), (side, side))]
    if cfg.fit == "crop":
        return [cropped(size, side)]
    if cfg.fit == "letterbox":
        return [letterboxed(size, (side, side))]
    grid = grid_of(cfg, side, size)
    overview = letterboxed(size, (side, side)) if cfg.tiling == "overlap" else Frame((side, side), (side, side))
    tiles = [grid_tiles(cfg, side, size, grid)] if cfg.shows_tiles(grid) else []
    return [overview, *tiles] if cfg.global_view else tiles


def grid_tiles(cfg: ImagesConfig, side: int, size: Size, grid: Grid) -> Frame:
    """The tiles of ``grid``: over the stretched image, or over the one that is fitted into them."""
    step = side if cfg.tiling != "overlap" else window(side, cfg.overlap)
    corners = tuple((column * step, row * step) for row in range(grid[0]) for column in range(grid[1]))
    canvas = (grid[1] - 1) * step + side, (grid[0] - 1) * step + side
    frame = Frame(canvas, canvas) if cfg.tiling == "grid" else letterboxed(size, canvas)
    return frame._replace(corners=corners)


# ---- one view ------------------------------------------------------------------------------------


def cropped(size: Size, side: int) -> Frame:
    """The short side becomes ``side``; the middle is kept (as CLIP's processor does it)."""
    short = min(size)
    content = side * size[0] // short, side * size[1] // short
    return Frame(content, (side, side), (-((content[0] - side) // 2), -((content[1] - side) // 2)))


def letterboxed(size: Size, canvas: Size) -> Frame:
    """The image with its shape kept, as large as ``canvas`` lets it be, in the middle (LLaVA-NeXT rounds up
    as here).
    """
    if canvas[0] * size[1] < canvas[1] * size[0]:  # the width decides
        content = canvas[0], min(canvas[1], -(-size[1] * canvas[0] // size[0]))
    else:
        content = min(canvas[0], -(-size[0] * canvas[1] // size[1])), canvas[1]
    return Frame(content, canvas, ((canvas[0] - content[0]) // 2, (canvas[1] - content[1]) // 2))


def native_grid(size: Size, side: int, cell: int, longer: bool = False) -> Grid:
    """Rows and columns of tokens of an image that keeps its shape: at its own size, or as large as the view
    lets it be; each side is rounded to ``cell`` pixels.

    Args:
        longer: the view limits the number of tokens, not each side.
    """
    if longer:
        most, scale = (side // cell) ** 2, min(1.0, side / math.sqrt(size[0] * size[1]))
        short = min(most, max(1, round(min(size) * scale / cell)))
        long = min(most // short, max(1, round(max(size) * scale / cell)))
        return (short, long) if size[0] >= size[1] else (long, short)
    scale = min(1.0, side / max(size))
    width, height = (min(side // cell, max(1, round(length * scale / cell))) for length in size)
    return height, width


# ---- tokens ----------------------------------------------------------------------------------------


def shown_parts(cfg: ImagesConfig, side: int, size: Size, grid: Grid) -> tuple[tuple[Part, ...], ...]:
    """What is in the stream of each tile of ``grid``, row by row, with ``data.images.rows``. Of "anyres" all but
    the padding of the fitted image, by the rule of LLaVA-NeXT's ``unpad_image``; of "overlap" each tile up to the
    middle of what it has in common with the next one (Molmo).

    Args:
        side: tokens along a side of a tile.
    """
    along = [_shown_of_overlap(cfg, side, count) for count in grid]
    if cfg.tiling == "anyres":
        width, height = side * grid[1], side * grid[0]
        if size[0] * height > size[1] * width:  # it is as wide as the tiles
            cut, across = (height - int(round(size[1] * (width / size[0]), 7))) // 2, 0
        else:
            cut, across = 0, (width - int(round(size[0] * (height / size[1]), 7))) // 2
        along = [_shown_without(side, count, margin) for count, margin in zip(grid, (cut, across), strict=True)]
    rows, columns = along
    return tuple(tuple(Part(h, w, top, left, alone=False) for left, w in columns) for top, h in rows)


def _shown_without(side: int, tiles: int, margin: int) -> list[tuple[int, int]]:
    """(first, number) of the tokens of each of ``tiles`` in one direction, ``margin`` of them left out at both
    ends of all.
    """
    shown = [(max(0, margin - k * side), min(side, tiles * side - margin - k * side)) for k in range(tiles)]
    return [(first, max(0, last - first)) for first, last in shown]


def _shown_of_overlap(cfg: ImagesConfig, side: int, tiles: int) -> list[tuple[int, int]]:
    half = round(side * cfg.overlap) // 2
    shown = [(half if k else 0, side - (half if k < tiles - 1 else 0)) for k in range(tiles)]
    return [(first, last - first) for first, last in shown]


# ---- grids ---------------------------------------------------------------------------------------


def stretched_grid(size: Size, side: int, max_side: int, resize_to_max_side: bool) -> Grid:
    """nanoVLM: the long side a multiple of ``side`` up to ``max_side``, the short one as many tiles as the
    image's shape needs, rounded up.
    """
    long, short = max(size), min(size)
    along = max_side // side if resize_to_max_side else min(max_side // side, -(-long // side))
    across = -(-short * along // long)
    return (across, along) if size[0] >= size[1] else (along, across)


def best_pinpoint(size: Size, side: int, pinpoints: Sequence[Grid]) -> Grid:
    """LLaVA-NeXT (Liu et al. 2024): the grid that keeps most of the image's pixels, and of several the one
    that wastes fewest.
    """

    def merit(grid: Grid) -> tuple[int, int]:
        width, height = grid[1] * side, grid[0] * side
        scale = min(width / size[0], height / size[1])  # NOTE: no whole numbers, as its rounding decides between close grids
        kept = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return kept, kept - width * height

    return max(((int(rows), int(columns)) for rows, columns in pinpoints), key=merit)


def window(side: int, overlap: float) -> int:
    """Pixels from one overlapping tile to the next."""
    return side - round(side * overlap)


def overlap_grid(size: Size, side: int, overlap: float, max_tiles: int) -> Grid:
    """Molmo (Deitke et al. 2024, section 2): the grid that enlarges the image least, or, if all are too small
    for it, shrinks it least.
    """
    step = window(side, overlap)
    margin = side - step
    width, height = max(1, size[0] - margin), max(1, size[1] - margin)
    numbers = range(1, max_tiles + 1)
    grids = sorted(((r, c) for r in numbers for c in numbers if r * c <= max_tiles), key=lambda grid: (grid[0] * grid[1], grid[0]))

    def scale(grid: Grid) -> float:
        return min(grid[0] * step / height, grid[1] * step / width)

    enlarging = [grid for grid in grids if scale(grid) >= 1]
    return min(enlarging, key=scale) if enlarging else max(grids, key=scale)
