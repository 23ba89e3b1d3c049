"""Lines in, answers out."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kempnerforge.eval.generate import Sampling
from kempnerforge.serve.terminal import HELP, Chat
from tests.serve.fake import Fake, Said

BOX = "<loc0256><loc0128><loc0768><loc0512> cat"


def chat(out: io.StringIO | None = None, **kwargs: object) -> tuple[Chat, Fake, io.StringIO, list[str]]:
    model = Fake(lambda prompt: Said([BOX] if prompt == "detect" else ["said ", prompt]))
    out, notes = out or io.StringIO(), []
    return Chat(model, out, notes.append, **kwargs), model, out, notes  # type: ignore[arg-type]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("RGB", (600, 500), (90, 90, 90)).save(tmp_path / "a b.png")
    return tmp_path / "a b.png"


def test_questions_and_commands(picture: Path) -> None:
    it, model, out, notes = chat(max_new_tokens=5, sampling=Sampling(0.5))
    lines = ["what?", "", f"/image '{picture}'", "  and now? ", "/ask /odd", "/ask", "/reset", "again", "/quit"]
    assert [it.read(line) for line in lines] == [True] * 8 + [False]
    assert out.getvalue() == "said what?\nsaid and now?\nsaid /odd\nsaid \nsaid again\n"
    assert [(prompt, images) for prompt, images, *_ in model.asked] == [
        ("what?", ()), ("and now?", (picture,)), ("/odd", (picture,)), ("", (picture,)), ("again", ()),
    ]  # fmt: skip
    assert {(wanted, sampling) for _, _, wanted, sampling, _ in model.asked} == {(5, Sampling(0.5))}
    assert notes == [f"image 1: {picture}", "forgotten"]


@pytest.mark.parametrize("has_turns", [True, False])
def test_conversations(has_turns: bool) -> None:
    it, model, _, _ = chat(has_turns=has_turns)
    for line in ("one", "two", "/reset", "three"):
        it.read(line)
    turns = (("one", "said one"),) if has_turns else ()
    assert [history for *_, history in model.asked] == [(), turns, ()]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("/image", "needs a path"),
        ("/image /no/such.png", "no such file"),
        ("/image 'x", "No closing quotation"),
        ("/imagine", "no such command"),
        ("/draw x.png", "needs a path, an image"),
        ("/image {folder}/text.png", "not an image"),
    ],
)
def test_what_cannot_be_done(line: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("text")
    it, model, out, _ = chat()
    with pytest.raises(ValueError, match=why):
        it.read(line.format(folder=tmp_path))
    assert it.images == [] and model.asked == [] and out.getvalue() == ""


def test_marks_are_counted_and_drawn(picture: Path, tmp_path: Path) -> None:
    it, _, _, notes = chat()
    it.add([picture])
    it.read("detect")
    it.read(f"/draw {tmp_path}/out.png")
    assert notes == ["1 box; /draw PATH draws them", f"1 box drawn into {tmp_path}/out.png"]
    before, after = (np.asarray(Image.open(path).convert("RGB")) for path in (picture, tmp_path / "out.png"))
    assert after.shape == before.shape and (after[125:128, 76:299] != before[125:128, 76:299]).any(-1).all()


def test_a_stopped_answer_is_not_remembered() -> None:
    def pause(k: int) -> None:
        if k == 1:
            raise KeyboardInterrupt

    it, model, out, _ = chat(has_turns=True)
    model.answer = lambda prompt: Said(["a", "b"], pause)
    with pytest.raises(KeyboardInterrupt):
        it.read("x")
    assert out.getvalue() == "a\n" and it.history == []


def test_help_names_every_command() -> None:
    it, _, _, notes = chat()
    it.read("/help")
    assert notes == [HELP] and all(name in HELP for name in it._commands if name != "/help")
