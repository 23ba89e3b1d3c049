"""Videos as images of several views: which frames, where they are in a row, and files that are no videos."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kempnerforge.config.data import DataConfig, JsonlConfig
from kempnerforge.config.images import AugmentConfig, ImagesConfig
from kempnerforge.data import Encoder, ImageError, Kind, Layout, Sample, SampleError, Text, Tokenizer, collate
from kempnerforge.data.images import video, views
from kempnerforge.data.images.decode import load_image, opened
from kempnerforge.data.images.video import moments, video_kind
from kempnerforge.eval.lm_eval_task import encoded
from kempnerforge.util.errors import InputError
from tests.data.samples import noise
from tests.training.tiny import call, make_job, write_rows
from tests.vlm.tiny import tiny_job

SIDE = 8
TOKENIZER = Tokenizer.train(["<1.5 seconds> what?"], 300)
TILES = ImagesConfig(fit="tiles", max_side=16, marker_grid=2)
TILED = Tokenizer.train(["."], 300)
TILED.add_tokens(TILES.new_tokens())


def recorded(shades: list[int], rate: int = 4, size: tuple[int, int] = (32, 16), kind: str = "mp4", half: int | None = None) -> bytes:
    """A video of one colour a frame; ``half`` is the shade of the right half."""
    av = pytest.importorskip("av")
    with av.open(file := io.BytesIO(), "w", format=kind) as container:
        stream = container.add_stream("libvpx" if kind == "webm" else "mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for shade in shades:
            pixels = np.full((size[1], size[0], 3), shade, np.uint8)
            pixels[:, size[0] // 2 :] = shade if half is None else half
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


SHADES = [20 * k for k in range(12)]


@pytest.fixture(scope="module")
def clip() -> bytes:
    """Three seconds that become brighter."""
    return recorded(SHADES)


def encoder_of(images: ImagesConfig, image_tokens: int = 2, tokenizer: Tokenizer = TOKENIZER, **cfg: Any) -> Encoder:
    settings = {"prompt_template": "{prompt}", "images": images, **cfg}
    return Encoder(tokenizer, DataConfig(**settings), Layout(image_tokens, SIDE, 200, 400, 64), seed=0)


def shades(pixels: list[np.ndarray]) -> list[int]:
    assert all(view.shape == (SIDE, SIDE, 3) for view in pixels)
    return [round(float(view.mean()) / 20) * 20 for view in pixels]


# ---- frames -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mp4", "mov", "matroska", "webm", "avi"])
def test_frames_are_those_in_the_middle_of_equal_parts(kind: str) -> None:
    clip = recorded(SHADES, kind=kind)
    assert video_kind(clip[:12]) == {"mp4": "mov", "webm": "matroska"}.get(kind, kind)
    assert moments(3.0, 3) == [0.5, 1.5, 2.5]
    for count, want in ((1, [6]), (3, [2, 6, 10]), (4, [1, 4, 7, 10]), (24, [k // 2 for k in range(24)])):
        found = encoder_of(ImagesConfig(frames=count)).views(Sample("s", (clip,), ()))
        assert shades(found) == [20 * frame for frame in want], count


def test_long_videos_are_not_decoded_between_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty keyframes; from one frame that is taken to the next are 15 seconds."""
    monkeypatch.setattr(video, "MAX_DECODED", 30)
    clip = recorded(list(range(240)))
    found = [float(view.mean()) for view in encoder_of(ImagesConfig(frames=4)).views(Sample("s", (clip,), ()))]
    assert np.abs(np.subtract(found, [30, 90, 150, 210])).max() < 4
    with pytest.raises(ImageError, match="more than 30 frames have to be decoded for 200"):
        encoder_of(ImagesConfig(frames=200)).views(Sample("s", (clip,), ()))


def test_turned_videos_are_upright() -> None:
    """The matrix of a telephone that is held upright: what is stored on the left is shown at the top."""
    clip = recorded([200] * 4, half=20)
    matrix = clip.index(b"tkhd") + 4 + 40
    turned = clip[:matrix] + b"".join((n * 65536).to_bytes(4, "big", signed=True) for n in (0, 1, 0, -1, 0, 0)) + clip[matrix + 24 :]
    for content, size in ((clip, (32, 16)), (turned, (16, 32))):
        with opened(content) as picture:
            assert picture.size == size
    above, below = np.split(load_image(turned, SIDE), 2)
    assert above.mean() > 150 and below.mean() < 70


@pytest.mark.parametrize("fit", ["squash", "crop", "letterbox"])
def test_a_frame_is_fitted_as_an_image_is(fit: str, clip: bytes) -> None:
    encoder = encoder_of(ImagesConfig(fit=fit, frames=3))
    with opened(clip) as picture:
        frames = list(picture.frames(3, (1, 1)))
    for frame, view in zip(frames, encoder.views(Sample("s", (clip,), ())), strict=True):
        frame.save(file := io.BytesIO(), "PNG")
        assert np.array_equal(view, encoder.views(Sample("s", (file.getvalue(),), ()))[0])


# ---- rows ---------------------------------------------------------------------------------------------------------------------------


def test_a_row_has_the_time_before_each_frame(clip: bytes) -> None:
    encoder = encoder_of(ImagesConfig(frames=2, frame_times=True, number_images=True))
    still = noise(9, 9)
    batch = collate([encoder.encode(Sample("s", (clip, still), (Text("a", "b"),)), 0)], 0, None)
    ids = TOKENIZER.encode
    before = [*ids("<image: 0>"), *ids("<0.8 seconds>")], ids("<2.2 seconds>"), ids("<image: 1>")
    assert batch.input_ids[0].tolist() == [*before[0], 0, 0, *before[1], 0, 0, *before[2], 0, 0, TOKENIZER.bos_id, *ids("a"), *ids("b"), 2]
    assert [int(kind) for kind in batch.kinds[0]].count(int(Kind.IMAGE)) == 6
    assert batch.image_starts.tolist() == [len(before[0]), len(before[0] + before[1]) + 2, sum(map(len, before)) + 4]
    assert batch.num_images == 3
    prompt = encoder.encode_question("a", (clip, still))
    assert [list(block.ids) for block in prompt.blocks] == [[*before[0], -1, -1, *before[1], -1, -1], [*before[2], -1, -1]]
    assert encoder.measure(Sample("s", (clip, still), (Text("a", "b"),))) == (batch.input_ids.shape[1], 3)


def test_frames_without_times_follow_one_another(clip: bytes) -> None:
    encoder = encoder_of(ImagesConfig(frames=3))
    batch = collate([encoder.encode(Sample("s", (clip,), (Text("a", "b"),)), 0)], 0, None)
    assert batch.image_starts.tolist() == [0, 2, 4] and batch.leading_images == 3


def test_all_frames_are_changed_alike(clip: bytes) -> None:
    images = ImagesConfig(frames=3, augment=AugmentConfig(brightness=0.5))
    sample = Sample("s", (clip,), (Text("a", "b"),))
    plain, changed = (encoder_of(images).encode(sample, 4, training=training).images for training in (False, True))
    factors = [float(b.mean() / a.mean()) for a, b in zip(plain, changed, strict=True)]
    assert max(factors) - min(factors) < 0.05 and abs(factors[0] - 1) > 0.01


def test_caches_keep_frames(tmp_path: Path, clip: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "clip.mp4"
    file.write_bytes(clip)
    images = ImagesConfig(frames=3, cache_dir=str(tmp_path / "cache"))
    first = encoder_of(images).views(Sample("s", (file,), ()))
    monkeypatch.setattr(views.Views, "_made", lambda *_: pytest.fail("made again"))
    again = encoder_of(images).views(Sample("s", (file,), ()))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


# ---- what is refused ----------------------------------------------------------------------------------------------------------------


def test_damaged_files_say_so(clip: bytes) -> None:
    encoder = encoder_of(ImagesConfig(frames=3))
    faststart = recorded(SHADES, kind="matroska")
    for content, message in (
        (clip[: len(clip) // 2], "has no video in it"),  # its index is at the end
        (faststart[: len(faststart) // 2], r"cannot be decoded( at 2\.5 of 3\.0 seconds)?"),
        (clip[:40], "cannot be decoded"),
        (clip[:12] + b"\0" * 500, "cannot be decoded"),
        (b"\x1aE\xdf\xa3" + b"\xff" * 100, "cannot be decoded"),
        (b"\0\0\0\x1cftypavif" + b"\0" * 100, "not an image of JPEG"),
    ):
        with pytest.raises(ImageError, match=message):
            encoder.views(Sample("s", (content,), ()))


@pytest.mark.parametrize("kind", ["mp4", "webm", "avi"])
def test_changed_bytes_are_read_or_refused(kind: str) -> None:
    """No other exception, which would end a run."""
    clip, encoder, rng = recorded(SHADES, kind=kind), encoder_of(ImagesConfig(frames=3, frame_times=True)), np.random.default_rng(0)
    refused = 0
    for _ in range(100):
        content = np.frombuffer(clip, np.uint8).copy()
        content[rng.integers(12, len(content), 8)] = rng.integers(0, 256, 8)
        try:
            encoder.encode(Sample("s", (content.tobytes(),), (Text("a", "b"),)), 0)
        except SampleError:
            refused += 1
    assert 0 < refused < 100


def test_without_frames_no_video_is_opened(clip: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video.Video, "_opened", property(lambda self: pytest.fail("opened")))
    ways: list[Callable[[], object]] = [
        lambda: encoder_of(ImagesConfig()).views(Sample("s", (clip,), ())),
        lambda: encoder_of(TILES, tokenizer=TILED).encode_question("a", (clip,)),
        lambda: encoded(clip),
    ]
    for way in ways:
        with pytest.raises(ImageError, match="is a video; with data.images.frames = n it is n of its frames"):
            way()


def test_the_missing_package_is_named_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "can_read_videos", lambda: False)
    with pytest.raises(InputError, match=r"data.images.frames = 8: needs the package av: pip install 'kempnerforge\[video\]'"):
        encoder_of(ImagesConfig(frames=8))


def test_what_does_not_go_with_frames() -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"fit": "tiles", "frames": 2}, "frames = 2"),
        ({"frame_times": True}, "frame_times = True"),
        ({"frames": -1}, "frames = -1"),
    ]
    for keys, message in refused:
        with pytest.raises(InputError, match=message):
            ImagesConfig(**keys)
    job = tiny_job("cross_attention")
    assert job.vlm is not None
    job = replace(job, vlm=replace(job.vlm, cross_attention_media="latest"), data=JsonlConfig(path="x", images=ImagesConfig(frames=2)))
    with pytest.raises(InputError, match="or several frames, a word would see the last view alone"):
        job.validate()


def test_pictures_of_videos_are_their_middle(clip: bytes) -> None:
    """Reports, pages and drawings show this one."""
    assert round(float(load_image(clip, SIDE).mean()) / 20) == 6
    with opened(clip) as picture:
        assert isinstance(picture.pixels((1, 1)), Image.Image)


# ---- from a file to an answer -------------------------------------------------------------------------------------------------------


TIMED = ("--data.images.frame_times=true", "--model.rope_sections=[4,2,2]")
JOINED = (
    *("--vlm.arch=cross_attention", "--vlm.cross_attention_every_n_layers=1"),
    *("--adapter.type=perceiver", "--adapter.latents=3", "--adapter.depth=1", "--adapter.max_num_frames=3"),
)


@pytest.mark.parametrize("how", [TIMED, JOINED], ids=["timed", "joined"])
def test_a_run_trains_on_videos_and_answers(how: tuple[str, ...], tmp_path: Path, clip: bytes) -> None:
    """With M-RoPE, where frames come one after the other in time, and with frames that are read together; a cut file is an unusable
    sample like a cut image.
    """
    job = make_job(tmp_path)
    (tmp_path / "clip.mp4").write_bytes(clip)
    (tmp_path / "cut.mp4").write_bytes(clip[: len(clip) // 2])
    rows = [{"video": name, "prompt": "what?", "answer": "red"} for name in ("clip.mp4", "0.png", "clip.mp4", "cut.mp4")]
    write_rows(tmp_path / "train.jsonl", rows)
    write_rows(tmp_path / "test.jsonl", rows[:1])
    keys = ("--data.image_column=video", "--data.images.frames=3", "--data.batching=pack", *how)
    sizes = ("--train.max_steps=2", "--data.max_bad_fraction=0.5", "--train.seq_len=128")
    found = json.loads(call("data", "check", job, *keys, *sizes, "--model.max_seq_len=128", "--json").out)["sources"][0]
    assert (found["read"], found["bad"], found["totals"]["images"], found["totals"]["views"]) == (4, 1, 3, 7)
    ended = call("train", job, *keys, *sizes, "--model.max_seq_len=128")
    assert ended.code == 0, ended.err
    bad = [json.loads(line) for line in (tmp_path / "run/bad_samples.jsonl").read_text().splitlines()]
    assert bad and all("train.jsonl:4" in str(one) and "has no video in it" in str(one) for one in bad)
    answered = call("generate", tmp_path / "run", tmp_path / "clip.mp4", "--prompt", "what?", "--max-new-tokens=3")
    assert answered.code == 0, answered.err
