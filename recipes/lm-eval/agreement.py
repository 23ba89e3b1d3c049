"""Asks a run the questions that lm-eval has asked its export (``--log_samples``), and lays the answers side by side::

    python recipes/lm-eval/agreement.py RUN SAMPLES.jsonl

Exit code 1 if any differ.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from kempnerforge.eval.answers import ask
from kempnerforge.eval.exam import Exam
from kempnerforge.inference.model import TrainedModel


def main(run: str, samples: str) -> int:
    restored = TrainedModel.restore(Path(run), ["--train.mixed_precision=fp32"])
    assembly, last = restored.assembly, restored.assembly.stages[-1]
    assembly.data.read_held_out()
    assert assembly.data.examined is not None
    logged = [json.loads(line) for line in Path(samples).read_text(encoding="utf-8").splitlines()]
    asked = [assembly.data.examined.questions[one["doc_id"]] for one in logged]
    assert [question.sample_id for question in asked] == [one["doc"]["id"] for one in logged], "the questions of another run"
    exam = Exam(assembly.model, assembly.data.encoder(last), assembly.job.eval, restored.device)
    ours = ask(exam, dict(enumerate(asked)))
    same = 0
    for answer, one in zip(ours.answers, logged, strict=True):
        theirs, said = one["resps"][0][0].strip(), answer.text.strip()
        same += said == theirs
        if said != theirs:
            print(f"{one['doc']['id']}: {answer.question.prompt} {answer.question.truth}; ours: {said}; lm-eval: {theirs}")
    right = sum(one["exact_match"] for one in logged)
    right_here = sum(answer.right for answer in ours.answers)
    print(f"{'questions':20s} {len(logged):,}")
    print(f"{'kempnerforge eval':20s} {right_here:,} right, {right_here / ours.total:.4%}")
    print(f"{'lm-eval':20s} {right:,.0f} right, {right / len(logged):.4%}")
    print(f"{'the same answer':20s} {same:,}")
    return int(same != len(logged))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
