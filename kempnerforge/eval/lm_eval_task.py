"""Held-out questions as a task for lm-eval (EleutherAI's lm-evaluation-harness), in a directory that needs
nothing else.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from kempnerforge.config import EvalConfig
from kempnerforge.data.images.decode import opened
from kempnerforge.data.sample import ImageSource, SampleError
from kempnerforge.data.source import Source
from kempnerforge.data.text.encode import Encoder
from kempnerforge.eval.questions import HeldOut, Question, Truths, examine
from kempnerforge.util.errors import InputError

FILES = Path(__file__).with_name("lm_eval")
TASK, TABLE = "kempnerforge_vqa", "questions.parquet"
MARK = "<image>"
"""The place of an image in a question, to lm-eval."""
ROWS = 1024
"""Questions that are in memory at a time."""
Progress = Callable[[str, int, int], object]
"""Called with what is being done, how much of it is done, and how much there is."""


@dataclass(frozen=True)
class WrittenTask:
    """What ``write_task`` has made.

    Attributes:
        questions: rows of the table.
        left_out: (sample id, reason) of what cannot be asked.
        too_long: rows whose answer cannot be written whole in as many tokens as the task allows.
        held_out: all that could be asked.
    """

    path: Path
    questions: int
    left_out: list[tuple[str, str]]
    too_long: int
    held_out: HeldOut


def write_task(
    source: Source, encoder: Encoder, out: Path, cfg: EvalConfig, limit: int = 0, progress: Progress | None = None
) -> WrittenTask:  # fmt: skip
    """Writes the questions that ``evaluate`` asks, with their images, and the task that lm-eval runs on them.

    A question is the sample's prompt without a template: the chat template of a model writes the rest. An
    image is what its file holds, or a PNG of it upright and in RGB where readers could differ. An answer is
    right as it is, or as the tokenizer of the job writes it. The task says in its metadata how many questions
    there are, and how many of them have answers too long for it.

    Args:
        source: what is held out.
        encoder: of the job.
        out: a directory, made if it is not there; files of an earlier task in it are replaced.
        cfg: says how long an answer may be.
        limit: questions at most, drawn by the seed of ``encoder``; 0: all.
        progress: told how many questions are done.

    Raises:
        ValueError: there is no question that can be asked.
    """
    held_out = examine(source, encoder, cfg, pictures=0)
    asked, left_out = list(held_out.draw(limit, encoder.seed).values()), list(held_out.skipped)
    out.mkdir(parents=True, exist_ok=True)
    lengths = _write_table(source, asked, Truths(encoder), out / TABLE, left_out, progress)
    if not lengths:
        (out / TABLE).unlink()
        raise InputError(f"none of {len(asked)} held-out questions can be written{f'; the first: {left_out[0][1]}' if left_out else ''}")
    task = (FILES / f"{TASK}.yaml").read_text(encoding="utf-8")
    too_long = sum(tokens > cfg.max_new_tokens for tokens in lengths)
    facts = {"questions": len(lengths), "left_out": len(left_out), "too_long": too_long}
    default, version = f"max_gen_toks: {EvalConfig().max_new_tokens}\n", "  version: 1.0\n"
    assert default in task and version in task
    task = task.replace(default, f"max_gen_toks: {cfg.max_new_tokens}\n")
    task = task.replace(version, version + "".join(f"  {key}: {count}\n" for key, count in facts.items()))
    (out / f"{TASK}.yaml").write_text(task, encoding="utf-8")
    shutil.copyfile(FILES / "vqa.py", out / "vqa.py")
    return WrittenTask(out, len(lengths), left_out, too_long, held_out)


def _write_table(
    source: Source,
    asked: Sequence[Question],
    truths: Truths,
    path: Path,
    left_out: list[tuple[str, str]],
    progress: Progress | None,
) -> list[int]:
    """Rows of a parquet file that ``datasets`` opens with its images as such; the tokens of their answers."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Features, List, Value
    from datasets import Image as ImageColumn

    schema = Features(
        {"id": Value("string"), "images": List(ImageColumn())}
        | {key: Value("string") for key in ("question", "answer")}
        | {"right": List(Value("string"))}  # all answers that are, also as the tokenizer writes them
    ).arrow_schema
    lengths, encode = list[int](), lru_cache(maxsize=64)(encoded)  # the questions of an image follow one another
    with pq.ParquetWriter(path, schema) as file:
        for begin in range(0, len(asked), ROWS):
            rows: list[dict[str, Any]] = []
            for question in asked[begin : begin + ROWS]:
                try:
                    truth = truths.of(question)
                    row = _row(question, source.cfg.sections()[question.part].image_placeholder, encode)
                    rows.append(row | {"right": [row["answer"], truth.text, *question.also_right, *truth.others]})
                    lengths.append(truth.tokens)
                except SampleError as error:
                    left_out.append((question.sample_id, str(error)))
            file.write_table(pa.Table.from_pylist(rows, schema=schema))
            if progress is not None:
                progress("writing questions", min(begin + ROWS, len(asked)), len(asked))
    return lengths


def _row(question: Question, placeholder: str, encode: Callable[[ImageSource], bytes]) -> dict[str, Any]:
    images = [{"bytes": encode(image), "path": None} for image in question.images]
    asked = _asked(question, placeholder, len(images))
    return {"id": question.sample_id, "images": images, "question": asked, "answer": question.written or question.truth}


def _asked(question: Question, placeholder: str, images: int) -> str:
    """The prompt with the places of its images marked as lm-eval has them.

    Raises:
        SampleError: it is more than one question, or a mark in it is text.
    """
    text = question.conversation
    if text is not None and (text.more or text.system):
        raise SampleError("a question with a conversation before it, or a system prompt")
    literal = text is not None and text.leading is not None
    marked = not literal and placeholder in question.prompt
    prompt = question.prompt.replace(placeholder, MARK) if marked else MARK * images + question.prompt
    if prompt.count(MARK) != images or (literal and placeholder in question.prompt):
        raise SampleError(f"the prompt names {MARK} or {placeholder} where there is no image")
    return prompt


def encoded(image: ImageSource) -> bytes:
    """An image that every reader opens alike: its file as it is where a plain reading gives the pixels that
    ours gives, else a PNG of these. They differ where an image is turned, transparent, or not in 8 bits.

    Raises:
        ImageError: it cannot be used.
    """
    with opened(image) as picture:
        picture.allow(0)
        ours = picture.pixels(picture.size)
    content = image if isinstance(image, bytes) else image.read_bytes()
    with Image.open(io.BytesIO(content)) as plain:
        as_rgb = plain.convert("RGB")
    if as_rgb.size == ours.size and as_rgb.tobytes() == ours.tobytes():
        return content
    ours.save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()
