"""Rows, cells and budgets, before anything is run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from kempnerforge.config import load_config
from kempnerforge.study import budget as budgets
from kempnerforge.study.budget import Planned, measure, nearest_multiple, plan_rows
from kempnerforge.study.cells import cell_of, job_of, rows_of, write_config
from kempnerforge.study.config import load_study
from kempnerforge.study.timing import step_seconds
from kempnerforge.training.accounting import TrainingFlops, cost
from kempnerforge.training.setup import assemble
from kempnerforge.util.errors import ConfigError, InputError
from tests.params import quick
from tests.study.tiny import STUDY, make_study
from tests.training.tiny import call, make_job, write_rows

STAGES = """
[[stages]]
name = "one"
steps = 20
freeze = [{ module = "vision_encoder", frozen = true }]
[[stages]]
name = "two"
steps = 60
"""


def planned(path: Path, *overrides: str) -> dict[str, Planned]:
    study = load_study(path, overrides)
    return {one.row.name: one for one in plan_rows(study, rows_of(study))}


# ---- rows --------------------------------------------------------------------------------------------------------------


def test_rows_are_all_combinations_of_levels(tmp_path: Path):
    more = """
[study.axes]
"optimizer.lr" = [1e-3, 2e-3]
[study.axes.backbone.frozen]
vlm.freeze = [{ module = "transformer.layers.0.*", frozen = true }]
[study.axes.backbone.trained]
"train.max_steps" = 8
"""
    study = load_study(make_study(tmp_path, STUDY + more))
    rows = rows_of(study)
    assert [row.name for row in rows][:3] == ["joint-lr=0.001-frozen", "joint-lr=0.001-trained", "joint-lr=0.002-frozen"]
    assert len(rows) == 8
    job = job_of(study, rows[-2])
    assert job.vlm is not None and job.vlm.arch == "cross_attention"
    assert (job.optimizer.lr, job.train.max_steps, job.vlm.freeze[0].module) == (2e-3, 6, "transformer.layers.0.*")


def test_a_level_reaches_into_an_array(tmp_path: Path):
    study = load_study(make_study(tmp_path, STAGES + STUDY + '[study.axes]\n"stages.1.steps" = [7, 9]\n'))
    assert [[stage.steps for stage in job_of(study, row).stages] for row in rows_of(study)] == [[20, 7], [20, 9]] * 2


def test_keys_of_another_arch_are_left_behind(tmp_path: Path):
    path = make_study(tmp_path, STUDY[: STUDY.index("[study.axes.arch]")] + '[study.axes]\n"vlm.arch" = ["cross_attention", "mot"]\n')
    path.write_text(path.read_text().replace('arch = "joint_decoder"', 'arch = "cross_attention"\ncross_attention_every_n_layers = 1', 1))
    study = load_study(path)
    assert [vlm.arch for row in rows_of(study) if (vlm := job_of(study, row).vlm)] == ["cross_attention", "mot"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("seeds = [0, 1]", "sedes = [0, 1]"), "[study] sedes = [0, 1]: unknown key; did you mean 'seeds'?"),
        (("seeds = [0, 1]", "seeds = [1, 1]"), "[study] seeds = [1, 1]: must be whole numbers from 0 on, each once"),
        (
            ("[study.axes.arch]", "[study.match]\nquantity = 'flops'\n[study.axes.arch]"),
            "match.quantity = 'flops': allowed are 'samples', 'trained_tokens'",
        ),
        (
            ("[study.axes.arch]", "[study.match]\nquantity = 'params'\n[study.axes.arch]"),
            "match.by = 'steps': does not change quantity = 'params'",
        ),
        (
            ("[study.axes.arch]", "[study.match]\nby = 'model.dim'\n[study.axes.arch]"),
            "does not change quantity = 'samples'; use 'steps' or 'batch_size'",
        ),
        (
            ("[study.axes.arch]", '[study.tune]\nkeys = { "optimizer.lr" = { low = 1.0, high = 0.5 } }\n[study.axes.arch]'),
            "must be less than high = 0.5",
        ),
        (("joint.vlm.arch =", "joint ="), 'axes.arch.joint = "joint_decoder": must be a piece of a config, a table'),
        (
            ("[study.axes.arch]", "[study.axes]\nvlm.arch = ['mot']\n[study.axes.arch]"),
            'for an axis of values quote its key: "vlm.arch" = ...',
        ),
        (("[study.axes.arch]", "pairs = [['joint', 'corss']]\n[study.axes.arch]"), "pairs: 'corss': is no row; there are joint, cross"),
        (("[study.axes.arch]", "pairs = [['joint']]\n[study.axes.arch]"), "pairs: ['joint']: must be the names of two rows"),
        (
            ("[study.axes.arch]", "pairs = [['joint', 'cross'], ['cross', 'joint']]\n[study.axes.arch]"),
            "must have each pair once",
        ),
        (("[study.axes.arch]", "[study.axes]\nlr = [1]\n[study.axes.arch]"), "is called by a whole key, in quotes"),
        (("[study.axes.arch]", "[study.axes]\n'vlm.arch' = ['mot', 'mot']\n[study.axes.arch]"), "two rows are called 'mot-joint'"),
        (('joint.vlm.arch = "joint_decoder"', 'joint.vlm.arch = "joint"'), "row 'joint': "),
        (("[study]\nname", "[other]\nname"), "[study] name: missing, it has no default"),
        (
            ('joint.vlm.arch = "joint_decoder"', 'joint = { vlm = 3, "vlm.arch" = "mot" }'),
            "axes.arch: level 'joint': 'vlm.arch' is inside 'vlm', which has the value 3 there",
        ),
        (('joint.vlm.arch = "joint_decoder"', "joint.train.seed = 3"), "level 'joint': train.seed is set in each cell by [study] seeds"),
        (("[study.axes.arch]", "[study.axes]\n'run.dir' = ['a']\n[study.axes.arch]"), "run.dir is set in each cell by [study] dir"),
        (
            ("[study.axes.arch]", "[study.tune]\nkeys = { 'train.seed' = { low = 1, high = 3 } }\n[study.axes.arch]"),
            "tune.keys: 'train.seed': train.seed is set in each cell by [study] seeds",
        ),
        (
            ("[study.axes.arch]", "[study.tune]\nkeys = { 'optimizer.lr' = { low = 1e-4, high = inf } }\n[study.axes.arch]"),
            "tune.keys.optimizer.lr.high = inf: must be a finite number",
        ),
        (
            ("seeds = [0, 1]", "seeds = [0]\nscores = [{ key = 'eval/exactmatch' }]"),
            "scores: key = 'eval/exactmatch': must begin with the name of a score: eval/exact_match, eval/loss",
        ),
        (("seeds = [0, 1]", "seeds = [0]\nscores = [{ key = 'eval/' }]"), "scores[0].key = 'eval/': must be eval/ and the name of a score"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, change: tuple[str, str], said: str):
    path = make_study(tmp_path)
    path.write_text(path.read_text().replace(*change))
    ended = call("study", "plan", path)
    assert (ended.code, ended.out) == (2, "")
    assert said in ended.err and str(path) in ended.err
    assert not (tmp_path / "study" / "cells").exists()


def test_a_cell_is_a_config_that_can_be_trained_alone(tmp_path: Path):
    study = load_study(make_study(tmp_path))
    row = rows_of(study)[1]
    cell = cell_of(study, row, job_of(study, row), 7, tmp_path / "cell", "x")
    write_config(cell)
    job = load_config(cell.config)
    assert (job.train.seed, job.run.dir, [hook.type for hook in job.hooks]) == (7, str(tmp_path / "cell"), ["study"])
    write_config(cell)  # the same again
    with pytest.raises(InputError, match="is there already, of another study:\n  train.seed: 7 -> 8"):
        write_config(cell_of(study, row, job_of(study, row), 8, tmp_path / "cell", "x"))


def test_a_study_is_no_job(tmp_path: Path):
    ended = call("train", make_study(tmp_path))
    assert ended.code == 2 and "[study]: unknown section; this is a study: kempnerforge study plan FILE" in ended.err


# ---- budgets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", quick(["joint_decoder", "cross_attention", "mot"], "cross_attention"))
@pytest.mark.parametrize("batching", quick(["group", "pack"], "pack"))
def test_flops_are_those_of_torch_for_every_batch(tmp_path: Path, arch: str, batching: str):
    """Batches whose shapes are known are not run again; the number is that of a run all the same."""
    path = make_job(tmp_path)
    write_rows(
        tmp_path / "train.jsonl",
        [{"image": f"{k % 16}.png", "prompt": "what " * (k % 5), "answer": "red " * (1 + k % 7)} for k in range(48)],
    )
    more = ["--vlm.cross_attention_every_n_layers=1"] if arch == "cross_attention" else []
    assembly = assemble(load_config(path, [f"--vlm.arch={arch}", *more, f"--data.batching={batching}"]), device="meta")
    flops, batches = TrainingFlops(assembly.job), assembly.data.batches(assembly.stages[0], 0)
    trainable = frozenset(name for name, _ in assembly.model.named_parameters() if not name.startswith("vision_encoder"))
    for batch in (next(batches) for _ in range(12)):
        expected = cost(assembly.model, batch, trainable, dict.fromkeys(trainable, 2), torch.float32).flops * len(batch.sample_names)
        assert flops.count(batch, trainable) == pytest.approx(expected, rel=1e-12)


def test_a_budget_is_counted_over_stages(tmp_path: Path):
    budget = measure(load_config(make_job(tmp_path, extra=STAGES), ["--train.max_steps=0"]))
    one, two = budget.stages
    assert (one.steps, two.steps, budget.steps, budget.samples) == (20, 60, 80, 320)
    assert one.flops < two.flops, "a frozen encoder has no backward pass"
    assert budget.train_flops == pytest.approx(20 * one.flops + 60 * two.flops)
    assert budget.trained_tokens == pytest.approx(20 * one.trained_tokens + 60 * two.trained_tokens)


@pytest.mark.parametrize("quantity", quick(["samples", "trained_tokens", "train_flops"], "train_flops"))
def test_rows_are_matched_by_steps(tmp_path: Path, quantity: str):
    path = make_study(tmp_path, f'{STUDY}[study.axes]\n"train.batch_size" = [4, 8]\n[study.match]\nquantity = "{quantity}"\n')
    rows = planned(path, "--train.max_steps=400")
    assert len({one.asked for one in rows.values()}) == 1
    assert max(abs(one.miss) for one in rows.values()) < 0.01
    assert rows["joint-batch_size=4"].budget.steps == 400
    half = rows["joint-batch_size=8"].budget
    assert half.steps == pytest.approx(200, rel=0.03)
    if quantity == "train_flops":
        assert rows["cross-batch_size=4"].budget.steps != 400


def test_rows_are_matched_by_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A step of the second row takes four times as long. Time is matched by steps alone."""
    monkeypatch.setattr(budgets, "step_seconds", lambda job, cfg, folder: [0.01 if job.vlm.arch == "joint_decoder" else 0.04])
    path = make_study(tmp_path, f'{STUDY}[study.match]\nquantity = "wall_clock"\n')
    rows = planned(path, "--train.max_steps=400")
    assert {name: (one.budget.steps, one.budget.wall_clock) for name, one in rows.items()} == {"joint": (400, 4.0), "cross": (100, 4.0)}
    with pytest.raises(ConfigError, match="'wall_clock' is matched by 'steps'"):
        planned(path, '--study.match.by="batch_size"')


@pytest.mark.slow
def test_a_step_is_timed_once(tmp_path: Path):
    path = make_job(tmp_path, extra=STAGES)
    cfg = load_study(make_study(tmp_path / "s", STUDY)).cfg
    job = load_config(path, ["--train.max_steps=0"])
    seconds = step_seconds(job, cfg, tmp_path)
    assert len(seconds) == 2 and all(0.001 < value < 5 for value in seconds)
    assert step_seconds(job, cfg, tmp_path) == seconds
    with pytest.raises(InputError, match="25 steps could not be timed: .*freeze"):
        step_seconds(load_config(path, ["--train.max_steps=0", '--vlm.freeze=[{ module = "*" }]']), cfg, tmp_path)


@pytest.mark.slow
def test_stages_keep_their_proportions(tmp_path: Path):
    path = make_study(tmp_path, STAGES + STUDY + '[study.match]\nquantity = "train_flops"\namount = 1e9\n')
    for one in planned(path, "--train.max_steps=0").values():
        first, second = (stage.steps for stage in one.budget.stages)
        assert abs(one.miss) < 0.01 and second / first == pytest.approx(3, rel=0.1)


@pytest.mark.slow
def test_matched_by_batches_and_by_width(tmp_path: Path):
    path = make_study(tmp_path, STUDY + '[study.match]\nquantity = "train_flops"\nby = "batch_size"\n')
    found = planned(path, "--train.batch_size=64")
    assert {one.budget.steps for one in found.values()} == {6}
    assert abs(found["cross"].miss) < 0.02
    path = make_study(tmp_path, STUDY + '[study.match]\nquantity = "params"\nby = "model.dim"\nmultiple_of = 4\n')
    found = planned(path)
    assert found["joint"].job.model.dim == 32
    assert found["cross"].job.model.dim < 32 and found["cross"].budget.params == pytest.approx(found["joint"].budget.params, rel=0.1)


def test_the_nearest_multiple():
    assert nearest_multiple(lambda v: v * v, 64, 8, 56.0**2 + 1) == 56
    assert nearest_multiple(lambda v: v * v, 8, 8, 1000.0**2) == 1000
    with pytest.raises(InputError, match="does not grow"):
        nearest_multiple(lambda v: 5.0, 8, 8, 6.0)


@pytest.mark.parametrize(
    ("match", "said"),
    [
        ('quantity = "samples"\namount = 1', "row 'joint': samples = 1 by steps: too little: stage 'train' would have no step"),
        (
            'quantity = "samples"\namount = 1e300',
            "samples = 1e300 by steps: too much: it needs 2.5e+299 steps; a stage has at most 2,147,483,647",
        ),
        pytest.param('quantity = "params"\nby = "model.dim"\namount = 10', "the smallest value, 16, has 43.2k", marks=pytest.mark.slow),
        ('quantity = "params"\nby = "model.dmi"', "by model.dmi: no such key"),
        ('quantity = "params"\nby = "optimizer.lr"\namount = 9e9', "optimizer.lr = 0.002: is no whole number"),
    ],
)
def test_a_budget_that_cannot_be_had_is_refused(tmp_path: Path, match: str, said: str):
    ended = call("study", "plan", make_study(tmp_path, f"{STUDY}[study.match]\n{match}\n"))
    assert ended.code == 2 and said in ended.err


def test_batches_that_cannot_be_cut_for_the_ranks_are_refused(tmp_path: Path):
    ended = call("study", "plan", make_study(tmp_path), "--study.ranks=3")
    assert ended.code == 2 and "row 'joint': [study] ranks = 3: train.batch_size = 4: must be a multiple of processes" in ended.err


def test_an_override_of_what_the_study_sets_is_refused(tmp_path: Path):
    ended = call("study", "plan", make_study(tmp_path), "--train.seed=5")
    assert ended.code == 2 and "--train.seed=5: train.seed is set in each cell by [study] seeds" in ended.err


def test_plan_prints_a_table_and_says_what_is_off(tmp_path: Path):
    path = make_study(tmp_path, STUDY + '[study.match]\nquantity = "train_flops"\n')
    ended = call("study", "plan", path)
    assert ended.code == 0
    assert ended.out.splitlines()[:3] == [
        f"tiny: 2 rows x 2 seeds = 4 cells, in {tmp_path}/study", "untuned: no [study.tune]", "matched: train_flops, by steps",
    ]  # fmt: skip
    assert "% from what is asked: steps moves in whole steps" in ended.out
    table = json.loads(call("study", "plan", path, "--json").out)
    assert (table["rows"][0]["row"], table["rows"][0]["samples"]) == ("joint", 24)


def test_a_row_that_could_not_be_trained_is_refused_before_anything_runs(tmp_path: Path):
    path = make_study(tmp_path, STUDY + '[study.axes.backbone.frozen]\nvlm.freeze = [{ module = "transformer", frozen = true }]\n')
    ended = call("study", "run", path)
    assert ended.code == 2 and "row 'joint-frozen': freeze: random weights would stay frozen" in ended.err


def test_the_example_of_the_docs(tmp_path: Path):
    page = (Path(__file__).parents[2] / "docs" / "studies.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```toml\n(.*?)^```", page, flags=re.M | re.S)
    make_job(tmp_path)
    (tmp_path / "study.toml").write_text(example, encoding="utf-8")
    ended = call("study", "plan", tmp_path / "study.toml", f"--study.dir={tmp_path}/study", "--json")
    assert ended.code == 0, ended.err
    table = json.loads(ended.out)
    assert [row["row"] for row in table["rows"]] == ["joint_decoder-causal", "joint_decoder-prefix", "mot-causal", "mot-prefix"]
    assert (table["cells"], table["trials"]) == (20, 32)
