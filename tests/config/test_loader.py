"""TOML and overrides -> JobConfig: what is read, and what is refused in which words."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import pickle
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kempnerforge.config import (
    ConfigError,
    CrossAttentionConfig,
    FreezeSpec,
    FreezeStage,
    JobConfig,
    JointDecoderConfig,
    MoTConfig,
    RopeScaling,
    load_config,
    registry,
)
from kempnerforge.config.adapter import AvgPoolConfig, PixelShuffleConfig
from kempnerforge.config.build import SECTIONS, UNIONS, fields_of
from kempnerforge.config.data import JsonlConfig, TextConfig
from kempnerforge.config.vlm import VLMConfig
from kempnerforge.util.errors import InputError
from tests.dist import ROOT

MINIMAL = '[vlm]\narch = "joint_decoder"\n[train]\nmax_steps = 10\n'


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def problems(path: Path | None, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


def test_every_kind_of_field(tmp_path: Path) -> None:
    text = """
[model]
rope_theta = 500000
rope_scaling = { type = "llama3", factor = 8 }
[vision_encoder]
mean = [0, 0.25, 1]
[adapter]
type = "avg_pool"
[vlm]
arch = "mot"
freeze = [{ module = "adapter" }, { module = "*.bias", frozen = false }]
mot_modalities = ["text", "image"]
[[vlm.freeze_schedule]]
start_step = 3
specs = [{ module = "mot", frozen = true }]
[vlm.module_patterns]
biases = ["*.bias"]
[train]
max_steps = 10
[optimizer]
betas = [0.8, 0.99]
lr_scale = { "adapter.*" = 2 }
"""
    job = load_config(write(tmp_path / "a.toml", text))
    assert job.model.rope_theta == 500_000.0 and type(job.model.rope_theta) is float
    assert job.model.rope_scaling == RopeScaling("llama3", 8.0)
    assert job.vision_encoder.mean == [0.0, 0.25, 1.0]  # type: ignore[attr-defined]
    assert job.adapter == AvgPoolConfig()
    assert isinstance(job.vlm, MoTConfig)
    assert job.vlm.freeze == [FreezeSpec("adapter", True), FreezeSpec("*.bias", False)]
    assert job.vlm.freeze_schedule == [FreezeStage(3, (FreezeSpec("mot", True),))]
    assert job.vlm.mot_modalities == ("text", "image")
    assert job.vlm.module_patterns["biases"] == ["*.bias"] and "mot" in job.vlm.module_patterns
    assert job.optimizer.betas == (0.8, 0.99)
    assert job.optimizer.lr_scale == {"adapter.*": 2.0}


def test_defaults_alone_need_steps() -> None:
    job = load_config(None, ["--train.max_steps=3", "--vlm.arch=joint_decoder"])
    expected = JobConfig(vlm=JointDecoderConfig())
    expected.train.max_steps = 3
    assert job == expected


BAD = [
    ("[modell]\ndim = 1", "[modell]: unknown section; did you mean 'model'?"),
    ("dim = 1", "[dim]: unknown section"),
    ("[model]\ndimm = 1", "[model] dimm = 1: unknown key; did you mean 'dim'?"),
    ("[model]\nxyzzy = 1", "[model] xyzzy = 1: unknown key; allowed are dim, n_layers"),
    ("model = 3", "[model] = 3: must be a table, not an integer"),
    ("[[model]]\ndim = 3", "[model] = [{...}]: must be a table, not an array"),
    ("[model]\ndim = true", "[model] dim = true: must be an integer, not a boolean"),
    ("[model]\ndim = 64.0", "[model] dim = 64.0: must be an integer, not a float"),
    ('[model]\ndim = "64"', '[model] dim = "64": must be an integer, not a string'),
    ("[model]\ndim = [64]", "[model] dim = [64]: must be an integer, not an array"),
    ("[model]\ndim = 2024-01-01", "[model] dim = 2024-01-01: must be an integer, not a date or time"),
    ("[model]\ndim = 99999999999999999999", "must fit into 64 bits"),
    ("[train]\nbatch_size = 99999999999999999999", "[train] batch_size = 99999999999999999999: must fit into 64 bits"),
    ("[train]\nbatch_size = 4.0", '[train] batch_size = 4.0: must be an integer or "auto", not a float'),
    ('[vision_encoder]\nfeature_layer = [-1, "a"]', '[vision_encoder] feature_layer[1] = "a": must be an integer, not a string'),
    ("[vision_encoder]\nfeature_layer = true", "[vision_encoder] feature_layer = true: must be an integer or an array, not a boolean"),
    ("[model]\ntie_embeddings = 1", "[model] tie_embeddings = 1: must be true or false, not an integer"),
    ("[model]\nactivation = 5", "[model] activation = 5: must be a string, not an integer"),
    ("[model]\nrope_theta = nan", "[model] rope_theta = nan: must be a finite number"),
    ("[optimizer]\nlr = inf", "[optimizer] lr = inf: must be a finite number"),
    ("[optimizer]\nlr = -inf", "[optimizer] lr = -inf: must be a finite number"),
    ("[optimizer]\nlr = 1e999", "[optimizer] lr = inf: must be a finite number"),
    ("[optimizer]\nlr = true", "[optimizer] lr = true: must be a number, not a boolean"),
    ("[optimizer]\nbetas = [0.9]", "[optimizer] betas = [0.9]: must have 2 entries, not 1"),
    ('[optimizer]\nbetas = [0.9, "x"]', '[optimizer] betas[1] = "x": must be a number, not a string'),
    ("[optimizer]\nlr_scale = 3", "[optimizer] lr_scale = 3: must be a table, not an integer"),
    ("[optimizer.lr_scale]\nadapter = true", "[optimizer] lr_scale.adapter = true: must be a number"),
    ('[run]\ndir = "a\\u0000b"', "must be UTF-8 text without NUL"),
    ("[model]\nn_heads = 3", "[model] n_heads = 3: must divide dim = 256"),
    ("[model.rope_scaling]\nfactor = 0.5", "[model] rope_scaling.factor = 0.5: must be >= 1"),
    ('[vlm]\narch = "mott"', "[vlm] arch = 'mott': Unknown vlm.arch; registered: cross_attention"),
    ('[vlm]\narch = "hf"', "[vlm] path = '': arch 'hf' needs a directory or a hub id"),
    ("[vlm]\narch = 3", "[vlm] arch = 3: must be a string, not an integer"),
    ('[vlm]\narch = "mot"\ncross_attention_n_heads = 2', "[vlm] cross_attention_n_heads = 2: unknown key"),
    ('[vision_encoder]\ntype = "vitt"', "[vision_encoder] type = 'vitt': Unknown vision_encoder.type; registered"),
    ('[adapter]\ntype = "mlp"', "[adapter] type = 'mlp': Unknown adapter.type"),
    ('[data]\nsource = "easyvqa"', "[data] source = 'easyvqa': Unknown data.source"),
    ('[vlm]\nfreeze = ["adapter"]', '[vlm] freeze[0] = "adapter": must be a table, not a string'),
    ("[vlm]\nfreeze = [{ frozen = true }]", "[vlm] freeze[0].module: missing"),
    ('[vlm]\nfreeze = [{ module = "x", froze = true }]', "[vlm] freeze[0].froze = true: unknown key; did you mean 'frozen'?"),
    ('[vlm]\nfreeze = { module = "x" }', "[vlm] freeze = {...}: must be an array, not a table"),
    ("[[stages]]\nsteps = 3", "[[stages]] #1 name: missing"),
    ('[[stages]]\nname = "a"\nsteps = 0', "[[stages]] #1 steps = 0: must be >= 1"),
    ('[[stages]]\nname = " "\nsteps = 1', "[[stages]] #1 name = ' ': a stage needs one"),
    ("[stages]\nname = 3", "stages = {...}: must be an array, not a table"),
    ("plugins = 3", "plugins = 3: must be an array, not an integer"),
    ("plugins = [3]", "plugins[0] = 3: must be a string, not an integer"),
    ('plugins = ["no.such.module"]', "plugins: 'no.such.module' cannot be imported: ModuleNotFoundError"),
    ('plugins = ["missing.py"]', "plugins: 'missing.py' cannot be imported: FileNotFoundError"),
    ("extends = 3", "extends = 3: must be the name of one TOML file"),
    ("[model", "at the end: not valid TOML"),
    ("a = \n", "line 1, column 5: not valid TOML"),
    ("[model]\ndim = 1\ndim = 2\n", "line 3, column 8: not valid TOML: a key or table is given twice"),
    ('[vlm]\nfreeze = [{\n  module = "x"\n  frozen = true }]', "line 4, column 3: not valid TOML: Unclosed inline table"),
    ("[model]\n[model]", "line 2, column 7: not valid TOML: a key or table is given twice"),
    ("x = " + "[" * 50_000, "nested more than 32 levels"),
    (".".join(["a"] * 3000) + " = 1", "nested more than 32 levels"),
    ("x = " + "9" * 5000, "not valid TOML"),
]


@pytest.mark.parametrize(("text", "message"), BAD, ids=[text[:30].replace("\n", " ") for text, _ in BAD])
def test_bad_toml(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "bad.toml", text)
    lines = problems(path)
    assert any(message in line for line in lines), lines
    assert all(line.startswith(f"{path}: ") and "\n" not in line for line in lines), lines


def test_inline_tables_take_several_lines(tmp_path: Path) -> None:
    """TOML 1.1."""
    lines = 'freeze = [\n  {\n    module = "adapter",  # projects\n    frozen = false,\n  },\n]\n'
    job = load_config(write(tmp_path / "job.toml", MINIMAL.replace("[train]", f"{lines}[train]")))
    assert job.vlm.freeze == [FreezeSpec("adapter", False)]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"\xef\xbb\xbf[model]\n", "line 1: starts with a byte order mark"),
        ("[model]".encode("utf-16"), "line 1: starts with a byte order mark"),
        ('[run]\n\ndir = "caf\xe9"\n'.encode("latin-1"), "line 3: byte 0xe9 is not UTF-8"),
        (b"[model]\ndim = 1\x00\n", "line 2: contains a NUL byte"),
    ],
)
def test_bad_bytes(tmp_path: Path, raw: bytes, message: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(raw)
    (line,) = problems(path)
    assert line.startswith(f"{path}: {message}")


def test_unreadable_files(tmp_path: Path) -> None:
    (line,) = problems(tmp_path / "none.toml")
    assert line == f"{tmp_path / 'none.toml'}: no such file"
    (line,) = problems(tmp_path)
    assert line.startswith(f"{tmp_path}: cannot be read: ")
    (line,) = problems(Path("a\0b"))
    assert "cannot be read" in line


def test_all_errors_of_a_file_at_once(tmp_path: Path) -> None:
    text = """
[modell]
[model]
dim = 0
n_layers = -3
norm_eps = nan
heads = 3
[vision_encoder]
type = "vitt"
[train]
batch_size = 7
grad_accum_steps = 2
seed = -1
seq_len = 5000
[[stages]]
name = "a"
optimizer.lr = "x"
train.seed = 3
"""
    path = write(tmp_path / "bad.toml", text)
    keys = [line.removeprefix(f"{path}: ").split(" = ")[0].split(":")[0] for line in problems(path, "--data.batching=3", "--x")]
    assert sorted(keys) == sorted(
        [
            "command line",
            "command line",
            "[modell]",
            "[model] dim",
            "[model] n_layers",
            "[model] norm_eps",
            "[model] heads",
            "[vision_encoder] type",
            "[train] batch_size",
            "[train] seed",
            "[[stages]] #1 steps",
            "[[stages]] #1 optimizer.lr",
            "[[stages]] #1 train.seed",
        ]
    )


def test_a_broken_stage_still_reports_its_overrides(tmp_path: Path) -> None:
    text = MINIMAL + '[[stages]]\nname = "a"\noptimizer.lr = "x"\ndata.forms = "x"\nscheduler.warmup_steps = 5\n'
    lines = problems(write(tmp_path / "a.toml", text))
    assert [line.split("#1 ")[1].split(":")[0].split(" = ")[0] for line in lines] == ["steps", "data.forms", "optimizer.lr"]


def test_no_after_effects_are_reported(tmp_path: Path) -> None:
    """The default n_heads = 4 does not divide 30; that is not what is wrong here."""
    path = write(tmp_path / "bad.toml", MINIMAL + "[model]\ndim = 30\nn_head = 3\n")
    assert problems(path) == [f"{path}: [model] n_head = 3: unknown key; did you mean 'n_heads'?"]
    path = write(tmp_path / "bad.toml", MINIMAL + '[model]\ndim = 30\nn_heads = "3"\n')
    assert len(problems(path)) == 1


def test_config_error_survives_pickling() -> None:
    assert pickle.loads(pickle.dumps(ConfigError(["a", "b"]))).problems == ["a", "b"]


# Overrides


@pytest.mark.parametrize(
    ("arguments", "section", "key", "value"),
    [
        (["--model.dim=64"], "model", "dim", 64),
        (["--model.dim", "64"], "model", "dim", 64),
        (["--model.dim=32", "--model.dim=64"], "model", "dim", 64),
        (["--optimizer.lr=1"], "optimizer", "lr", 1.0),
        (["--optimizer.lr", "3e-4"], "optimizer", "lr", 3e-4),
        (["--train.compile_model=true"], "train", "compile_model", True),
        (["--train.mixed_precision=fp32"], "train", "mixed_precision", "fp32"),
        (['--train.mixed_precision="fp32"'], "train", "mixed_precision", "fp32"),
        (["--run.dir=5"], "run", "dir", "5"),
        (["--run.dir=true"], "run", "dir", "true"),
        (["--run.dir", "a=b"], "run", "dir", "a=b"),
        (["--run.dir=a=b"], "run", "dir", "a=b"),
        (["--data.prompt_template={prompt}!"], "data", "prompt_template", "{prompt}!"),
        (['--data.prompt_template="{prompt}\\n"'], "data", "prompt_template", "{prompt}\n"),
        (["--optimizer.betas=[0.5, 0.75]"], "optimizer", "betas", (0.5, 0.75)),
        (['--optimizer.lr_scale."vision_encoder.*"=0.1'], "optimizer", "lr_scale", {"vision_encoder.*": 0.1}),
        (["--model.rope_scaling={factor = 2}"], "model", "rope_scaling", RopeScaling(factor=2.0)),
        (["--model.rope_scaling={factor = 2}", "--model.rope_scaling.factor=4"], "model", "rope_scaling", RopeScaling(factor=4.0)),
    ],
)
def test_overrides(tmp_path: Path, arguments: list[str], section: str, key: str, value: object) -> None:
    job = load_config(write(tmp_path / "a.toml", MINIMAL), arguments)
    found = getattr(getattr(job, section), key)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.dim=x"], 'command line: [model] dim = "x": must be an integer, not a string'),
        (["--model.dim=1.5"], "command line: [model] dim = 1.5: must be an integer"),
        (["--model.dimm=1"], "command line: [model] dimm = 1: unknown key; did you mean 'dim'?"),
        (["--modell.dim=1"], "[modell]: unknown section; did you mean 'model'?"),
        (["--model.dim.x=1"], "command line: [model] dim = {...}: must be an integer, not a table"),
        (["--model=1"], "command line: [model] = 1: must be a table"),
        (["--model.dim"], "command line: --model.dim: needs a value"),
        (["--model.dim", "--train.seed=1"], "command line: --model.dim: needs a value"),
        (["model.dim=1"], 'command line: "model.dim=1": must look like --section.key=value'),
        (["--=1"], "must look like --section.key=value"),
        (["--a..b=1"], "must look like --section.key=value"),
        (["--optimizer.lr=nan"], "command line: [optimizer] lr = nan: must be a finite number"),
        (["--stages.0.steps=1"], "[stages]"),
        (["--run.dir=\udcff"], "must be UTF-8 text"),
    ],
)
def test_bad_overrides(tmp_path: Path, arguments: list[str], message: str) -> None:
    lines = problems(write(tmp_path / "a.toml", MINIMAL), *arguments)
    assert any(message.strip("[]") in line for line in lines), lines


def test_overrides_reach_into_stages(tmp_path: Path) -> None:
    path = write(tmp_path / "a.toml", MINIMAL + '[[stages]]\nname = "a"\nsteps = 3\n[[stages]]\nname = "b"\nsteps = 4\n')
    job = load_config(path, ["--stages.1.steps=5", "--stages.0.optimizer.lr=0.5"])
    assert [(stage.steps, stage.optimizer) for stage in job.stages] == [(3, {"lr": 0.5}), (5, {})]
    assert problems(path, "--stages.2.steps=5") == ["command line: --stages.2.steps: stages has 2 entries, counted from 0; there is no '2'"]


def test_arch_on_the_command_line_makes_the_right_class(tmp_path: Path) -> None:
    path = write(tmp_path / "a.toml", MINIMAL + "[vlm.module_patterns]\nx = ['y']\n")
    job = load_config(path, ["--vlm.max_text_len=99", "--vlm.arch=mot", "--vlm.mot_image_n_heads=4"])
    assert job.vlm == MoTConfig(max_text_len=99, module_patterns={"x": ["y"]}, mot_image_n_heads=4)
    path = write(tmp_path / "b.toml", '[vlm]\narch = "cross_attention"\ncross_attention_n_heads = 4\n[train]\nmax_steps = 1\n')
    (line,) = problems(path, "--vlm.arch=mot")
    assert line.startswith(f"{path}: [vlm] cross_attention_n_heads = 4: unknown key")


# extends


def test_extends_merges_tables_and_replaces_lists(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    write(
        tmp_path / "root.toml",
        '[model]\ndim = 64\nn_layers = 9\n[optimizer.lr_scale]\na = 1\n[train]\nmax_steps = 7\n[vlm]\narch = "mot"\n',
    )
    middle = 'extends = "../root.toml"\n[model]\nn_layers = 2\n[optimizer]\nlr_scale = { b = 2 }\n[[stages]]\nname = "x"\nsteps = 3\n'
    write(tmp_path / "base" / "middle.toml", middle)
    path = write(tmp_path / "a.toml", 'extends = "base/middle.toml"\n[model]\nn_heads = 2\n[[stages]]\nname = "y"\nsteps = 4\n')
    job = load_config(path, ["--model.n_heads=8"])
    assert (job.model.dim, job.model.n_layers, job.model.n_heads) == (64, 2, 8)
    assert job.optimizer.lr_scale == {"a": 1.0, "b": 2.0}
    assert [stage.name for stage in job.stages] == ["y"]
    assert isinstance(job.vlm, MoTConfig)


def test_extends_drops_what_another_arch_does_not_know(tmp_path: Path) -> None:
    base = (
        '[vlm]\narch = "cross_attention"\nmax_text_len = 99\ncross_attention_n_heads = 4\n[adapter]\ntype = "pixel_shuffle"\nfactor = 7\n'
    )
    write(tmp_path / "base.toml", base + "[train]\nmax_steps = 7\n")
    job = load_config(write(tmp_path / "a.toml", 'extends = "base.toml"\n[vlm]\narch = "mot"\n[adapter]\ntype = "linear"\n'))
    assert job.vlm == MoTConfig(max_text_len=99)
    same = load_config(write(tmp_path / "b.toml", 'extends = "base.toml"\n[vlm]\nmax_text_len = 5\n'))
    assert same.vlm == CrossAttentionConfig(max_text_len=5, cross_attention_n_heads=4)
    assert same.adapter == PixelShuffleConfig(factor=7)
    child = write(tmp_path / "c.toml", 'extends = "base.toml"\n[vlm]\narch = "mot"\ncross_attention_n_heads = 4\n')
    assert f"{child}: [vlm] cross_attention_n_heads = 4: unknown key" in problems(child)[0]


def test_extends_names_the_file_at_fault(tmp_path: Path) -> None:
    base = write(tmp_path / "base.toml", MINIMAL + "[model]\ndim = 1.5\nn_layers = 0\n")
    path = write(tmp_path / "a.toml", 'extends = "base.toml"\n[model]\nn_heads = "x"\n')
    assert problems(path) == [
        f"{base}: [model] dim = 1.5: must be an integer, not a float",
        f'{path}: [model] n_heads = "x": must be an integer, not a string',
        f"{base}: [model] n_layers = 0: must be >= 1",
    ]
    path = write(tmp_path / "b.toml", 'extends = "none.toml"\n')
    assert problems(path) == [f"{tmp_path / 'none.toml'}: no such file (extended by {path})"]


def test_extends_in_a_circle(tmp_path: Path) -> None:
    write(tmp_path / "b.toml", 'extends = "a.toml"\n')
    (line,) = problems(write(tmp_path / "a.toml", 'extends = "./b.toml"\n'))
    assert "extend each other in a circle" in line
    (line,) = problems(write(tmp_path / "self.toml", 'extends = "self.toml"\n'))
    assert "circle" in line


# Plugins

PLUGIN = """
from __future__ import annotations
from dataclasses import dataclass
from kempnerforge.config import VLMConfig, registry
@registry.register_vlm_config
@dataclass
class LabConfig(VLMConfig):
    arch: str = "lab_{name}"
    depth: int | str = 3
"""


@pytest.mark.parametrize("where", ["toml", "parent", "command line"])
def test_plugin_file(tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = where.replace(" ", "_")
    (tmp_path / "sub").mkdir()
    plugin = write(tmp_path / "arch.py", PLUGIN.replace("{name}", name))
    text = f'[vlm]\narch = "lab_{name}"\ndepth = "deep"\n[train]\nmax_steps = 1\n'
    overrides: list[str] = []
    if where == "toml":
        path = write(tmp_path / "a.toml", 'plugins = ["arch.py"]\n' + text)
    elif where == "parent":
        write(tmp_path / "base.toml", 'plugins = ["arch.py"]\n[vlm]\narch = "mot"\nmot_image_n_heads = 4\n')
        path = write(tmp_path / "sub" / "a.toml", 'extends = "../base.toml"\n' + text)
    else:
        path = write(tmp_path / "sub" / "a.toml", text)
        monkeypatch.chdir(tmp_path)
        overrides = ['--plugins=["arch.py"]']
    try:
        job = load_config(path, overrides)
        assert job == load_config(path, overrides), "a second load must not register the arch twice"
        assert job.plugins == [str(plugin)]
        assert type(job.vlm).__name__ == "LabConfig"
        assert job.vlm is not None and vars(job.vlm)["depth"] == "deep"
        (line,) = problems(path, *overrides, "--vlm.depth=1.5")
        assert "[vlm] depth = 1.5: must be an integer or a string, not a float" in line
    finally:
        registry.vlm_configs._entries.pop(f"lab_{name}", None)


def test_plugin_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "my_lab_arch.py", PLUGIN.replace("{name}", "module"))
    monkeypatch.syspath_prepend(tmp_path)
    try:
        job = load_config(None, ['--plugins=["my_lab_arch"]', "--vlm.arch=lab_module", "--train.max_steps=1"])
        assert job.vlm is not None and job.vlm.arch == "lab_module"
        assert job.plugins == ["my_lab_arch"]
    finally:
        registry.vlm_configs._entries.pop("lab_module", None)
        sys.modules.pop("my_lab_arch", None)


@pytest.mark.parametrize("code", ["import no_such_thing", "1 / 0", "def (", "raise SystemExit(7)", "raise ValueError('two\\nlines')"])
def test_plugin_that_fails(tmp_path: Path, code: str) -> None:
    write(tmp_path / "broken.py", code)
    path = write(tmp_path / "a.toml", MINIMAL.replace("[vlm]", 'plugins = ["broken.py"]\n[vlm]'))
    for _ in range(2):
        (line,) = problems(path)
        assert line.startswith(f"{path}: plugins: 'broken.py' cannot be imported: ")
        assert "\n" not in line
    assert not [name for name in sys.modules if name.startswith("kempnerforge_plugin_broken")]


def test_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    entry = importlib.metadata.EntryPoint("lab", "no_such_lab.arch", "kempnerforge.plugins")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda *, group: seen.append(group) or [entry])
    (line,) = problems(None)
    assert "entry point 'lab' of 'kempnerforge.plugins' (no_such_lab.arch): ModuleNotFoundError" in line
    assert seen == ["kempnerforge.plugins"]


def test_sources_and_their_keys(tmp_path: Path) -> None:
    path = write(tmp_path / "a.toml", '[data]\nsource = "jsonl"\npath = "x.jsonl"\n[train]\nmax_steps = 1\n')
    assert load_config(path).data == JsonlConfig(path="x.jsonl")
    assert load_config(None, ["--data.source=text", "--data.path=x", "--train.max_steps=1"]).data == TextConfig(path="x")
    assert any("[data] path = '': source 'text' needs one" in line for line in problems(None, "--data.source=text"))


def test_config_imports_no_torch() -> None:
    code = "import kempnerforge.config, sys; print(sorted(m for m in sys.modules if m.split('.')[0] in ('torch', 'numpy', 'transformers')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_a_defect_where_an_arch_is_looked_up_is_no_input_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module of an arch is imported when the arch is first named; what breaks in it keeps its traceback."""

    def broken(name: str) -> type:
        raise ValueError("not enough values to unpack")

    monkeypatch.setitem(UNIONS, VLMConfig, replace(UNIONS[VLMConfig], class_for=broken))
    with pytest.raises(ValueError, match="^not enough values") as error:
        load_config(write(tmp_path / "a.toml", MINIMAL))
    assert not isinstance(error.value, InputError)


def numbers() -> Iterator[tuple[str, str, list[str]]]:
    """Section, the line that selects its class, and the keys of all numbers in that."""
    for section, kind in SECTIONS.items():
        union = UNIONS.get(kind)
        for cls in [kind] if union is None else [union.class_for(name) for name in union.entries.names()]:
            if dataclasses.is_dataclass(cls):
                keys = [key for key, wanted in fields_of(cls).items() if wanted in (int, float, int | None, float | None)]  # type: ignore[arg-type]
                yield section, f"{union.key} = {getattr(cls, union.key)!r}" if union is not None else "", keys


@pytest.mark.parametrize("value", ["9223372036854775807", "1099511627776", "-1099511627776", "1e308", "-1e300", "nan", "inf"])
def test_no_number_is_of_a_size_that_nothing_has(value: str, tmp_path: Path) -> None:
    """In any key: named, before any library has to make something of it."""
    tried = 0
    for section, which, keys in numbers():
        keys = [key for key in keys if key != "seed" or value.startswith("-") or not value.isdecimal()]
        (tmp_path / "job.toml").write_text("\n".join([f"[{section}]", which, *(f"{key} = {value}" for key in keys)]))
        found = problems(tmp_path / "job.toml")
        for key in keys:
            assert any(f"[{section}] {key} = " in line for line in found), (section, which, key, found)
        tried += len(keys)
    assert tried > 150
