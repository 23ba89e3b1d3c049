"""``config.json`` of somebody's models, each key of it changed to what no model has: a refusal that names file and key, or a model; never another
exception, and soon.
"""

from __future__ import annotations

import copy
import json
import random
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from kempnerforge.config import JobConfig, ModelConfig, TrainConfig, VLMConfig
from kempnerforge.config.data import JsonlConfig
from kempnerforge.config.vision import HFTowerConfig, MllamaTowerConfig
from kempnerforge.convert.commands import import_model
from kempnerforge.interop import read_weights
from kempnerforge.interop.open_external import open_external
from kempnerforge.model import memory
from kempnerforge.model.hf_checks import check_config, class_call
from kempnerforge.model.memory import within_memory
from kempnerforge.model.qwen_vl import QwenTowerConfig
from kempnerforge.model.vision import build_vision_encoder
from kempnerforge.training.initial_weights import initialise
from kempnerforge.training.setup import assemble
from kempnerforge.util.errors import InputError
from tests.interop import families, test_llava_next, test_llava_original, test_mllama, test_nanovlm, test_qwen_vl, tiny_vlms
from tests.model import test_hf_towers as towers
from tests.params import quick
from tests.training.tiny import CONFIG, call, make_job

Open = Callable[[Path], object]
WRONG: dict[type, Any] = {bool: "yes", int: "one", float: "one", str: 3, list: "list", dict: ["a"]}
VALUES = [WRONG, {}, [], None, -1, 0, 2**63 - 1, 1e308, "x" * 200_000]
EFFECTS = (
    "another model than [model]",
    "of the weights of",
    "has shape",
    "lacks",
    "positions and the text model has",
    "text weights are read from",
    "does not divide the grid",
    "image tokens in the stream that is",
    "tokens, but image_seq_length",
    "one image gives features of shape",
    "has no place for",
    "the token of an image is",
    "intermediate_layers = ",
    "default supported aspect ratios",
)
"""Said where a value that a model can have makes it another one than the files hold."""
SECONDS = 12
"""Of one door at most: the largest tower that a class has by default is built in so many."""


def _nanovlm(path: Path) -> None:
    path.mkdir()
    test_nanovlm.save(path, test_nanovlm.tensors())


def _llava_original(path: Path) -> None:
    tiny_vlms.save("llava", path.with_name("transformers"))
    test_llava_original.original(path.with_name("transformers"), path, "beside")


def _text(name: str) -> Open:
    def save(path: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(families, "THEIRS", families.THEIRS | {"vocab_size": tiny_vlms.VOCAB, "max_position_embeddings": 160})
            families.save(name, path)
        tiny_vlms.write_tokenizer(path, prefix=False)

    return save


def _vlm(name: str) -> Open:
    return lambda path: tiny_vlms.save(name, path)


def _tower(case: towers.Case) -> Open:
    return lambda path: towers.saved(case.whole or case.model, path)


TEXTS: dict[str, Open] = {name: _text(name) for name in families.FAMILIES}
VLMS: dict[str, Open] = {name: _vlm(name) for name in tiny_vlms.MODELS} | {
    "mllama": test_mllama.save,
    **{name: partial(test_qwen_vl.save, name) for name in test_qwen_vl.KINDS},
    "nanovlm": _nanovlm,
    "llava original": _llava_original,
    "llava_next": test_llava_next.make,
}
WHOLE: dict[str, Open] = {name: _vlm(name) for name in (*tiny_vlms.MODELS, *tiny_vlms.IMAGE_SIZES, "internvl")}
TOWERS: dict[str, Open] = {name: _tower(case) for name, case in towers.CASES.items()} | {
    name: VLMS[name] for name in ("mllama", *test_qwen_vl.KINDS)
}
MAKERS = {"import": TEXTS | VLMS, "init": TEXTS | {name: VLMS[name] for name in tiny_vlms.MODELS}, "hf": WHOLE, "tower": TOWERS}
EVERY = [(door, name) for door, names in MAKERS.items() for name in names]


def opener(door: str, name: str, path: Path, whole: bool) -> Open:
    """What a command does with the directory.

    Args:
        path: as it was.
        whole: with the weights, in memory; else as ``check`` does it.
    """
    if door == "import":
        return (lambda p: import_model(p, fresh(p.with_name("out")))) if whole else open_external
    if door == "init":
        model = open_external(path).job.model
        return lambda p: read_weights(p, model)
    if door == "hf":
        return lambda p: _start(p, whole, image_size=tiny_vlms.IMAGE_SIZES.get(name, 0))
    if name in test_qwen_vl.KINDS:
        return lambda p: _build(QwenTowerConfig(path=str(p), pretrained=whole, image_size=28), whole)
    config = MllamaTowerConfig if name == "mllama" else towers.CASES[name].config
    return lambda p: _build(config(path=str(p), pretrained=whole), whole)


def fresh(path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    return path


def _start(path: Path, whole: bool, image_size: int = 0) -> None:
    vlm = VLMConfig.for_arch("hf", path=str(path), max_text_len=64, pretrained=whole, image_size=image_size)
    job = JobConfig(
        model=ModelConfig(max_seq_len=128), vlm=vlm, data=JsonlConfig(path="unread"), train=TrainConfig(max_steps=4, seq_len=96)
    )
    assembly = assemble(job, data=False, device=None if whole else "meta")
    if whole:
        initialise(assembly.model)


def _build(config: HFTowerConfig, whole: bool) -> None:
    with torch.device("cpu" if whole else "meta"):
        build_vision_encoder(config)


# ---- changes --------------------------------------------------------------------------------------------------------


def places(table: dict[str, Any], at: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    for key, value in table.items():
        yield (*at, key)
        if isinstance(value, dict):
            yield from places(value, (*at, key))
        if isinstance(value, list) and value:
            yield (*at, key, 0)


def changes(config: dict[str, Any]) -> Iterator[tuple[tuple[str | int, ...], Any, dict[str, Any]]]:
    """Place, value and the config with it."""
    for at in places(config):
        for value in VALUES:
            changed: Any = copy.deepcopy(config)
            inner = changed
            for key in at[:-1]:
                inner = inner[key]
            value = WRONG.get(type(inner[at[-1]]), "text") if value is WRONG else value
            inner[at[-1]] = value
            yield at, value, changed


def sweep(path: Path, work: Path, open_it: Open, share: float = 1.0) -> tuple[Counter[str], list[str]]:
    """How often which answer came, and what is wrong. ``share`` of all changes is tried."""
    shutil.copytree(path, work)
    open_it(work)
    counts, wrong, draw = Counter[str](), list[str](), random.Random(0)
    for at, value, config in changes(json.loads((path / "config.json").read_text())):
        if draw.random() > share:
            continue
        (work / "config.json").write_text(json.dumps(config))
        what, began = f"{'.'.join(map(str, at))} = {str(value)[:40]}", time.monotonic()
        try:
            open_it(work)
            counts["taken"] += 1
        except InputError as error:
            counts["refused"] += 1
            said, key = str(error), next(str(part) for part in reversed(at) if isinstance(part, str))
            if key.endswith("_config") and not value:  # a part with the sizes of its class: the error is about what no longer fits
                continue
            named = str(work) in said or "image tokens in the stream that is" in said
            if not named or len(said) > 1500 or not (key in said or any(words in said for words in EFFECTS)):
                wrong.append(f"{what}: {said[:400]}")
        except Exception as error:
            wrong.append(f"{what}: {type(error).__name__}: {str(error)[:200]}")
        if (seconds := time.monotonic() - began) > SECONDS:
            wrong.append(f"{what}: took {seconds:.0f} s")
    return counts, wrong


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """The directory of a door and a name; each is made once."""
    made: dict[Any, Path] = {}

    def find(door: str, name: str) -> Path:
        make = MAKERS[door][name]
        if make not in made:
            made[make] = tmp_path_factory.mktemp("model") / name.replace(" ", "-")
            make(made[make])
        return made[make]

    return find


@pytest.mark.parametrize(("door", "name"), quick(EVERY, *EVERY[::2]), ids=[f"{door}-{name}" for door, name in EVERY])
def test_some_changes(door: str, name: str, saved: Callable[[str, str], Path], tmp_path: Path) -> None:
    path = saved(door, name)
    counts, wrong = sweep(path, tmp_path / "work", opener(door, name, path, whole=False), share=0.06)
    assert not wrong, "\n".join(wrong)
    assert counts["refused"] > 0, counts


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("door", "name"), EVERY, ids=[f"{door}-{name}" for door, name in EVERY])
@pytest.mark.parametrize("whole", [False, True], ids=["shapes", "weights"])
def test_all_changes(door: str, name: str, whole: bool, saved: Callable[[str, str], Path], tmp_path: Path) -> None:
    path = saved(door, name)
    counts, wrong = sweep(path, tmp_path / "work", opener(door, name, path, whole))
    print(f"{door} {name}, {'weights' if whole else 'shapes'}: {dict(counts)}")
    assert not wrong, "\n".join(wrong)


def test_a_number_in_a_path_is_no_hint() -> None:
    """An error is about a key because of what the class says, not because of the directory's name."""
    with (
        pytest.raises(InputError, match="cannot be built; TypeError: no list$"),
        class_call("models/tiny-0", "cannot be built", {"pad_id": 0}),
    ):
        raise TypeError("no list")


# ---- size -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vision_config.hidden_size", 2**20),
        ("text_config.vocab_size", 2**31 - 1),
        ("text_config.intermediate_size", 2**31 - 2),
        ("text_config.num_hidden_layers", 4096),
    ],
)
@pytest.mark.parametrize("door", ["import", "hf"])
def test_a_model_that_does_not_fit_into_memory_is_refused_before_it_is_made(
    door: str, key: str, value: int, saved: Callable[[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "memory_bytes", lambda: 2**24)
    path = saved("hf", "llava")
    work = tmp_path / "work"
    shutil.copytree(path, work)
    config = json.loads((path / "config.json").read_text())
    part, name = key.split(".")
    config[part][name] = value
    (work / "config.json").write_text(json.dumps(config))
    began = time.monotonic()
    with pytest.raises(InputError, match=f"{work.name}.* more than .* GiB of parameters.*{name} = {value}"):
        import_model(work, tmp_path / "out") if door == "import" else _start(work, whole=True)
    assert time.monotonic() - began < SECONDS


def test_what_fits_is_built(saved: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is of the bytes of all parameters, each counted once."""
    sizes = []
    path = saved("hf", "llava")
    model = hf.LlavaForConditionalGeneration(hf.AutoConfig.from_pretrained(path))
    sizes = sum(p.nbytes for p in model.parameters())
    monkeypatch.setattr(memory, "memory_bytes", lambda: sizes)
    _start(path, whole=True)
    monkeypatch.setattr(memory, "memory_bytes", lambda: sizes - 1)
    with pytest.raises(InputError, match="GiB of parameters"):
        _start(path, whole=True)


def test_a_config_of_ours_that_does_not_fit(tmp_path: Path) -> None:
    for key, value, says in (
        ("model.vocab_size", 2**31 - 1, "model has more than .* GiB of parameters.*; look at model.vocab_size = 2147483647"),
        ("model.n_layers", 2**30, r"n_layers = 1073741824: must be <= 4096"),
        ("vision_encoder.n_layers", 2**30, r"n_layers = 1073741824: must be <= 4096"),
    ):
        ended = call("train", make_job(tmp_path), f"--{key}={value}")
        assert ended.code == 2, ended.err
        assert re.search(says, ended.err), ended.err


def test_memory_is_of_the_machine() -> None:
    with (
        torch.device("meta"),
        within_memory({"width": 2**40}, meta=True),
        pytest.raises(InputError, match=r"GiB of memory; weight of a Linear"),
    ):
        torch.nn.Linear(2**40, 2)
    torch.nn.Linear(2, 2)  # nothing is counted afterwards


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": ["llava"]}, 'model_type = \\["llava"\\]: must be a text'),
        ({"vision_config": 3}, "vision_config = 3: must be a table"),
        ({"a": {"num_hidden_layers": 5000}}, "a.num_hidden_layers = 5000: must be at most 4096"),
        ({"rope_scaling": {"factor": "two"}}, 'rope_scaling.factor = "two": must be a number'),
        ({"hidden_size": [4, 2**40]}, "hidden_size = .*: must be at most 2147483647"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps = nan: must be a finite number"),
        ({"torch_dtype": "nn"}, 'torch_dtype = "nn": must be the name of a dtype'),
    ],
)
def test_what_is_no_size_of_a_model(config: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        check_config("there/config.json", config)


def test_what_real_files_have_is_taken() -> None:
    check_config(
        "there",
        {
            "bos_token_id": 1, "pad_token_id": -1, "vision_feature_layer": -2, "torch_dtype": "torch.bfloat16", "quantization_config": None,
            "layer_types": ["full_attention"], "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 8192},
            "intermediate_layers_indices": [3, 7], "vocab_size": 256000, "id2label": {"0": "a"}, "auto_map": {"AutoConfig": "x.Y"},
            "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}, "text_config": {"num_experts": 0},
        },
    )  # fmt: skip


# ---- through the commands -------------------------------------------------------------------------------------------


def check_of(path: Path, folder: Path) -> Any:
    """``kempnerforge check`` of a job that would train the model at ``path`` from random weights."""
    text = CONFIG.split("[vision_encoder]")[0].replace('dim = 32\nn_layers = 2\nn_heads = 2\nactivation = "gelu"\n', "")
    text += f'[vlm]\narch = "hf"\npath = "{path}"\npretrained = false\nfreeze = []\nmax_text_len = 32\n[data]' + CONFIG.split("[data]")[1]
    return call("check", make_job(folder, config=text.replace("tokenizer_vocab_size = 300\n", "")))


UNBUILDABLE: dict[str, tuple[dict[str, Any], str]] = {
    "fast_vlm": (
        {
            "vision_config": {"model_type": "timm_wrapper", "architecture": "fastvit_mci3"},
            "text_config": tiny_vlms.TEXT | {"model_type": "qwen2"},
        },
        "timm",
    ),
    "vipllava": (
        {
            "vision_config": tiny_vlms.TOWER | {"model_type": "clip_vision_model"},
            "text_config": tiny_vlms.TEXT | {"model_type": "llama"},
            "vision_feature_layers": [-2, -9],
        },
        "VipLlavaForConditionalGeneration",
    ),
    "paligemma": (
        {
            "vision_config": tiny_vlms.TOWER | {"model_type": "siglip_vision_model"},
            "text_config": tiny_vlms.TEXT | {"model_type": "gemma", "num_key_value_heads": "one"},
        },
        "num_key_value_heads",
    ),
}


@pytest.mark.parametrize("kind", UNBUILDABLE)
def test_a_class_that_cannot_be_built_is_one_line(kind: str, tmp_path: Path) -> None:
    config, says = UNBUILDABLE[kind]
    there = tmp_path / "there"
    tiny_vlms.write_tokenizer(there, prefix=False)
    (there / "config.json").write_text(json.dumps(config | {"model_type": kind, "image_token_index": 3}))
    (there / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    ended = check_of(there, tmp_path / "job")
    line = ended.err[ended.err.find("error:") :].strip()
    assert ended.code == 2 and "\n" not in line, ended.err
    assert str(there) in line and says in line, line


def test_the_side_of_a_square_may_be_a_list(saved: Callable[[str, str], Path], tmp_path: Path) -> None:
    """InternVL's image_size is [28, 28]: 16 patches, shuffled to 4 tokens."""
    path = saved("hf", "internvl")
    assert json.loads((path / "config.json").read_text())["vision_config"]["image_size"] == [28, 28]
    ended = check_of(path, tmp_path)
    assert ended.code == 0, ended.err
    assert "4 positions an image" in ended.out, ended.out
