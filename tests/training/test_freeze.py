from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from kempnerforge.config import FreezeSpec, FreezeStage, JobConfig, TrainConfig, VLMConfig, load_config
from kempnerforge.config.vlm import DEFAULT_MODULE_PATTERNS
from kempnerforge.training.freeze import FreezePlan, apply_freeze, apply_freeze_specs, effective_freeze, match_names, trainable_names
from tests.dist import run_ranks
from tests.training.tiny import call, make_job

NAMES = [
    "transformer.token_embedding.weight",
    "transformer.layers.0.mlp.up_proj.weight",
    "transformer.layers.1.mlp.up_proj.weight",
    "vision_encoder.layers.0.norm1.weight",
    "vision_encoder.layers.1.norm1.weight",
    "adapter.proj.weight",
]


def test_aliases_and_raw_patterns():
    assert match_names(NAMES, "vision_encoder", DEFAULT_MODULE_PATTERNS, "key") == NAMES[3:5]
    assert match_names(NAMES, "vision_encoder.layers.1.*", DEFAULT_MODULE_PATTERNS, "key") == [NAMES[4]]
    assert match_names(NAMES, "*.weight", DEFAULT_MODULE_PATTERNS, "key") == NAMES
    assert match_names(NAMES, "transformer.layers.?.mlp.*", DEFAULT_MODULE_PATTERNS, "key") == NAMES[1:3]
    with pytest.raises(ValueError, match="matches no parameter"):  # a pattern is over full names, and their case counts
        match_names(NAMES, "transformer.layers.0", DEFAULT_MODULE_PATTERNS, "key")
    with pytest.raises(ValueError, match="matches no parameter"):
        match_names(NAMES, "Adapter.*", DEFAULT_MODULE_PATTERNS, "key")


@pytest.mark.parametrize(
    ("module", "near"),
    [("adaptor", "adapter"), ("vision_encoder.layer.1", "vision_encoder.layers.1"), ("transfomer", "transformer")],
)
def test_a_pattern_without_a_hit_names_near_ones(module: str, near: str):
    with pytest.raises(ValueError, match=rf"^freeze.module = '{module}': matches no parameter; aliases: .*near names: .*\b{near}\b"):
        trainable_names(NAMES, [FreezeSpec(module)], DEFAULT_MODULE_PATTERNS)


def test_the_last_match_counts():
    specs = [
        FreezeSpec("*"),
        FreezeSpec("adapter", frozen=False),
        FreezeSpec("vision_encoder", frozen=False),
        FreezeSpec("vision_encoder.layers.0.*"),
    ]
    assert trainable_names(NAMES, specs, DEFAULT_MODULE_PATTERNS) == {NAMES[4], NAMES[5]}
    assert trainable_names(NAMES, [], DEFAULT_MODULE_PATTERNS) == set(NAMES)


def test_everything_frozen_is_refused():
    with pytest.raises(ValueError, match="everything is frozen"):
        trainable_names(NAMES, [FreezeSpec("transformer"), FreezeSpec("adapter"), FreezeSpec("vision_encoder")], DEFAULT_MODULE_PATTERNS)


@given(
    st.lists(st.tuples(st.sampled_from(["transformer", "vision_encoder", "adapter", "*.layers.0.*", NAMES[0]]), st.booleans()), max_size=6)
)
def test_equals_one_decision_per_name(directives: list[tuple[str, bool]]):
    """For each name alone: the last directive that matches it decides."""
    specs = [FreezeSpec(*directive) for directive in directives]
    expected = set()
    for name in NAMES:
        verdicts = [s.frozen for s in specs if name in match_names(NAMES, s.module, DEFAULT_MODULE_PATTERNS, "key")]
        if not verdicts or not verdicts[-1]:
            expected.add(name)
    if expected:
        assert trainable_names(NAMES, specs, DEFAULT_MODULE_PATTERNS) == expected
    else:
        with pytest.raises(ValueError, match="everything is frozen"):
            trainable_names(NAMES, specs, DEFAULT_MODULE_PATTERNS)


def test_boundaries_resolve_every_change_at_the_start(tmp_path: Path):
    path = make_job(tmp_path, extra='\n[[vlm.freeze_schedule]]\nstart_step = 4\nspecs = [{ module = "adapter" }]\n')
    assert FreezePlan(load_config(path), NAMES).boundaries == {0, 4}
    with pytest.raises(ValueError, match="'adapter' .*: matches no parameter"):
        FreezePlan(load_config(path), NAMES[:5]).check()


# ---- freezing over time ------------------------------------------------------------------------------------------------

SPECS = st.lists(
    st.builds(FreezeSpec, st.sampled_from(["transformer", "vision_encoder", "adapter", "transformer.layers.0.*", "*"]), st.booleans()),
    max_size=3,
)


@st.composite
def schedules(draw: st.DrawFn) -> VLMConfig:
    starts = sorted(draw(st.sets(st.integers(0, 12), max_size=4)))
    return VLMConfig.for_arch("joint_decoder", freeze=draw(SPECS), freeze_schedule=[FreezeStage(k, tuple(draw(SPECS))) for k in starts])


def walked(cfg: VLMConfig, step: int) -> set[str]:
    """What trains, by hand: all of it; then what each list does to what the one before has left."""
    trains = set(NAMES)
    for start, specs in [(0, cfg.freeze), *((stage.start_step, stage.specs) for stage in cfg.freeze_schedule)]:
        for spec in specs if start <= step else ():
            prefix = spec.module.removesuffix("*")
            hit = {name for name in NAMES if name.startswith(prefix)}
            trains = trains - hit if spec.frozen else trains | hit
    return trains


@given(schedules(), st.integers(0, 14))
def test_stages_of_the_schedule_add_up(cfg: VLMConfig, step: int):
    specs, job = effective_freeze(cfg, step), JobConfig(vlm=cfg, train=TrainConfig(max_steps=20))
    assert effective_freeze(job, step) == list(job.freeze_at(step)) == specs
    if expected := walked(cfg, step):
        assert trainable_names(NAMES, specs, cfg.module_patterns) == expected


def test_schedule_of_the_issue():
    """Frozen vision and adapter; step 10 thaws the adapter, step 20 thaws vision: at step 20 both train."""
    cfg = VLMConfig.for_arch(
        "joint_decoder",
        freeze=[FreezeSpec("vision_encoder"), FreezeSpec("adapter")],
        freeze_schedule=[FreezeStage(10, (FreezeSpec("adapter", False),)), FreezeStage(20, (FreezeSpec("vision_encoder", False),))],
    )
    parts = lambda step: {n.split(".")[0] for n in trainable_names(NAMES, effective_freeze(cfg, step), cfg.module_patterns)}
    assert [parts(step) for step in (9, 10, 19, 20)] == [
        {"transformer"},
        *[{"transformer", "adapter"}] * 2,
        {"transformer", "adapter", "vision_encoder"},
    ]


class Model(nn.Module):
    """With the names of a model of ours, and a parameter that is no module's."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer, self.vision_encoder = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), nn.Sequential(nn.Linear(2, 2))
        self.adapter = nn.Parameter(torch.zeros(5))


def trains(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_a_loop_of_ones_own():
    """As a program does it that has its own model: at the steps where something changes, and again after a restart."""
    model, cfg = Model(), VLMConfig.for_arch("joint_decoder", freeze_schedule=[FreezeStage(5, (FreezeSpec("adapter"),))])
    assert apply_freeze_specs(model, effective_freeze(cfg, 0), cfg.module_patterns) == {"vision_encoder": 6}
    assert trains(model) == {"adapter", *(f"transformer.{k}.{part}" for k in (0, 1) for part in ("weight", "bias"))}
    assert not model.vision_encoder.training and model.transformer.training
    assert apply_freeze_specs(model, effective_freeze(cfg, 5), cfg.module_patterns) == {"vision_encoder": 0, "adapter": 5}
    assert trains(model) == {f"transformer.{k}.{part}" for k in (0, 1) for part in ("weight", "bias")}
    thaw = [FreezeSpec("*"), FreezeSpec("transformer.1.*", False)]
    assert apply_freeze_specs(model, thaw, DEFAULT_MODULE_PATTERNS) == {"*": 24, "transformer.1.*": 12}
    assert trains(model) == {"transformer.1.weight", "transformer.1.bias"}


def test_a_pattern_without_a_hit_changes_nothing():
    model = Model()
    with pytest.raises(ValueError, match="freeze.module = 'adaptor': matches no parameter; .*adapter"):
        apply_freeze_specs(model, [FreezeSpec("transformer"), FreezeSpec("adaptor")], DEFAULT_MODULE_PATTERNS)
    assert len(trains(model)) == 7


# ---- under FSDP2 -----------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


PLAN = [{"first", "second", "head"}, {"head"}, {"head"}, {"first", "head"}, {"second"}, {"first", "second", "head"}]
"""Which modules train at each step."""


def steps(dtype: torch.dtype | None) -> tuple[list[set[str]], list[torch.Tensor]]:
    """Trains along ``PLAN`` with an evaluation before every change; what moved at each step, and the weights at the end."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    model = Net()
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    fully_shard(model.first, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    moved = []
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    for plan in PLAN:
        with torch.no_grad():
            model(x)  # leaves groups unsharded
        apply_freeze(model, frozenset(n for n, _ in model.named_parameters() if n.split(".")[0] in plan))
        before = {n: p.full_tensor().detach().clone() for n, p in model.named_parameters()}
        model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        moved.append({n.split(".")[0] for n, p in model.named_parameters() if not torch.equal(p.full_tensor(), before[n])})
    return moved, [p.full_tensor().detach() for p in model.parameters()]


def sharded(out: str) -> None:
    dist.init_process_group("gloo")
    for dtype in (None, torch.bfloat16):
        moved, weights = steps(dtype)
        assert moved == PLAN, (dtype, moved)
        if dist.get_rank() == 0 and dtype is None:
            torch.save(weights, out)
    dist.barrier()
    os._exit(0)


@pytest.mark.dist
def test_flips_after_an_evaluation_take_effect_at_once(tmp_path: Path):
    """Two ranks move exactly what the plan says, to where a plain process moves it."""
    results = run_ranks("tests.training.test_freeze:sharded", 2, tmp_path / "weights.pt")
    assert [r.returncode for r in results] == [0, 0], results
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    for plan in PLAN:
        for name, p in model.named_parameters():
            p.requires_grad_(name.split(".")[0] in plan)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    for ours, theirs in zip(torch.load(tmp_path / "weights.pt"), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-6)


def test_a_pending_gradient_of_a_frozen_parameter_is_dropped():
    model = Net()
    model(torch.ones(2, 6)).sum().backward()
    changed = apply_freeze(model, frozenset({"head.weight", "head.bias"}))
    assert sorted(changed) == ["first.bias", "first.weight", "second.bias", "second.weight"]
    assert model.first.weight.grad is None and model.head.weight.grad is not None
    assert apply_freeze(model, frozenset({"head.weight", "head.bias"})) == []


PLACES = """
[[stages]]
name = "align"
steps = 3
freeze = [{ module = "vision_encoder", frozen = false }]
[[stages]]
name = "rest"
steps = 3
optimizer.lr_scale = { adapter = 2 }
"""


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"vision_encoder", frozen = false', '"zzz"', '{job}: [[stages]] "align": freeze[0].module = \'zzz\': matches no parameter; aliases: '),
        ('"vision_encoder", frozen = false', '"*"', '{job}: [[stages]] "align": freeze[0].module = \'*\': with it everything is frozen, nothing'),
        ("freeze = []", 'freeze = [{ module = "zzz" }]', "{job}: [vlm] freeze[0].module = 'zzz': matches no parameter"),
        ("{ adapter = 2 }", "{ zzz = 2 }", '{job}: [[stages]] "rest": optimizer.lr_scale = \'zzz\': matches no parameter'),
        ('[optimizer]\n', '[optimizer]\ngroups = [{ module = "zzz" , lr = 1.0 }]\n', "{job}: [optimizer] groups[0].module = 'zzz': matches"),
        ("[optimizer]\n", '[[lora]]\nmodule = "zzz"\n[optimizer]\n', "{job}: [lora][0].module = 'zzz': matches no linear layer"),
    ],
)  # fmt: skip
def test_a_pattern_is_named_with_file_and_stage(old: str, new: str, said: str, tmp_path: Path):
    job = make_job(tmp_path, extra=PLACES)
    text = job.read_text()
    assert text.count(old) == 1
    job.write_text(text.replace(old, new))
    above = tmp_path / "above.toml"
    above.write_text('extends = "job.toml"\n')
    for command in ("check", "train"):
        ended = call(command, above, "--eval.at_end=false")
        assert ended.code == 2 and said.format(job=job) in ended.err, (command, ended)


def test_a_freeze_of_the_command_line_or_of_the_schedule(tmp_path: Path):
    job = make_job(tmp_path, extra=PLACES)
    ended = call("check", job, '--stages.0.freeze=[{ module = "adapter" }, { module = "zzz" }]')
    assert ended.code == 2 and "command line: [[stages]] \"align\": freeze[1].module = 'zzz'" in ended.err, ended
    job = make_job(tmp_path, extra='[[vlm.freeze_schedule]]\nstart_step = 2\nspecs = [{ module = "*" }]\n')
    ended = call("check", job)
    assert ended.code == 2 and f"{job}: [vlm] freeze_schedule[0].specs[0].module = '*': with it everything is frozen" in ended.err, ended


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        ('{ x = ["zzz", "yyy"] }', '{job}: [vlm] module_patterns.x = ["zzz", "yyy"]: matches no parameter; near names: '),
        ("{ x = [] }", "{job}: [vlm] module_patterns: x = []: an alias needs one pattern or more"),
        (
            '{ adapter = ["transformer"] }',
            '{job}: [vlm] module_patterns.adapter = ["transformer"]: matches no parameter; near names: transformer',
        ),
    ],
)
def test_an_alias_that_nothing_uses(patterns: str, said: str, tmp_path: Path):
    job = make_job(tmp_path)
    job.write_text(job.read_text().replace("freeze = []", f"freeze = []\nmodule_patterns = {patterns}"))
    for command in ("check", "train"):
        ended = call(command, job, "--eval.at_end=false")
        assert ended.code == 2 and said.format(job=job) in ended.err, (command, ended)


def test_an_alias_of_the_arch_with_other_patterns_is_a_warning(tmp_path: Path):
    line = 'vlm.module_patterns: adapter = ["transformer.*"] takes the place of ["adapter", "adapter.*"]'
    ended = call("check", make_job(tmp_path), '--vlm.module_patterns={ adapter = ["transformer.*"], x = ["adapter.*"] }')
    assert ended.code == 0 and f"warning: {line}" in ended.err and "module_patterns: x" not in ended.err, ended


def test_an_alias_for_layers_with_adapters(tmp_path: Path):
    """It matches no parameter, but what [[lora]] looks at."""
    lora = '[[lora]]\nmodule = "queries"\n'
    given = ('--vlm.module_patterns.queries=["*.q_proj"]', '--vlm.freeze=[{ module = "*", frozen = false }]')
    ended = call("check", make_job(tmp_path, extra=lora), *given)
    assert ended.code == 0, ended


def test_the_patterns_of_an_alias_are_shown():
    with pytest.raises(ValueError, match=r"freeze.module = 'x' \(the alias of \[\"zzz\"\]\): matches no parameter; aliases: x"):
        trainable_names(NAMES, [FreezeSpec("x")], {"x": ["zzz"]})
