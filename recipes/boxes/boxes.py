"""easy-VQA with the box around each figure, in PaliGemma's location tokens.

python recipes/boxes/boxes.py make                    # writes data/boxes: pictures, train.jsonl, test.jsonl
python recipes/boxes/boxes.py scenes                  # writes data/scenes: up to three shapes a picture, a box and a label for each
python recipes/boxes/boxes.py score runs/recipes/boxes     # intersection over union on the test pictures
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

FOLDER, SCENES = Path("data/boxes"), Path("data/scenes")
QUESTION = "detect figure"


def make() -> None:
    import easy_vqa

    from kempnerforge.eval.codecs import Box, encode_boxes

    for split in ("train", "test"):
        paths = getattr(easy_vqa, f"get_{split}_image_paths")()
        (FOLDER / split).mkdir(parents=True, exist_ok=True)
        with (FOLDER / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for number in sorted(paths):
                shutil.copyfile(paths[number], FOLDER / split / f"{number}.png")
                box = Box(*bounds(Path(paths[number])), label="figure")
                file.write(json.dumps({"image": f"{split}/{number}.png", "prompt": QUESTION, "answer": encode_boxes([box])}) + "\n")
    print(FOLDER)


def bounds(path: Path) -> tuple[float, float, float, float]:
    """x0, y0, x1, y1 of what is not background, which all corners but at most one show; as shares of the side."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)  # (H, W, 3)
    corners = pixels[[0, 0, -1, -1], [0, -1, 0, -1]]
    background = max(corners.tolist(), key=corners.tolist().count)
    distance = np.abs(pixels - background).sum(-1)
    rows, columns = np.where(distance > distance.max() / 2)
    height, width = distance.shape
    return columns.min() / width, rows.min() / height, (columns.max() + 1) / width, (rows.max() + 1) / height


def scenes() -> None:
    from kempnerforge.data.collections.probe.draw import draw_scene
    from kempnerforge.data.collections.probe.scene import COLOURS, SHAPES, Thing, arrange
    from kempnerforge.eval.codecs import Box, encode_boxes

    for split, pictures in (("train", 6000), ("test", 500)):
        (SCENES / split).mkdir(parents=True, exist_ok=True)
        with (SCENES / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for number in range(pictures):
                rng = Random(f"{split} {number}")
                shapes = rng.sample(SHAPES, rng.randint(1, 3))
                placed = arrange([Thing(rng.choice([*COLOURS]), shape) for shape in shapes], rng, 0.2, 0.4)
                (SCENES / split / f"{number}.png").write_bytes(draw_scene(placed, 64, rng, "varied"))
                found = sorted(placed, key=lambda one: one.x)  # from left to right
                boxes = [Box(one.x - one.size / 2, one.y - one.size / 2, one.x + one.size / 2, one.y + one.size / 2, one.thing.shape)
                         for one in found]  # fmt: skip
                row = {"image": f"{split}/{number}.png", "prompt": "detect shapes", "answer": encode_boxes(boxes)}
                file.write(json.dumps(row) + "\n")
    print(SCENES)


def score(run: str) -> None:
    import kempnerforge
    from kempnerforge.eval.codecs import decode_boxes

    model, processor = kempnerforge.load_pretrained(run)
    rows = [json.loads(line) for line in (FOLDER / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    shared = []
    for begin in range(0, len(rows), 100):
        part = rows[begin : begin + 100]
        inputs = processor(images=[[FOLDER / row["image"]] for row in part], text=[row["prompt"] for row in part])
        for row, ids in zip(part, model.generate(inputs, max_new_tokens=48), strict=True):
            found, (truth, *_) = decode_boxes(processor.decode(ids)), decode_boxes(row["answer"])
            shared.append(intersection_over_union(found[0], truth) if found else 0.0)
    print(f"{len(shared)} pictures, mean IoU {np.mean(shared):.3f}, IoU above 0.5 in {np.mean(np.array(shared) > 0.5):.1%}")


def intersection_over_union(a, b) -> float:
    wide, high = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
    both = max(0.0, wide) * max(0.0, high)
    return both / ((a.x1 - a.x0) * (a.y1 - a.y0) + (b.x1 - b.x0) * (b.y1 - b.y0) - both)


if __name__ == "__main__":
    {"make": make, "scenes": scenes, "score": score}[sys.argv[1]](*sys.argv[2:])
