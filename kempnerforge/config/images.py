"""``[data.images]``: how the images of a source become views, which are squares of the encoder's size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

from kempnerforge.config.checks import at_least, at_most, fraction, one_of, only_if
from kempnerforge.util.errors import InputError
from kempnerforge.util.paths import PathText

GLOBAL_MARKER = "<|global_image|>"
"""The token before the view of a whole image (nanoVLM's name)."""
NEWLINE = "<image_newline>"
"""The token at the end of a row of tokens of tiles (LLaVA-NeXT), unless the config names another."""
MOST_TILES = 256
"""In a row, in a column and of an image: markers are tokens."""
_OF_TILES = ("tiling", "global_view", "markers", "rows")
OF_ROWS = ("row_token", "start_token", "end_token")
_OF_TILING = {
    "grid": ("max_side", "resize_to_max_side", "marker_grid"),
    "anyres": ("pinpoints",),
    "overlap": ("max_tiles", "overlap", "single_tile"),
}
"""Keys that only ``fit = "tiles"`` reads, those that only ``rows`` does, and those that only one ``tiling`` does."""


def tile_marker(row: int, column: int) -> str:
    """The token before the tile in this row and column, counted from 1 (nanoVLM's names)."""
    return f"<row_{row}_col_{column}>"


@dataclass
class AugmentConfig:
    """Random changes to the images that are trained on; those that are evaluated stay as they are.

    They are drawn from ``train.seed``, the step and the sample: the same with any number of workers and
    processes, and after a restart. All are off by default. A mirrored image makes a wrong sample of "left
    of"; a cropped one may have lost what the text speaks of.

    Attributes:
        flip: probability of mirroring left and right.
        crop_scale: a part of the image with at least this share of its area is taken for the whole (Szegedy
            et al. 2015); 1 takes all.
        crop_ratio: the part's aspect ratio is the image's times a factor between ``1 / crop_ratio`` and
            ``crop_ratio``.
        brightness, contrast, saturation: each is multiplied by a factor between ``1 - x`` and ``1 + x``.
    """

    flip: float = 0.0
    crop_scale: float = 1.0
    crop_ratio: float = 4 / 3
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0

    @property
    def enabled(self) -> bool:
        """Whether any image is changed."""
        return self.crop_scale < 1 or max(self.flip, self.brightness, self.contrast, self.saturation) > 0

    def __post_init__(self) -> None:
        fraction(self, "flip", "crop_scale", "brightness", "contrast", "saturation")
        at_least(self, 1, "crop_ratio")
        if not self.crop_scale:
            raise InputError("crop_scale = 0.0: must be more than 0")
        only_if(self, self.crop_scale < 1, "crop_scale < 1", "crop_ratio")


@dataclass
class ImagesConfig:
    """From an image to views. A view is a square of the vision encoder's size, and takes the image tokens of
    one.

    Attributes:
        fit: "squash" (the image becomes one square, its shape is not kept), "crop" (the short side fits, the
            middle is taken), "letterbox" (the long side fits, the rest is filled with the mean colour of the
            encoder's normalisation; LLaVA's pad-to-square), "native" (it keeps its shape, and its size if the
            encoder's square has room for it, both rounded to whole tokens; only these tokens are in the
            stream: Qwen2-VL, NaViT), or "tiles" (several views: one of the whole image
            and a grid of tiles from an enlarged one).
        longer_sides: of "native", with a NaFlex encoder: the image may have as many tokens as the square, in
            any shape, 8 x 32 instead of 16 x 16 (SigLIP 2).
        tiling: of "tiles". "grid" (nanoVLM): the image is stretched so that both sides are multiples of a
            tile. "anyres" (LLaVA-NeXT, its "flat" form): it is fitted, padded, into the best of
            ``pinpoints``. "overlap" (Molmo's crops, each of them whole): it is fitted into overlapping tiles.
            An image of a single tile has the global view alone, if there is one.
        max_side: of "grid": the long side in pixels at most; a multiple of the encoder's size.
        resize_to_max_side: of "grid": enlarge all images to ``max_side``; otherwise the long side is rounded
            up to a multiple of a tile.
        marker_grid: of "grid": there are markers for so many rows and columns.
        pinpoints: of "anyres": grids to choose from, (rows, columns).
        max_tiles: of "overlap": tiles of an image at most, without the global view.
        overlap: of "overlap": the share of a tile's side that it has in common with the next one (Molmo: 112
            of 336 pixels).
        single_tile: of "overlap", with ``global_view``: an image of a single tile has this tile as well
            (Molmo).
        global_view: of "tiles": the whole image comes first, as one view.
        markers: of "tiles": a token before each view says which one it is; these tokens are added to the
            tokenizer. Without them the views follow one another.
        rows: of "anyres" and "overlap", without ``markers``: the tiles' tokens are in rows across the image, a
            learned token at the end of each. Padding of "anyres" is left out (LLaVA-NeXT's "spatial_unpad"); of
            "overlap" each tile is shown up to the middle of what it shares with the next one (Molmo).
        row_token: that token.
        start_token, end_token: of ``rows``, both or none: tokens before and after the view of the whole image,
            whose rows then end with ``row_token``, too, and before and after the tiles (Molmo).
        padding: of "letterbox" and "tiles": the colour around an image that is fitted: "mean" of the encoder's
            normalisation, or "black" (LLaVA-NeXT, Molmo).
        frames: of a video (MP4, MOV, WebM, Matroska or AVI; extra ``video``) how many frames are taken: those
            in the middle of as many equal parts. Each is a view like an image. 0: videos are refused. Not
            with "native" and "tiles".
        frame_times: before each frame its time as text, "<1.5 seconds>" (Qwen3-VL).
        number_images: with several images in a sample, each begins with its number from 0 as text, "<image:
            0>" (nanoVLM).
        around: two tokens, by name: one before and one after each image, with all of its views
            (["<|vision_start|>", "<|vision_end|>"]: Qwen-VL); empty: none.
        augment: random changes in training.
        cache_dir: a directory where the views of every image are kept, uncompressed, for later epochs and
            runs; empty keeps none. Images that ``augment`` changes are not kept. Several processes may share
            it.
    """

    fit: str = "squash"
    longer_sides: bool = False
    tiling: str = "grid"
    max_side: int = 2048
    resize_to_max_side: bool = True
    marker_grid: int = 8
    pinpoints: list[tuple[int, int]] = field(default_factory=lambda: [(1, 2), (2, 1), (2, 2), (1, 3), (3, 1)])
    max_tiles: int = 12
    overlap: float = 1 / 3
    single_tile: bool = False
    global_view: bool = True
    markers: bool = True
    rows: bool = False
    row_token: str = NEWLINE
    start_token: str = ""
    end_token: str = ""
    padding: str = "mean"
    frames: int = 0
    frame_times: bool = False
    number_images: bool = False
    around: list[str] = field(default_factory=list)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    cache_dir: PathText = ""

    def __post_init__(self) -> None:
        one_of(self, "fit", ("squash", "crop", "letterbox", "native", "tiles"))
        one_of(self, "tiling", ("grid", "anyres", "overlap"))
        at_least(self, 1, "max_side", "marker_grid", "max_tiles")
        at_least(self, 0, "frames")
        at_most(self, MOST_TILES, "frames")
        at_most(self, 1 << 16, "max_side")
        if len(self.around) not in (0, 2) or not all(self.around):
            raise InputError(f"around = {self.around}: must be the names of two tokens, or empty")
        at_most(self, MOST_TILES, "marker_grid", "max_tiles")
        if not 0 <= self.overlap <= 0.5:
            raise InputError(f"overlap = {self.overlap}: must be between 0 and 0.5")
        if not self.pinpoints or not all(1 <= side <= MOST_TILES for grid in self.pinpoints for side in grid):
            raise InputError(f"pinpoints = {self.pinpoints}: needs grids of at least 1 row and 1 column, and at most {MOST_TILES}")
        only_if(self, self.fit == "tiles", "fit = 'tiles'", *_OF_TILES, *chain(*_OF_TILING.values()))
        for tiling, keys in _OF_TILING.items():
            only_if(self, self.tiling == tiling, f"tiling = {tiling!r}", *keys)
        one_of(self, "padding", ("mean", "black"))
        only_if(self, self.fit in ("letterbox", "tiles"), "fit = 'letterbox' or 'tiles'", "padding")
        only_if(self, self.fit not in ("native", "tiles"), "fit other than 'native' and 'tiles'", "frames")
        only_if(self, self.fit == "native", "fit = 'native'", "longer_sides")
        only_if(self, self.frames, "frames", "frame_times")
        only_if(self, self.markers, "markers = true", "marker_grid")
        if self.rows and (self.markers or self.tiling == "grid"):
            given = "markers = true" if self.markers else f"tiling = {self.tiling!r}"
            raise InputError(f"rows = true: needs tiling = 'anyres' or 'overlap' with markers = false, not {given}")
        only_if(self, self.rows, "rows = true", *OF_ROWS)
        names = self.row_tokens()
        if not self.row_token or len(names) == 2 or len({*names}) < len(names):
            given = ", ".join(f"{key} = {getattr(self, key)!r}" for key in OF_ROWS)
            raise InputError(f"{given}: needs a row_token, and both or none of the others, with different names")
        only_if(self, self.global_view, "global_view = true", "single_tile")

    @property
    def has_markers(self) -> bool:
        """Whether every image ends with a view that has a marker token before it."""
        return self.fit == "tiles" and self.markers

    @property
    def tiled(self) -> bool:
        """Whether the views of an image depend on its size."""
        return self.fit == "tiles"

    @property
    def in_parts(self) -> bool:
        """Whether a part of the tokens of a view may be in the stream (``Batch.image_parts``)."""
        return self.rows or self.fit == "native"

    @property
    def several(self) -> bool:
        """Whether an image may be several views."""
        return self.tiled or self.frames > 1

    def shows_tiles(self, grid: tuple[int, int]) -> bool:
        """Whether an image with this grid of tiles has views of them; otherwise it is the global view alone."""
        return grid != (1, 1) or self.single_tile or not self.global_view

    def new_tokens(self) -> list[str]:
        """The tokens that the tokenizer must have for this section: ``around``; the token of the global view,
        then the tokens of tiles, row by row; or the tokens of ``rows``.
        """
        if self.rows:
            return [*self.around, *self.row_tokens()]
        if not self.has_markers:
            return self.around
        return [*self.around, *([GLOBAL_MARKER] if self.global_view else []), *(tile_marker(row, column) for row, column in self._cells())]

    def row_tokens(self) -> list[str]:
        """Of ``rows``: the token at the end of a row, then those before and after, if there are any."""
        return [name for name in (self.row_token, self.start_token, self.end_token) if name]

    def _cells(self) -> Iterator[tuple[int, int]]:
        """Rows and columns at which a tile may be."""
        if self.tiling == "grid":
            most, allowed = self.marker_grid, lambda row, column: True
        elif self.tiling == "anyres":
            most = max(map(max, self.pinpoints))
            allowed = lambda row, column: any(row <= rows and column <= columns for rows, columns in self.pinpoints)
        else:
            most, allowed = self.max_tiles, lambda row, column: row * column <= self.max_tiles
        numbers = range(1, most + 1)
        yield from ((row, column) for row in numbers for column in numbers if allowed(row, column))

    def check(self, image_size: int, token_side: int = 0) -> None:
        """What can only be said once the model is known.

        Args:
            image_size: pixels of a view's side.
            token_side: tokens along it; 0: the tokens of a view are no grid, or not in the stream.

        Raises:
            ValueError: the tiles of "grid" do not fill ``max_side``, or there are more of them than markers; or
                ``rows`` cannot be made.
        """
        if self.rows and not token_side:
            raise InputError(
                "data.images.rows = true: needs an adapter that keeps the grid, and image tokens in the stream of our own archs"
            )
        if self.rows and self.tiling == "overlap" and (shared := token_side * self.overlap) != 2 * (round(shared) // 2):
            raise InputError(
                f"data.images.overlap = {self.overlap}: with rows = true two tiles must share an even number of their {token_side} tokens, "
                f"not {shared:g}"
            )
        if self.fit != "tiles" or self.tiling != "grid":
            return
        if self.max_side % image_size:
            near = max(1, round(self.max_side / image_size)) * image_size
            raise InputError(
                f"data.images.max_side = {self.max_side}: must be a multiple of the vision encoder's {image_size} pixels, such as {near}"
            )
        if self.markers and self.max_side > self.marker_grid * image_size:
            raise InputError(
                f"data.images.max_side = {self.max_side}: with tiles of {image_size} pixels that is {self.max_side // image_size} rows, "
                f"and there are markers for marker_grid = {self.marker_grid}"
            )
