"""The commands on a trained model: generate with drawings, chat over a pipe, serve over HTTP."""

from __future__ import annotations

import base64
import io
import json
import re
import signal
import sys
from pathlib import Path
from urllib.request import urlopen

import pytest
from PIL import Image

from kempnerforge.cli import chat
from kempnerforge.data.batching.batch import Batch, Kind
from kempnerforge.eval.draw import SUFFIXES
from kempnerforge.inference.answer import Answer
from kempnerforge.inference.model import TrainedModel
from kempnerforge.serve.facts import facts_of
from kempnerforge.serve.terminal import Chat
from tests.serve.fake import post, serving
from tests.training.tiny import call, make_job, start

ASKED = "what is on the left?"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of two steps in it, and pictures."""
    folder = tmp_path_factory.mktemp("served")
    ended = call("train", make_job(folder), "--train.max_steps=2")
    assert ended.code == 0, ended.err
    return folder


@pytest.fixture(scope="module")
def model(trained: Path) -> TrainedModel:
    return TrainedModel.restore(trained / "run")


# ---- answers ------------------------------------------------------------------------------------------------------------


def test_pieces_are_the_text(model: TrainedModel, trained: Path) -> None:
    answer = model.ask(ASKED, [trained / "0.png"], 9)
    assert answer.num_tokens == 0, "nothing is made before it is asked for"
    pieces = list(answer)
    assert "".join(pieces) == answer.text == model.ask(ASKED, [(trained / "0.png").read_bytes()], 9).finish()
    assert 1 <= answer.num_tokens <= 9


def test_an_answer_ends_at_any_of_its_ends() -> None:
    answer = Answer(iter([65, 66, 2, 67]), {1, 2}, lambda ids: bytes(ids).decode())
    assert list(answer) == ["A", "B", ""] and answer.text == "AB" and answer.num_tokens == 3


def test_turns_need_a_template_for_them(model: TrainedModel, trained: Path) -> None:
    assert not model.has_turns
    single = TrainedModel.restore(trained / "run", ["--data.template=paligemma"])
    with pytest.raises(ValueError, match="takes no earlier ones"):
        single.ask(ASKED, [], 1, history=[("a", "b")])


def test_earlier_turns_stand_before_the_question(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    talks = TrainedModel.restore(trained / "run", ["--data.template=turns", "--data.turns.user=Q {prompt} ", "--data.turns.assistant=A "])
    assert talks.has_turns
    prompts: list[str] = []
    forward = type(talks.assembly.model).forward

    def spy(self: object, batch: Batch, cache: object) -> object:
        prompts.append(talks.processor.tokenizer.decode(batch.input_ids[0][batch.kinds[0] > Kind.IMAGE].tolist()))
        return forward(self, batch, cache)  # type: ignore[arg-type]

    monkeypatch.setattr(type(talks.assembly.model), "forward", spy)
    talks.ask("why?", [trained / "0.png"], 1, history=[("who?", "me <image>"), ("so?", "")]).finish()
    assert prompts == ["Q who? A me Q so? A Q why? A "]


# ---- serve --------------------------------------------------------------------------------------------------------------


def test_served_answers_are_those_of_the_model(model: TrainedModel, trained: Path) -> None:
    image = base64.b64encode((trained / "3.png").read_bytes()).decode()
    with serving(model, facts_of(model)) as server:
        facts = json.loads(urlopen(f"{server.url}api/model").read())
        assert facts["name"] == "run" and facts["about"]["architecture"] == "joint_decoder" and facts["has_images"] is True
        status, lines = post(server, {"prompt": ASKED, "images": [image], "max_new_tokens": 9})
        assert status == 200 and lines[-1]["done"]["answer"] == model.ask(ASKED, [trained / "3.png"], 9).finish()
        assert "".join(line.get("text", "") for line in lines) == lines[-1]["done"]["answer"]
        for bad, why in ((b"no image", "not an image"), (b"", "empty")):
            body = {"prompt": ASKED, "images": [base64.b64encode(bad).decode()]}
            assert why in post(server, body)[1][-1]["error"]
        assert "max_seq_len" in post(server, {"prompt": ASKED, "max_new_tokens": 10_000})[1][-1]["error"]


def test_the_command_serves_until_it_is_interrupted(trained: Path) -> None:
    process = start("serve", trained / "run", "--port", "0")
    assert process.stderr is not None
    try:
        said = process.stderr.readline()
        url = re.search(r"http://127\.0\.0\.1:\d+/", said)
        assert url and b"<!doctype html>" in urlopen(url[0], timeout=20).read()
        process.send_signal(signal.SIGTERM)  # of a shell's background job SIGINT is ignored
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.communicate()


# ---- chat ---------------------------------------------------------------------------------------------------------------


def test_chat_over_a_pipe(model: TrainedModel, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = f"{ASKED}\n/image {trained}/3.png\n{ASKED}\n/image none.png\n/quit\nnever asked\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    ended = call("chat", trained / "run", trained / "0.png", "--max-new-tokens=5")
    answers = [model.ask(ASKED, [trained / name for name in names], 5).finish() for names in (["0.png"], ["0.png", "3.png"])]
    assert ended.out == "".join(answer + "\n" for answer in answers)
    assert ended.code == 2 and "image 2" in ended.err and "none.png: no such file" in ended.err


def test_chat_by_hand(model: TrainedModel, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    typed = iter(["/nonsense", KeyboardInterrupt(), ASKED, EOFError()])

    def typing(prompt: str) -> str:
        line = next(typed)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", typing)
    assert chat.by_hand(Chat(model, sys.stdout, chat.note, max_new_tokens=3)) == 0
    said = capsys.readouterr()
    assert said.out == model.ask(ASKED, [], 3).finish() + "\n"
    assert "no such command" in said.err and "/quit ends" in said.err


# ---- generate -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(trained: Path, tmp_path: Path) -> Path:
    for name in ("1.png", "2.png"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    (tmp_path / "notes.txt").write_text("not taken")
    return tmp_path


def test_a_folder_of_images(trained: Path, pictures: Path) -> None:
    found = json.loads(call("generate", trained / "run", pictures, "--prompt", ASKED, "--json").out)["answers"]
    assert [answer["image"] for answer in found] == [str(pictures / "1.png"), str(pictures / "2.png")]
    (pictures / "1b.png").write_bytes(b"broken")
    ended = call("generate", trained / "run", pictures, "--prompt", ASKED, "--json")
    errors = [answer.get("error", "") for answer in json.loads(ended.out)["answers"]]
    assert ended.code == 2 and [bool(error) for error in errors] == [False, True, False] and "1b.png" in errors[1] + ended.err
    (pictures / "empty").mkdir()
    assert "has no files" in call("generate", trained / "run", pictures / "empty").err


def test_drawings(trained: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Answer, "text", property(lambda self: "<loc0000><loc0000><loc0512><loc0512> half"))
    argv = ("generate", trained / "run", "--prompt", ASKED, "--json", "--max-new-tokens=2")
    ended = call(*argv[:2], pictures / "1.png", *argv[2:], "--draw", pictures / "x.png")
    assert ended.code == 0, ended.err
    (one,) = json.loads(ended.out)["answers"]
    assert one["drawn"] == str(pictures / "x.png") and one["boxes"] == [{"label": "half", "x0": 0, "y0": 0, "x1": 0.5, "y1": 0.5}]
    assert min(Image.open(pictures / "x.png").size) >= 448
    (pictures / "x.png").unlink()
    several = json.loads(call(*argv[:2], pictures, *argv[2:], "--draw", pictures / "drawn").out)["answers"]
    assert [answer["drawn"] for answer in several] == [str(pictures / "drawn" / name) for name in ("1.png", "2.png")]
    assert all(Path(answer["drawn"]).is_file() for answer in several)


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (("--draw", "x.png"), "needs an image"),
        (("1.png", "2.png", "--draw", "x.png"), "name a folder"),
        (("1.png", "1.png", "--draw", "x"), "two images"),
        (("1.png", "--draw", "x.doc"), "no format of images"),
        (("1.png", "--draw", "x.psd"), "no format of images"),
        (("1.png", "--draw", "x/y.png"), "no folder"),
        (("1.png", "--draw", "1.png"), "would be lost"),
        ((".", "--draw", "."), "would be lost"),
    ],
)
def test_drawings_that_cannot_be(trained: Path, pictures: Path, argv: tuple[str, ...], why: str) -> None:
    before = {file: file.read_bytes() for file in pictures.iterdir()}
    ended = call("generate", trained / "run", *(str(pictures / word) if word[0] in "12x." else word for word in argv))
    assert ended.code == 2 and why in ended.err and not ended.out
    assert {file: file.read_bytes() for file in before} == before


def test_a_folder_with_a_dot_takes_drawings(trained: Path, pictures: Path) -> None:
    (pictures / "v1.0").mkdir()
    ended = call("generate", trained / "run", pictures / "1.png", "--draw", pictures / "v1.0", "--max-new-tokens=1")
    assert ended.code == 0 and (pictures / "v1.0" / "1.png").is_file()


def test_a_folder_is_asked_about_but_for_hidden_files(trained: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (pictures / "a\x1b[31m.png").write_bytes((pictures / "1.png").read_bytes())
    (pictures / ".hidden.png").write_bytes(b"what an archive left there")
    monkeypatch.setattr(Answer, "__iter__", lambda self: iter(["a\n", "b"]))
    ended = call("generate", trained / "run", pictures)
    assert ended.code == 0 and "a\\x1b[31m.png: a\nb\n" in ended.out and len(ended.out.splitlines()) == 6


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--temperature", "nan"), "argument --temperature: nan"),
        (("--temperature", "1", "--seed", str(10**20)), "argument --seed: 100000000000000000000: must be between"),
        (("--top-k", "3"), "only read with a --temperature"),
        (("--seed", "3"), "only read with a --temperature"),
    ],
)
def test_options_that_cannot_be(trained: Path, words: tuple[str, ...], why: str) -> None:
    ended = call("generate", trained / "run", *words)
    assert ended.code == 2 and why in ended.err


def test_folders_hold_what_is_opened() -> None:
    from kempnerforge.data.images.decode import FORMATS

    Image.init()
    assert {Image.EXTENSION[suffix] for suffix in SUFFIXES} == set(FORMATS)
