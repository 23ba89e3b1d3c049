"""Examples in front of questions: their prompts byte by byte, which ones they are, and whether there is room."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kempnerforge.config import DataConfig, EvalConfig
from kempnerforge.config.template import TurnsConfig
from kempnerforge.data.batching.collate import prompt_batch
from kempnerforge.data.images.decode import load_image
from kempnerforge.data.sample import Sample, Text
from kempnerforge.data.text.encode import Encoder, Layout
from kempnerforge.data.text.tokenizer import Tokenizer
from kempnerforge.eval.answers import ask
from kempnerforge.eval.embeddings import image_features
from kempnerforge.eval.exam import Exam, Ranks
from kempnerforge.eval.generate import generate
from kempnerforge.eval.questions import Question, questions
from kempnerforge.eval.shots import Shots, feature_key
from kempnerforge.training.setup import assemble
from kempnerforge.util.errors import InputError
from tests.data.samples import ListSource, png
from tests.training.tiny import call, make_job, metrics, two_ranks
from tests.vlm.tiny import Tiny, tiny

IMAGE, END = "<image>", "<|endofchunk|>"
CAPTION, VQA = "<image>Output:{prompt}", "<image>Question:{prompt} Short answer:"
"""OpenFlamingo's prompts (open_flamingo/eval)."""


def encoder_of(user: str = VQA, image_tokens: int = 0, **keys: Any) -> Encoder:
    tokenizer = Tokenizer.train(["Question: what colour? Short answer: red Output: a blue dog"] * 4, 300)
    tokenizer.add_tokens([IMAGE, END])
    cfg = DataConfig(**{"template": "turns", "turns": TurnsConfig(user=user, end=END, bos=False), **keys})
    return Encoder(tokenizer, cfg, Layout(image_tokens, 8, max_text_len=32, seq_len=64, pad_to=36), seed=0)


def asked_of(*texts: tuple[str, str], images: int = 1) -> list[Question]:
    samples = [Sample(f"s{k}", (png((k, k, k)),) * images, (Text(*text),)) for k, text in enumerate(texts)]
    return questions(ListSource(samples))[0]


def written(encoder: Encoder, question: Question) -> str:
    prompt = encoder.encode_question(question.asked, question.images, question.part)
    return encoder.tokenizer.backend.decode(prompt.ids, skip_special_tokens=False)


class Fixed(Shots):
    """All of the pool, in its order."""

    def choose(self, question: Question) -> list[Question]:
        return list(self.pool)


@pytest.mark.parametrize("user", [VQA, CAPTION])
@pytest.mark.parametrize("images", [True, False], ids=["4-shot", "text alone"])
def test_prompts_are_those_of_openflamingo(user: str, images: bool) -> None:
    """Its "0-shot" is two examples of text alone, from which "<image>" is taken out."""
    encoder, is_vqa = encoder_of(user), user == VQA
    *pool, query = asked_of(*((f"what {word}?" if is_vqa else "", f"a {word}") for word in ("dog", "cat", "sea", "car", "bus")))
    pool = pool if images else pool[:2]
    shots = Fixed(EvalConfig(shots=len(pool), shots_images=images), encoder, pool, room=500)
    full = shots.before(query)
    context = "".join(
        f"<image>Question:{q.prompt} Short answer:{q.truth}<|endofchunk|>" if is_vqa else f"<image>Output:{q.truth}<|endofchunk|>"
        for q in pool
    )
    context = context if images else context.replace("<image>", "")
    assert written(encoder, full) == context + (f"<image>Question:{query.prompt} Short answer:" if is_vqa else "<image>Output:")
    assert [*full.images] == ([image for q in pool for image in q.images] if images else []) + [*query.images]
    prompt = encoder.encode_question(full.asked, full.images)
    mark = encoder.tokenizer.token_id(IMAGE)
    assert [at for at, id_ in enumerate(prompt.ids) if id_ == mark] == list(prompt.image_at)


def test_images_in_the_stream_are_in_front_of_their_own_turns() -> None:
    """The first one is where training has it: in front of all."""
    encoder = encoder_of("{prompt}\n", image_tokens=4)
    *pool, query = asked_of(("what colour?", "red"), ("what?", "a dog"), ("Short answer?", ""))
    full = Fixed(EvalConfig(shots=2), encoder, pool, room=500).before(query)
    ids = encoder.encode_question(full.asked, full.images)
    assert written(encoder, full) == f"what colour?\nred{END}what?\na dog{END}Short answer?\n"
    ends = [at + 1 for at, id_ in enumerate(ids.ids) if id_ == encoder.tokenizer.token_id(END)]
    assert ids.image_at == (0, *ends)
    leading = replace(query, conversation=Text("and", "", leading=1))
    assert written(encoder, Fixed(EvalConfig(shots=2), encoder, pool, room=500).before(leading)).endswith("and\n")


def test_random_examples_follow_the_seed_and_are_never_the_question() -> None:
    encoder, pool = encoder_of(), asked_of(*((f"what {k}?", f"a {k}") for k in range(12)))
    shots = Shots(EvalConfig(shots=4, shots_split="held_out"), encoder, pool, room=500)
    chosen = [[each.sample_id for each in shots.choose(question)] for question in pool]
    assert chosen == [[each.sample_id for each in shots.choose(question)] for question in pool]
    assert all(len(set(ids)) == 4 and pool[k].sample_id not in ids for k, ids in enumerate(chosen))
    assert len({tuple(ids) for ids in chosen}) > 8 and len({id_ for ids in chosen for id_ in ids}) == 12
    copied = replace(pool[3], sample_id="the same row in another file")
    every = Shots(EvalConfig(shots=11), encoder, pool, room=500)
    assert "s3" not in [each.sample_id for each in every.choose(copied)]
    other = replace(pool[0], part=1)
    with pytest.raises(InputError, match="eval.shots = 11: there are 0 examples"):
        every.choose(other)


def test_similar_examples_by_hand() -> None:
    """The most similar one is last, as in OpenFlamingo's RICES; equal ones are in the order of the pool."""
    pool = asked_of(*((f"what {k}?", "a") for k in range(6)))
    angles = torch.tensor([0.0, 80, 30, 20, 20, 180]).deg2rad()
    shots = Shots(EvalConfig(shots=3, shots_by="similarity", shots_split="held_out"), encoder_of(), pool, room=500)
    shots.known = [0, 1, 2, 3, 4, 5], torch.stack([angles.cos(), angles.sin()], dim=1)
    shots.features = {feature_key(pool[k]): one for k, one in enumerate(shots.known[1])}
    assert [each.sample_id for each in shots.choose(pool[0])] == ["s2", "s4", "s3"]
    assert [each.sample_id for each in shots.choose(pool[5])] == ["s3", "s2", "s1"]
    shots.known = [1, 5], shots.known[1][[1, 5]]  # the others cannot be read
    with pytest.raises(InputError, match="there are 2 examples"):
        shots.choose(pool[0])
    with pytest.raises(InputError, match="no image that can be read"):
        shots.choose(replace(pool[0], images=(b"broken",)))


def exam_of(it: Tiny, pool: Sequence[Question], **keys: Any) -> Exam:
    cfg = EvalConfig(batch_size=3, max_new_tokens=4, **keys)
    return Exam(it.model, it.encoder, cfg, torch.device("cpu"), shots=Shots(cfg, it.encoder, [*pool], it.job.model.max_seq_len))


def some(count: int, first: int = 0) -> list[Question]:
    colours = [(17 * k % 256, 90 * k % 256, 255 - 40 * k % 256) for k in range(first, first + count)]
    texts = [Text("what colour is it?", ("red", "blue")[k % 2]) for k in range(count)]
    return questions(ListSource([Sample(f"{first + k}", (png(colour, 16),), (texts[k],)) for k, colour in enumerate(colours)]))[0]


@pytest.mark.parametrize("arch", ["cross_attention", "joint_decoder", "mot"])
@pytest.mark.parametrize("by", ["random", "similarity"])
def test_answers_are_to_the_prompt_with_its_examples(arch: str, by: str) -> None:
    it = tiny(arch, noise=0.3)
    it.model.eval()
    exam = exam_of(it, some(5), shots=2, shots_by=by)
    asked = dict(enumerate(some(4, first=20)))
    found = ask(exam, asked)
    assert found.total == 4 and exam.shots is not None
    for answer in found.answers:
        each = [*exam.shots.choose(answer.question), answer.question]
        pixels = torch.stack([torch.from_numpy(load_image(one.images[0], 16).copy()).permute(2, 0, 1) for one in each])
        turns = [(f"<image>{one.prompt}", one.truth) for one in each]
        prompt = it.encoder.encode_prompt(Text(*turns[0], more=tuple(turns[1:])), 3)
        batch = prompt_batch([prompt], pixels, [[0, 1, 2]], it.encoder.layout, it.encoder.tokenizer.pad_id)
        (ids,) = generate(it.model, batch, max_new_tokens=4, eos_id=it.encoder.stops(0))
        assert answer.text == it.encoder.tokenizer.decode(ids)
    assert ask(exam, asked, blind=True).total == 4


def test_features_of_images_on_one_rank_and_on_two() -> None:
    it = tiny("cross_attention")
    it.model.eval()
    asked: dict[int, Question] = dict(enumerate(some(5)))
    both = [*asked[0].images, *asked[1].images]
    asked |= {5: replace(asked[0], images=both), 6: replace(asked[0], images=(b"broken",)), 7: replace(asked[0], images=())}
    exam = exam_of(it, [], shots=1)
    found = image_features(exam, asked)
    assert sorted(found) == [0, 1, 2, 3, 4, 5]
    pixels = torch.stack([torch.from_numpy(load_image(image, 16).copy()).permute(2, 0, 1) for image in both])
    means = it.model.vision_encoder(pixels).mean(1)  # (2, E)
    for key, want in ((0, means[0]), (1, means[1]), (5, means.mean(0))):
        torch.testing.assert_close(found[key], want / want.norm(), rtol=1e-5, atol=1e-6)

    class Half(Ranks):
        size, calls = 2, 0

        def sum(self, values: Sequence[float]) -> list[float]:
            Half.calls += 1
            return super().sum(values)

    parts, calls = {}, []
    for rank in (0, 1):
        ranks = Half()
        ranks.rank, Half.calls = rank, 0
        parts |= image_features(replace(exam, ranks=ranks), asked)
        calls.append(Half.calls)
    assert parts.keys() == found.keys() and calls == [2, 2], "all ranks call the model equally often"
    for key, one in found.items():
        torch.testing.assert_close(parts[key], one, rtol=1e-5, atol=1e-6)


def test_a_run_is_evaluated_with_examples(tmp_path: Path) -> None:
    job = make_job(tmp_path, extra="[eval]\nmax_new_tokens = 4\nblind = false\n")
    assert call("train", job, "--train.max_steps=2", "--eval.shots=1").code == 0
    recorded = [row["eval/exact_match"] for row in metrics(tmp_path / "run") if "eval/exact_match" in row]
    found = {}
    for by in ("random", "similarity"):
        for where in ("training", "held_out"):
            ended = call("eval", tmp_path / "run", "--eval.shots=1", f"--eval.shots_by={by}", f"--eval.shots_split={where}", "--json")
            assert ended.code == 0, ended.err
            found[by, where] = json.loads(ended.out)
    assert found["random", "training"]["exact_match"] == recorded[-1]
    assert all(values["unreadable"] == 0 and values["questions"] == 8 for values in found.values())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["--eval.shots=3"], "eval.shots = 3: a prompt takes .* more than model.max_seq_len = 64; take fewer examples"),
        (["--eval.shots=1", "--data.template=plain"], "data.template = 'plain' writes one turn, and examples are turns"),
        (["--eval.shots=8", "--eval.shots_split=held_out", "--model.max_seq_len=512"], "eval.shots = 8: there are 7 examples"),
        (["--eval.shots=7", "--eval.shots_pool=3"], "there are . examples for .*; eval.shots_pool = 3 samples are drawn, 0 takes all"),
        (["--eval.shots=1", '--eval.tasks=["choice_likelihood"]'], "'choice_likelihood' takes no examples"),
        (["--eval.shots_pool=3"], "shots_pool = 3: only shots above 0 reads it"),
        (["--eval.shots=1", "--eval.shots_by=luck"], "shots_by = 'luck': allowed are 'random', 'similarity'"),
    ],
)
def test_what_cannot_be_asked_ends_a_job_before_its_first_step(keys: list[str], message: str, tmp_path: Path) -> None:
    job = make_job(tmp_path)
    ended = call("check", job, *keys)
    assert ended.code == 2 and re.search(message, " ".join(ended.err.split())), ended.err


def test_a_model_without_an_encoder_of_ours_compares_no_images() -> None:
    job = replace(tiny("hf").job, eval=EvalConfig(shots=1, shots_by="similarity"))
    data = assemble(job, tiny("hf").encoder.tokenizer, data=False).data
    with pytest.raises(InputError, match="has no vision encoder of its own"):
        data.require_held_out()


@pytest.mark.slow
@pytest.mark.dist
def test_two_ranks_choose_and_answer_as_one(tmp_path: Path) -> None:
    """The encoder is sharded when it measures images."""
    job = make_job(tmp_path, extra="[eval]\nmax_new_tokens = 4\nbatch_size = 3\nshots = 1\nshots_by = 'similarity'\nbeams = 2\n")
    found = []
    for name, run in (("one", call), ("two", two_ranks)):
        ended = run("train", job, "--train.max_steps=2", f"--run.dir={tmp_path}/{name}", "--train.mixed_precision=fp32")
        assert ended.code == 0, ended.err
        found.append([{key: row[key] for key in row if key.startswith("eval/")} for row in metrics(tmp_path / name)][-1])
    assert found[0] == found[1] and found[0]["eval/questions"] == 8
