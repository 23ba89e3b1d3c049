from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kempnerforge.config import JobConfig, load_config
from kempnerforge.data.batching.batch import Batch
from kempnerforge.training.trainer import Hook, StepResult, Trainer, TrainingFault
from tests.training.tiny import Recorder, a_trainer, call, checkpoint_steps, make_job, metrics, plain, rows_of, weights_of, write_rows


def job_of(folder: Path, *overrides: str, extra: str = "") -> JobConfig:
    return load_config(make_job(folder, extra=extra), overrides)


def gradients(trainer: Trainer) -> tuple[dict[str, torch.Tensor], StepResult]:
    """Those of one step, before anything moves."""
    kept: dict[str, torch.Tensor] = {}
    step = trainer.optimizers.step

    def look() -> None:
        kept.update({name: plain(p.grad).clone() for name, p in trainer.model.named_parameters() if p.grad is not None})

    trainer.optimizers.step = look  # type: ignore[method-assign]
    result = trainer.train_step()
    trainer.optimizers.step = step  # type: ignore[method-assign]
    return kept, result


def test_each_stage_has_its_own_row_length(tmp_path: Path):
    (tmp_path / "text.txt").write_text("one two three four five six seven eight nine ten\n" * 200)
    cfg = tmp_path / "text.toml"
    cfg.write_text(
        '[model]\ndim = 32\nn_layers = 1\nn_heads = 2\n[data]\nsource = "text"\npath = "text.txt"\ntokenizer_vocab_size = 300\n'
        "[train]\nbatch_size = 2\nseq_len = 24\n[eval]\nat_end = false\n"
        '[[stages]]\nname = "short"\nsteps = 2\ntrain.seq_len = 16\n[[stages]]\nname = "long"\nsteps = 2\n'
    )
    job = load_config(cfg, [f"--data.path={tmp_path}/text.txt"])
    seen = []
    with a_trainer(job) as trainer:
        while not trainer.done:
            seen.append(trainer.next_batches()[0].input_ids.shape[1])
            trainer.step += 1
    assert seen == [16, 16, 24, 24]
    assert [layout.seq_len for layout in trainer.assembly.data.layouts] == [16, 24]


# ---- loss ------------------------------------------------------------------------------------------------------------


def uneven(folder: Path) -> None:
    """Answers of one to thirty words: micro-batches differ widely in their number of trained tokens."""
    rows = rows_of(folder)
    for k, row in enumerate(rows):
        row["answer"] = " ".join(["red"] * (1 + k * k // 8))
    write_rows(folder / "train.jsonl", rows)


@pytest.mark.parametrize("accum", [2, 4])
def test_accumulation_equals_one_batch_with_unequal_targets(accum: int, tmp_path: Path):
    """The loss of a step is the sum over its tokens by their number, not a mean of means."""
    make_job(tmp_path)
    uneven(tmp_path)
    found = []
    for n in (1, accum):
        overrides = (f"--train.grad_accum_steps={n}", "--data.batching=pad", "--train.grad_clip_norm=0")
        with a_trainer(load_config(tmp_path / "job.toml", overrides)) as trainer:
            counts = [batch.num_targets for batch in trainer.next_batches()]
            trainer._batches = None
            found.append((counts, *gradients(trainer)))
    (one, whole, first), (several, summed, second) = found
    assert sum(several) == sum(one) and len(set(several)) > 1
    assert second.loss == pytest.approx(first.loss, rel=1e-6) and second.grad_norm == pytest.approx(first.grad_norm, rel=1e-5)
    for name, grad in whole.items():
        torch.testing.assert_close(summed[name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_loss_is_the_mean_cross_entropy_of_trained_tokens(tmp_path: Path):
    with a_trainer(job_of(tmp_path)) as trainer:
        batch = trainer.next_batches()[0]
        trainer._batches = None
        with torch.no_grad():
            logits = trainer.model(batch).logits
        labels = batch.labels[batch.labels != -100]
        expected = -logits.log_softmax(-1)[torch.arange(len(labels)), labels].mean()
        result = trainer.train_step()
    assert result.loss == pytest.approx(float(expected), rel=1e-6)
    assert (result.counts.tokens, result.counts.images, result.counts.samples) == (batch.useful_tokens, 4, 4)


def test_norm_is_that_before_clipping_and_the_update_is_clipped(tmp_path: Path):
    job = job_of(tmp_path)
    norms = []
    for limit in (0.0, 0.5):
        with a_trainer(replace(job, train=replace(job.train, grad_clip_norm=limit))) as trainer:
            kept, result = gradients(trainer)
            norms.append((result.grad_norm, float(torch.stack([g.norm() for g in kept.values()]).norm())))
    (before, unclipped), (same, clipped) = norms
    assert before == same == pytest.approx(unclipped, rel=1e-5) and clipped == pytest.approx(0.5, rel=1e-5)


def test_bf16_computes_and_fp32_keeps(tmp_path: Path):
    with a_trainer(job_of(tmp_path, "--train.mixed_precision=bf16")) as trainer:
        kept, _ = gradients(trainer)
        assert {p.dtype for p in trainer.model.parameters()} == {g.dtype for g in kept.values()} == {torch.float32}
        low = trainer.model(trainer.next_batches()[0]).loss
    with a_trainer(job_of(tmp_path)) as trainer:
        trainer.next_batches()
        high = trainer.model(trainer.next_batches()[0]).loss
    assert low != high and float(low.detach()) == pytest.approx(float(high.detach()), rel=0.02)


def test_a_step_without_targets_is_refused(tmp_path: Path):
    with a_trainer(job_of(tmp_path)) as trainer:
        empty = [replace(b, targets=b.targets[:0], labels=torch.full_like(b.labels, -100)) for b in trainer.next_batches()]
        trainer.next_batches = lambda: empty  # type: ignore[method-assign]
        with pytest.raises(ValueError, match=r"step 0: no token is trained in samples \['train.jsonl"):
            trainer.train_step()


# ---- faults ----------------------------------------------------------------------------------------------------------


def poison(trainer: Trainer, bad: set[int], value: float, what: str) -> None:
    """Makes loss or one gradient ``value`` at the steps ``bad``."""
    model = trainer.model
    if what == "gradient":
        weight = model.get_parameter("adapter.proj.weight")
        weight.register_post_accumulate_grad_hook(lambda p: plain(p.grad).view(-1)[3].fill_(value) if trainer.step in bad else None)
    else:
        forward = model.forward

        def spoiled(batch: Batch, *rest: object) -> object:
            out = forward(batch, *rest)
            return out._replace(loss=out.loss * value) if trainer.step in bad else out

        model.forward = spoiled  # type: ignore[method-assign]


@pytest.mark.parametrize("what", ["gradient", "loss"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_moves_nothing_and_is_counted(what: str, value: float, tmp_path: Path):
    recorder = Recorder(lambda trainer: poison(trainer, {2, 3}, value, what))
    with a_trainer(job_of(tmp_path), [recorder]) as trainer:
        trainer.fit()
        assert trainer.done and trainer.skipped_in_a_row == 0
    assert [r.skipped for r in recorder.results] == [False, False, True, True, False, False]
    for step, result in enumerate(recorder.results):
        moved = [n for n, w in recorder.weights[step].items() if not torch.equal(w, recorder.weights[step + 1][n])]
        assert bool(moved) != result.skipped, (step, moved)
    assert all(w.isfinite().all() for w in recorder.weights[-1].values())


def test_optimizer_state_survives_a_skipped_step(tmp_path: Path):
    """A step that is skipped is as if it had not been, but for the clock: moments do not decay."""
    with a_trainer(job_of(tmp_path)) as trainer:
        trainer.train_step()
        before = {name: dict(trainer.optimizers.all[0].state[p]) for name, p in trainer.model.named_parameters()}
        before = {n: {k: plain(v).clone() for k, v in s.items()} for n, s in before.items()}
        poison(trainer, {0}, math.nan, "gradient")
        assert trainer.train_step().skipped
        for name, p in trainer.model.named_parameters():
            state = trainer.optimizers.all[0].state[p]
            assert all(torch.equal(plain(state[key]), value) for key, value in before[name].items())
            assert p.grad is None


def test_too_many_skipped_steps_in_a_row_stop_the_run(tmp_path: Path):
    recorder = Recorder(lambda trainer: poison(trainer, {1, 3, 4, 5}, math.nan, "gradient"))
    says = r"^step 5: loss [\d.]+ or gradient norm nan is not finite, for more than train.max_skipped_steps = 2"
    with a_trainer(job_of(tmp_path, "--train.max_skipped_steps=2"), [recorder]) as trainer, pytest.raises(TrainingFault, match=says):
        trainer.fit()
    assert recorder.closed and len(recorder.results) == 5
    assert all(w.isfinite().all() for w in recorder.weights[-1].values())


def test_a_fault_is_exit_code_3_and_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    start = Recorder.start
    recorder = Recorder(lambda trainer: poison(trainer, {3, 4, 5}, math.nan, "gradient"))
    monkeypatch.setattr("kempnerforge.training.hooks.BadSamples.start", lambda self, trainer: start(recorder, trainer))
    ended = call("train", make_job(tmp_path), "--train.max_skipped_steps=0")
    assert ended.code == 3 and ended.err.splitlines()[-1].startswith("stopped: TrainingFault: step 3: "), ended
    monkeypatch.undo()
    ended = call("train", tmp_path / "job.toml", "--train.max_skipped_steps=0")
    assert ended.code == 0, ended
    assert [row["step"] for row in metrics(tmp_path / "run") if "train/loss" in row] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("bad", "code", "steps"), [({1}, 0, [4, 6]), ({5}, 0, [4, 6]), ({4, 5}, 3, [2, 4]), ({2, 3, 4, 5}, 3, [2])])
def test_skipped_steps_are_not_saved_over_good_ones(
    bad: set[int], code: int, steps: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Nor is a run complete whose last steps moved nothing."""
    monkeypatch.setattr("kempnerforge.training.hooks.BadSamples.start", lambda self, trainer: poison(trainer, bad, math.nan, "gradient"))
    ended = call("train", make_job(tmp_path), "--eval.at_end=false")
    assert ended.code == code and ("as in all of the last" in ended.err) == bool(code), ended
    assert checkpoint_steps(tmp_path / "run") == steps


def test_an_update_that_is_too_large_but_finite_is_no_result(tmp_path: Path):
    ended = call("train", make_job(tmp_path), "--optimizer.lr=1e10", "--eval.at_end=false")
    assert ended.code == 3 and "Go on from the last checkpoint with a lower optimizer.lr" in ended.err, ended


def test_a_loss_that_is_not_finite_is_null_in_the_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("kempnerforge.training.hooks.BadSamples.start", lambda self, trainer: poison(trainer, {1}, math.nan, "loss"))
    assert call("train", make_job(tmp_path)).code == 0
    lines = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["train/loss"] is None for line in lines if "train/loss" in line] == [False, True, False, False, False, False]
    assert [line["train/skipped_steps"] for line in lines[:3]] == [0, 1, 0]


# ---- bad samples -----------------------------------------------------------------------------------------------------


def test_too_many_bad_samples_stop_the_run_and_are_listed(tmp_path: Path):
    job = make_job(tmp_path)
    for k in (1, 5, 9):
        (tmp_path / f"{k}.png").write_bytes(b"no image")
    ended = call("train", job, "--data.max_bad_fraction=0.1")
    assert ended.code == 2, ended
    last = ended.err.splitlines()[-1]
    assert last.startswith("error: data: ") and "of 16 samples could not be used, data.max_bad_fraction = 0.1" in last
    listed = [json.loads(line) for line in (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()]
    assert {row["id"] for row in listed} == {f"jsonl/train[{k}]" for k in (1, 5, 9)} and len(listed) == 3
    for k in (1, 5, 9):  # mended: the same command begins where a checkpoint is, and what is listed stays
        (tmp_path / f"{k}.png").write_bytes((tmp_path / "0.png").read_bytes())
    assert call("train", job, "--fresh", "--data.max_bad_fraction=0.1").code == 0
    assert not (tmp_path / "run" / "bad_samples.jsonl").exists()


def test_counts_of_bad_samples_survive_a_restart(tmp_path: Path):
    argv = ("train", make_job(tmp_path), "--data.max_bad_fraction=0.5", "--scheduler.name=constant")
    (tmp_path / "5.png").write_bytes(b"no image")
    assert call(*argv, "--train.max_steps=4").code == 0
    (tmp_path / "run" / "report.html").unlink()
    assert call(*argv, "--train.max_steps=8").code == 0
    last = [row for row in metrics(tmp_path / "run") if "data/samples" in row][-1]
    assert last["data/samples"] == 32 and 2 <= last["data/bad_samples"] <= 4
    assert len((tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()) == 1


# ---- stages and freezing ---------------------------------------------------------------------------------------------

SCHEDULE = """
[[vlm.freeze_schedule]]
start_step = 2
specs = [{ module = "vision_encoder", frozen = false }, { module = "transformer" }]
[[vlm.freeze_schedule]]
start_step = 4
specs = [{ module = "adapter" }]
"""


ENCODER = '--vlm.freeze=[{module = "vision_encoder"}]'


def moved_parts(recorder: Recorder) -> list[set[str]]:
    """The parts of the model that each step moved."""
    pairs = zip(recorder.weights, recorder.weights[1:], strict=False)
    return [{n.split(".")[0] for n in a if not torch.equal(a[n], b[n])} for a, b in pairs]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_exactly_what_the_schedule_says_moves(name: str, tmp_path: Path):
    recorder = Recorder()
    with a_trainer(job_of(tmp_path, f"--optimizer.name={name}", ENCODER, extra=SCHEDULE), [recorder]) as trainer:
        trainer.fit()
    early, late = {"transformer", "adapter"}, {"vision_encoder", "adapter"}
    assert moved_parts(recorder) == [early, early, late, late, {"vision_encoder"}, {"vision_encoder"}]


def test_a_stage_lost_to_a_skipped_step_still_comes_into_force(tmp_path: Path):
    recorder = Recorder(lambda trainer: poison(trainer, {2}, math.nan, "loss"))
    with a_trainer(job_of(tmp_path, ENCODER, extra=SCHEDULE), [recorder]) as trainer:
        trainer.fit()
    assert moved_parts(recorder)[2:4] == [set(), {"vision_encoder", "adapter"}]


def test_stages_change_data_batch_and_learning_rate(tmp_path: Path):
    extra = '\n[[stages]]\nname = "a"\nsteps = 3\n[[stages]]\nname = "b"\nsteps = 3\ntrain.batch_size = 2\noptimizer.lr = 1e-4\n'
    extra += 'data.path = "{folder}/test.jsonl"\nscheduler.warmup_steps = 2\nfreeze = [{ module = "transformer" }]\n'
    recorder = Recorder()
    with a_trainer(job_of(tmp_path, extra=extra.replace("{folder}", str(tmp_path))), [recorder]) as trainer:
        trainer.fit()
    assert [r.counts.samples for r in recorder.results] == [4, 4, 4, 2, 2, 2]
    assert recorder.results[0].rates["lr"] == pytest.approx(2e-3) and recorder.results[3].rates["lr"] == pytest.approx(0.5e-4)
    assert moved_parts(recorder)[3] == {"vision_encoder", "adapter"}


# ---- determinism -----------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_run_and_another_does_not(tmp_path: Path):
    found = []
    for seed in (0, 0, 1):
        recorder = Recorder()
        with a_trainer(job_of(tmp_path, f"--train.seed={seed}"), [recorder]) as trainer:
            trainer.fit()
        found.append((recorder.weights, [r.loss for r in recorder.results]))
    assert found[0][1] == found[1][1] != found[2][1]
    for a, b in zip(found[0][0], found[1][0], strict=True):
        assert all(torch.equal(a[n], b[n]) for n in a)


def test_recomputation_and_hooks_change_nothing(tmp_path: Path):
    weights = []
    for overrides in ((), ("--train.activation_checkpointing=true",)):
        with a_trainer(job_of(tmp_path, *overrides)) as trainer:
            trainer.fit()
            weights.append(weights_of(trainer))
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])


class Order(Hook):
    """Writes down when it is called."""

    def __init__(self, name: str, log: list[str], fail: bool = False) -> None:
        self.name, self.log, self.fail = name, log, fail

    def start(self, trainer: Trainer) -> None:
        self.log.append(f"start {self.name}")

    def step(self, trainer: Trainer, result: StepResult) -> None:
        self.log.append(f"step {trainer.step} {self.name}")
        if self.fail:
            raise RuntimeError("broken hook")

    def record(self, trainer: Trainer, values: dict[str, float]) -> None:
        self.log.append(f"record {self.name} {values}")

    def finish(self, trainer: Trainer) -> None:
        self.log.append(f"finish {self.name}")

    def close(self) -> None:
        self.log.append(f"close {self.name}")


def test_hooks_run_in_order_and_are_closed_after_an_error(tmp_path: Path):
    log: list[str] = []
    with a_trainer(job_of(tmp_path, "--train.max_steps=1"), [Order("a", log), Order("b", log)]) as trainer:
        trainer.fit()
        trainer.record({"x": 1.0})
    each = ["start", "step 1", "finish", "close"]
    assert log == [f"{event} {name}" for event in each for name in "ab"] + ["record a {'x': 1.0}", "record b {'x': 1.0}"]
    log.clear()
    with a_trainer(job_of(tmp_path), [Order("a", log, fail=True), Order("b", log)]) as trainer, pytest.raises(RuntimeError, match="broken"):
        trainer.fit()
    assert log[-2:] == ["close a", "close b"] and "step 1 b" not in log


def test_a_request_to_stop_ends_after_the_step(tmp_path: Path):
    recorder = Recorder()
    with a_trainer(job_of(tmp_path), [recorder]) as trainer:
        trainer.stop_requested = True
        trainer.fit()
        assert trainer.step == 1 and not trainer.done and len(recorder.results) == 1
