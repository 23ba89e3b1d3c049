"""What ``check`` counts, against the model itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kempnerforge.config import load_config, registry
from kempnerforge.config.adapter import PerceiverConfig
from kempnerforge.data.batching.batch import Batch
from kempnerforge.eval.generate import generate
from kempnerforge.inspection.plan import dry_run, plan
from kempnerforge.inspection.rows_page import inspect_stages
from kempnerforge.model.transformer import Cache
from kempnerforge.training.accounting import Cost, GenerationCost, _counter, cost, generation_cost
from kempnerforge.training.setup import assemble
from kempnerforge.vlm.base import Output
from kempnerforge.vlm.joint_decoder import JointDecoder
from kempnerforge.vlm.parts import _own_children, part_of, parts
from tests.training.tiny import CONFIG, call, make_job
from tests.vlm.tiny import FOREIGN, LATE, ONE, THREE, Tiny, picture, tiny

ARCHS: list[str | None] = [None, *registry.archs]
each_arch = pytest.mark.parametrize("arch", ARCHS, ids=str)
STAGES = """
[[stages]]
name = "all"
steps = 3
[[stages]]
name = "adapter alone"
steps = 3
train.batch_size = 8
freeze = [{ module = "*" }, { module = "adapter", frozen = false }]
optimizer.lr_scale = { "transformer.layers.0.*" = 0.5 }
"""


@pytest.fixture(scope="module")
def job_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_job(tmp_path_factory.mktemp("plan"), extra=STAGES)


def test_parameters_are_those_of_the_model(job_path: Path):
    job = load_config(job_path)
    found = plan(job)
    model = assemble(job).model
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    for stage in found.stages:
        assert sum(m.parameters for m in stage.cost.modules) == sum(sizes.values())
        for module in stage.cost.modules:
            assert module.parameters == sum(n for name, n in sizes.items() if part_of(name) == module.name)


def test_frozen_parts_have_nothing_trainable(job_path: Path):
    first, second = plan(load_config(job_path)).stages
    assert all(m.trainable == m.parameters for m in first.cost.modules)
    trainable = {m.name: m.trainable for m in second.cost.modules if m.parameters}
    assert trainable.pop("adapter") > 0 and set(trainable.values()) == {0}
    assert second.cost.state_bytes < first.cost.state_bytes and second.cost.flops < first.cost.flops
    assert second.lr["transformer.layers"] == [second.lr["adapter"][0] / 2, second.lr["adapter"][0]]


def test_flops_are_those_of_a_real_step(job_path: Path):
    job = load_config(job_path)
    found = plan(job)
    assembly = assemble(job)
    batch = next(assembly.data.batches(assembly.stages[0], 0))
    with FlopCounterMode(display=False) as counter:
        assembly.model(batch).loss.backward()
    assert found.stages[0].cost.flops == pytest.approx(counter.get_total_flops() / len(batch.sample_names))
    assert sum(m.flops > 0 for m in found.stages[0].cost.modules) >= 4  # encoder, adapter, layers, head


@pytest.mark.parametrize(("tied", "optimizer"), [(True, "adamw"), (False, "muon")])
def test_bytes_of_state(tied: bool, optimizer: str, job_path: Path):
    """fp32 weights and gradients, two moments for AdamW and one for Muon, and no copy of the weights when computing in fp32."""
    job = load_config(job_path, [f"--optimizer.name={optimizer}", f"--model.tie_embeddings={str(tied).lower()}"])
    model = assemble(job).model
    linears = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)} - {"transformer.output_head.weight"}
    expected = 0
    for name, p in model.named_parameters():
        slots = 1 if optimizer == "muon" and name in linears else 2
        expected += p.numel() * (4 + 4 + 4 * slots)
    assert plan(job).stages[0].cost.state_bytes == expected


def test_the_first_plan_of_a_process_counts_what_all_others_do(job_path: Path):
    """Nothing that is made once, the layer that names are compared with, is taken for an activation."""
    _own_children.cache_clear()
    first, second = (plan(load_config(job_path)).stages[0].cost.activation_bytes for _ in range(2))
    assert first == second > 0


def test_rows_and_their_useful_share(job_path: Path):
    job = load_config(job_path, ["--data.batching=pad"])
    stage = plan(job).stages[0]
    assembly = assemble(job)
    batch = next(assembly.data.batches(assembly.stages[0], 0))
    assert stage.row_length == batch.input_ids.shape[1] == 4 + 48
    assert stage.useful == pytest.approx(batch.useful_tokens / batch.input_ids.numel()) and stage.useful < 0.6


def test_parts_cover_every_name():
    layer = "transformer.layers.1"
    names = [
        f"{layer}.mlp.up_proj.weight",
        "transformer.norm.weight",
        "adapter.proj.bias",
        f"{layer}.gate",
        f"{layer}.extra.mlp.up_proj.weight",
    ]
    found = parts(names)
    assert list(found) == ["transformer.layers", "transformer.norm", "adapter", "transformer.layers.*.extra"]
    assert found["transformer.layers"] == [names[0], names[3]]
    assert sorted(name for part in found.values() for name in part) == sorted(names)


# ---- FLOPs of every arch ------------------------------------------------------------------------------------------------


def counted(it: Tiny, batch: Batch, trainable: frozenset[str] | None = None) -> Cost:
    names = [name for name, _ in it.model.named_parameters()]
    return cost(it.model, batch, frozenset(names) if trainable is None else trainable, dict.fromkeys(names, 2), torch.float32)


def by_part(found: Cost) -> dict[str, tuple[float, float]]:
    return {m.name: (m.forward_flops, m.backward_flops) for m in found.modules}


@each_arch
def test_parts_sum_to_all_there_is(arch: str | None):
    it, real = tiny(arch, device="meta"), tiny(arch)
    batch = it.batch(ONE, THREE, LATE)
    found = counted(it, batch)
    phases = [FlopCounterMode(display=False) for _ in range(2)]
    with sdpa_kernel(SDPBackend.MATH):  # the counter does not know the CPU's fused kernel
        with phases[0]:
            total = real.model(batch).mean(1, 1)
        with phases[1]:
            total.backward()
    forward, backward = (round(x * 3) for x in (found.forward_flops, found.backward_flops))
    assert forward == phases[0].get_total_flops() > 0
    assert backward == phases[1].get_total_flops() > forward
    assert sum(m.parameters for m in found.modules) == sum(p.numel() for p in real.model.parameters())
    # no product stays outside but those of a tied head
    assert [m.name for m in found.modules if not m.parameters] == ([] if arch in FOREIGN else ["output head (tied)"])


@pytest.mark.parametrize("arch", [arch for arch in ARCHS if arch not in FOREIGN], ids=str)
def test_what_an_arch_adds_to_the_layers_is_a_part(arch: str | None):
    """The rows and their parameters are those of the children that a layer of a text model does not have."""
    it, text = tiny(arch, device="meta"), tiny(None, device="meta")
    known = {name for name, _ in text.model.transformer.layers[0].named_children()}
    added: dict[str, int] = {}
    for layer in it.model.transformer.layers:
        for name, child in layer.named_children():
            if name not in known:
                size = sum(p.numel() for p in child.parameters())
                added[f"transformer.layers.*.{name}"] = added.get(f"transformer.layers.*.{name}", 0) + size
    rows = {m.name: m for m in counted(it, it.batch(ONE, THREE)).modules}
    assert {name: m.parameters for name, m in rows.items() if "*" in name} == {name: size for name, size in added.items() if size}
    assert all(rows[name].forward_flops > 0 and rows[name].backward_flops > 0 for name in rows if "*" in name)
    plain = {m.name: m for m in counted(text, text.batch(ONE, THREE)).modules}
    assert rows["transformer.layers"].parameters == plain["transformer.layers"].parameters


def test_layers_cost_what_they_cost_alone():
    """Words take the same products through the text layers, wherever images are; a tower per modality only divides them."""
    batches = {arch: (it := tiny(arch, device="meta"), it.batch(ONE, ONE)) for arch in (None, "joint_decoder", "cross_attention", "mot")}
    found = {arch: by_part(counted(it, batch)) for arch, (it, batch) in batches.items()}
    layers, towers = "transformer.layers", "transformer.layers.*.image"
    assert found["cross_attention"][layers] == found[None][layers]
    joint, mot = found["joint_decoder"], found["mot"]
    assert tuple(a + b for a, b in zip(mot[layers], mot[towers], strict=True)) == joint[layers]
    for part in ("vision_encoder", "adapter", "output head (tied)"):
        assert found["cross_attention"][part] == joint[part] == mot[part]


def test_linear_layers_by_hand():
    """Two FLOPs for each multiplication, the backward pass twice those of the forward pass: once for inputs, once for weights."""
    it = tiny("joint_decoder", device="meta")
    batch = it.batch(ONE)
    length, job = batch.input_ids.shape[1], it.job
    heads = job.model.n_heads * job.model.head_width
    layer = it.model.transformer.layers[0]
    linears = sum(p.numel() for p in layer.parameters() if p.ndim == 2) * 2 * length
    products = 2 * 2 * length * length * heads
    found = by_part(counted(it, batch))
    assert found["transformer.layers"] == (job.model.n_layers * (linears + products), 2 * job.model.n_layers * (linears + products))


@pytest.mark.parametrize("groups", [1, 4, 8])
def test_convolutions_by_hand(groups: int):
    """A cell of the output takes a product for each channel of its group and each place of the kernel, and as many for either gradient."""
    images = torch.randn(2, 8, 5, 5, device="meta", requires_grad=True)
    with _counter() as counter:
        torch.nn.Conv2d(8, 16, 3, groups=groups, device="meta")(images).sum().backward()
    assert counter.get_total_flops() == 3 * (2 * 2 * 16 * 3 * 3) * (8 // groups * 3 * 3)


@pytest.mark.parametrize("prefix", ["vision_encoder.", "adapter.", "transformer."])
def test_a_frozen_part_costs_less_on_the_way_back(prefix: str):
    it = tiny("joint_decoder", device="meta")
    batch = it.batch(ONE, THREE)
    names = [name for name, _ in it.model.named_parameters()]
    everything = by_part(counted(it, batch))
    frozen = by_part(counted(it, batch, frozenset(name for name in names if not name.startswith(prefix))))
    assert {part: costs[0] for part, costs in frozen.items()} == {part: costs[0] for part, costs in everything.items()}
    part = "transformer.layers" if prefix == "transformer." else prefix[:-1]
    if prefix != "transformer.":
        for above in ("transformer.layers", "output head (tied)"):
            assert frozen[above] == everything[above]
    # in the way of others: only gradients of inputs; not in the way of any (the encoder): nothing at all
    assert frozen[part][1] < everything[part][1] and (frozen[part][1] == 0) == (prefix == "vision_encoder.")


def test_frozen_below_trained_above():
    """A first layer whose input needs no gradient takes nothing from the parts that come before it."""
    it = tiny(None, device="meta")
    names = [name for name, _ in it.model.named_parameters()]
    last = f"transformer.layers.{it.job.model.n_layers - 1}."
    everything = by_part(counted(it, it.batch(ONE, ONE)))["transformer.layers"]
    forward, backward = by_part(counted(it, it.batch(ONE, ONE), frozenset(n for n in names if n.startswith(last))))["transformer.layers"]
    assert forward == everything[0]
    assert backward == everything[1] / it.job.model.n_layers  # of one layer


@each_arch
def test_generation_costs_what_it_costs(arch: str | None):
    """Reading the prompt, and one token from the cache, as ``generate`` does it."""
    it, real = tiny(arch, device="meta"), tiny(arch)
    real.model.eval()
    prompt = it.prompts([("what colour is it?", [0])], [picture(0)])
    counts = []
    for tokens in (1, 2):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            generate(real.model, prompt, max_new_tokens=tokens, eos_id=-1)
        counts.append(counter.get_total_flops())
    found = generation_cost(it.model, prompt)
    assert found == GenerationCost(prompt.input_ids.shape[1], counts[0], counts[1] - counts[0])
    assert 0 < found.decode_flops < found.prefill_flops


def test_counting_leaves_the_mode_alone():
    it = tiny("joint_decoder", device="meta")
    it.model.train()
    it.model.vision_encoder.eval()
    before = [m.training for m in it.model.modules()]
    counted(it, it.batch(ONE))
    trained = [name for name, parameter in it.model.named_parameters() if parameter.requires_grad]
    generation_cost(it.model, it.prompts([("what?", [0])], [picture(0)]))
    assert trained == [name for name, parameter in it.model.named_parameters() if parameter.requires_grad] != []
    assert [m.training for m in it.model.modules()] == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in it.model.modules())


def test_generation_of_a_resampler_costs_something() -> None:
    """Its latents are a view of a parameter in the module that reads them."""
    it = tiny("joint_decoder", device="meta", adapter=PerceiverConfig(latents=4, depth=1))
    assert generation_cost(it.model, it.prompts([("what?", [0])], [picture(0)])).prefill_flops > 0


def test_an_arch_that_does_not_generate_says_so(job_path: Path, monkeypatch: pytest.MonkeyPatch):
    forward = JointDecoder.forward

    def refusing(self: JointDecoder, batch: Batch, cache: Cache | None = None) -> Output:
        if cache is not None:
            raise NotImplementedError("this arch does not generate")
        return forward(self, batch)

    monkeypatch.setattr(JointDecoder, "forward", refusing)
    assert plan(load_config(job_path)).stages[0].generation == "this arch does not generate"
    assert call("check", job_path).out.count("generation: this arch does not generate") == 2
    stage = json.loads(call("check", job_path, "--json").out)["stages"][0]
    assert stage["prefill_flops"] is stage["decode_flops_per_token"] is stage["prompt_length"] is None


def test_check_shows_both_passes_and_generation(job_path: Path):
    stage = plan(load_config(job_path)).stages[0]
    found = json.loads(call("check", job_path, "--json").out)["stages"][0]
    assert isinstance(stage.generation, GenerationCost)
    assert found["flops_per_sample"] == pytest.approx(stage.cost.forward_flops + stage.cost.backward_flops)
    assert found["forward_flops_per_sample"] == sum(m["forward_flops_per_sample"] for m in found["modules"].values())
    assert found["flops_per_sample"] == pytest.approx(sum(m["flops_per_sample"] for m in found["modules"].values()))
    assert (found["prefill_flops"], found["decode_flops_per_token"]) == (stage.generation.prefill_flops, stage.generation.decode_flops)
    out = call("check", job_path).out
    tables = out[out.index("stage all") : out.index("held out:")].splitlines()
    assert max(map(len, tables)) <= 100
    prompt = f"{stage.generation.prefill_flops / 1e6:,.1f} MFLOP to read a prompt of {stage.generation.prompt_length} positions"
    assert f"generation: {prompt}, {stage.generation.decode_flops / 1e6:,.1f} MFLOP a token" in tables


def test_the_prompt_is_the_first_of_the_stage(job_path: Path):
    """Four image tokens, BOS if there is one, and the words, of the first sample."""
    assembly = assemble(load_config(job_path))
    sample = assembly.data.sources[0][0]
    ids = assembly.data.encoder(assembly.stages[0]).encode_prompt(sample.texts[0].prompt, 1).ids
    answer = plan(load_config(job_path)).stages[0].generation
    assert isinstance(answer, GenerationCost) and answer.prompt_length == 4 + len(ids)


def test_running_text_is_planned_too(tmp_path: Path):
    """Without a prompt to read, a window of the text is one."""
    config = CONFIG[: CONFIG.index("[vision_encoder]")] + CONFIG[CONFIG.index("[data]") :]
    data = 'source = "text"\npath = "{folder}/train.txt"\n'
    config = config[: config.index("source =")] + data + config[config.index("tokenizer_vocab_size") :]
    path = make_job(tmp_path, config=config)
    (tmp_path / "train.txt").write_text("a line of words that says nothing at all\n" * 200, encoding="utf-8")
    stage = plan(load_config(path)).stages[0]
    assert isinstance(stage.generation, GenerationCost)
    assert stage.generation.prompt_length == stage.row_length == 64
    assert stage.generation.prefill_flops > 40 * stage.generation.decode_flops > 0


# ---- the rest of a plan -------------------------------------------------------------------------------------------------


def test_planning_needs_no_memory_for_the_model(tmp_path: Path):
    """A model of 10 billion parameters can be checked anywhere."""
    big = ["--model.dim=8192", "--model.n_layers=20", "--model.n_heads=64", "--vision_encoder.dim=1024", "--train.max_steps=1"]
    found = plan(load_config(make_job(tmp_path), big))
    assert sum(m.parameters for m in found.stages[0].cost.modules) > 10e9
    assert all(p.is_meta for p in found.assembly.model.parameters())


def test_dry_run_reports_the_loss_of_fresh_weights(job_path: Path):
    job = load_config(job_path)
    lines = dry_run(job)
    assembly = assemble(job)
    batch = next(assembly.data.batches(assembly.stages[1], 3))
    loss = float(assembly.model(batch).loss.detach()) / batch.num_targets
    shape = f"8 x {batch.input_ids.shape[1]}"
    assert (
        lines[1] == f"stage adapter alone: first batch {shape}, {batch.num_targets} trained tokens, loss {loss:.4f} (fp32, fresh weights)"
    )


def test_inspection_shows_the_batches_that_training_gets(job_path: Path, tmp_path: Path):
    job = load_config(job_path)
    assembly = assemble(job)
    seen = list(inspect_stages(job, 6, 1, tmp_path, color=False))
    assert [stage.name for stage in seen] == ["all", "adapter alone"] and all(stage.findings == [] for stage in seen)
    names = []
    for batch, _ in zip(assembly.data.batches(assembly.stages[0], 1), range(2), strict=False):
        names += batch.sample_names
    assert [row.split("(")[1].split(")")[0] for row in seen[0].rows] == names[:6]
    assert seen[0].sheet == tmp_path / "contact-sheet-all.png" and seen[0].sheet.exists()


def test_inspection_in_color_marks_the_same_tokens(job_path: Path, tmp_path: Path):
    job = load_config(job_path)
    plain, color = (next(inspect_stages(job, 2, 0, tmp_path, color=c)).rows for c in (False, True))
    for a, b in zip(plain, color, strict=True):
        answer, end = (part.split("\x1b[0m")[0] for part in b.split("30;42m")[1:])  # a special token is underlined
        assert a.endswith(f"[{answer}{end}]") and end == "<eos>"
