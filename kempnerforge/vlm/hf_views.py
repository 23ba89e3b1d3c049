"""Models of transformers whose tokens of an image depend on its shape, at one square size: LLaVA-NeXT (Liu et
al. 2024, "LLaVA-NeXT: improved reasoning, OCR, and world knowledge") and LLaVA-OneVision (Li et al. 2024,
arXiv 2408.03326) cut it into views, Mistral 3 writes tokens between its rows.

Shapes: B rows, S positions, N images, V views of one image, P patches of one image, F tokens of one image, D
width, H pixels along a side, h pixels along a side of a view.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kempnerforge.config.vision import square_side
from kempnerforge.data.batching.batch import Batch
from kempnerforge.data.text.tokenizer import Tokenizer
from kempnerforge.model.hf_checks import pinpoint_grids
from kempnerforge.model.image_processor import PROCESSOR
from kempnerforge.util.errors import InputError
from kempnerforge.util.reading import read_object
from kempnerforge.vlm.hf_images import SquareImages, check_multiple


class Views(SquareImages):
    """LLaVA-NeXT and LLaVA-OneVision: the whole image, then tiles of it, at the best of their resolutions
    (``image_grid_pinpoints``). The class itself takes the padding out again and ends each row with its newline
    vector.
    """

    any_size = True
    counted = ()  # the number that LLaVA-NeXT says is of a view

    def __init__(self, where: str, model: Any, image_size: int) -> None:
        super().__init__(where, model, image_size)
        config = model.config
        path = f"path = {config.name_or_path!r}"
        self.view, pairs = square_side(f"{path}: vision_config.image_size", config.vision_config.image_size), config.image_grid_pinpoints
        pinpoint_grids(f"{path}: ", pairs, self.view)
        if not image_size:
            largest = max((height for height, width in pairs if height == width), default=self.view)
            raise InputError(
                f"{where} = 0: {type(model).__name__} cuts an image into views of {self.view} pixels by its shape; choose the side of "
                f"all images, such as {largest}"
            )
        self.side = image_size

    def cut(self, images: Tensor) -> Tensor:
        """(N, 3, H, H) -> (N, V, 3, h, h) uint8, as the class's image processor does it."""
        from transformers.image_processing_utils import select_best_resolution

        height, width = select_best_resolution((self.side, self.side), self.model.config.image_grid_pinpoints)
        inner = min(height, width)
        above, left = (height - inner) // 2, (width - inner) // 2
        canvas = F.pad(_resized(images, inner), (left, width - inner - left, above, height - inner - above))
        tiles = canvas.unflatten(3, (-1, self.view)).unflatten(2, (-1, self.view))  # (N, 3, rows, h, columns, h)
        tiles = tiles.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # (N, V - 1, 3, h, h)
        return torch.cat([_resized(images, self.view)[:, None], tiles], dim=1)

    def arguments(self, pixels: Tensor) -> dict[str, Any]:
        return {"pixel_values": pixels, "image_sizes": [[self.side, self.side]] * len(pixels)}


def _resized(images: Tensor, side: int) -> Tensor:
    """(N, 3, H, H) uint8 -> (N, 3, side, side), bicubic."""
    if images.shape[-1] == side:
        return images
    found = F.interpolate(images.float(), (side, side), mode="bicubic", antialias=True)
    return found.round_().clamp_(0, 255).to(torch.uint8)


class Rows(SquareImages):
    """Mistral 3 and Pixtral: after each row of patches is a token of the text model, "[IMG_BREAK]", after the
    last one "[IMG_END]".
    """

    any_size = True
    counted = ()  # a Pixtral says one that is not used

    def __init__(self, where: str, model: Any, image_size: int) -> None:
        super().__init__(where, model, image_size)
        config = model.config
        self.patch, path = square_side("vision_config.patch_size", config.vision_config.patch_size), config.name_or_path
        self.merges = config.model_type == "mistral3"
        if not self.merges and config.vision_feature_select_strategy != "full":
            raise InputError(f"path = {path!r}: vision_feature_select_strategy = {config.vision_feature_select_strategy!r}: must be 'full'")
        pixels = self.patch * (config.spatial_merge_size if self.merges else 1)
        check_multiple(where, model, image_size, pixels)
        self.side = image_size // pixels
        file = Path(path) / PROCESSOR
        said, tokenizer = read_object(file) if file.is_file() else {}, Tokenizer.from_pretrained(path)
        names = [said.get(f"image_{kind}_token", f"[IMG_{kind.upper()}]") for kind in ("break", "end")]
        found = [tokenizer.token_id(name) for name in names]
        if None in found:
            raise InputError(f"path = {path!r}: its tokenizer has no {names[found.index(None)]!r}, which is between the rows of an image")
        self.break_id, self.end_id = found

    def arguments(self, pixels: Tensor) -> dict[str, Any]:
        return {"pixel_values": pixels, "image_sizes": [[*pixels.shape[2:]]] * len(pixels)}

    def features(self, pixels: Tensor) -> Tensor:
        """NOTE: not the class's own method, whose layers see all images of a batch as one sequence of N * P,
        with a mask: attention would cost N times as much.
        """
        core, config = self.model.model, self.model.config
        tower, cells = core.vision_tower, pixels.shape[-1] // self.patch
        x = tower.ln_pre(tower.patch_conv(pixels).flatten(2).mT)  # (N, P, D of the tower)
        place = torch.arange(cells, device=pixels.device)
        rope = tower.patch_positional_embedding(x, torch.cartesian_prod(place, place))
        states = [x]
        for layer in tower.transformer.layers:
            states.append(layer(states[-1], None, position_embeddings=rope))
        chosen = config.vision_feature_layer
        x = torch.cat([states[layer] for layer in ([chosen] if isinstance(chosen, int) else chosen)], dim=-1)
        sizes = (self.arguments(pixels)["image_sizes"],) if self.merges else ()
        x = core.multi_modal_projector(x.flatten(0, 1), *sizes)  # (N * tokens, D)
        x = x.unflatten(0, (len(pixels), self.side, self.side))  # (N, rows, columns, D)
        between = self.model.get_input_embeddings()(self._between(pixels.device))[None, :, None].to(x.dtype)  # (1, rows, 1, D)
        return torch.cat([x, between.expand(len(pixels), -1, -1, -1)], dim=2).flatten(1, 2)

    def ids(self, batch: Batch, image_id: int) -> Tensor:
        own = torch.full((self.side, self.side + 1), image_id, device=batch.input_ids.device)
        own[:, -1] = self._between(own.device)
        columns = batch.image_starts[:, None] + torch.arange(own.numel(), device=own.device)  # (M, F)
        return batch.input_ids.index_put((batch.image_rows[:, None].expand_as(columns), columns), own.flatten())

    def _between(self, device: torch.device) -> Tensor:
        """(rows,): the token after each row."""
        return torch.tensor([self.break_id] * (self.side - 1) + [self.end_id], device=device)
