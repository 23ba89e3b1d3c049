"""What this program computes, as digests: record them before a change that is to move nothing, compare after it.

Usage: PYTHONPATH=. python benchmarks/same_results.py record DIR          runs every case, writes DIR/digests.json and keeps the runs
       PYTHONPATH=. python benchmarks/same_results.py compare DIR [CASE ...]   runs them again in a temporary directory and compares

Cases: each architecture, optimizer, schedule, batching mode and kind of image input; stages with LoRA; two ranks; each family of models that
can be imported, with its logits and the bytes of its export. ``compare`` also continues, from the middle, the runs that ``record`` left, and
loads its imported models. Prints one line a case; exits with 1 if a digest differs.

Figures of one machine: digests of another processor or torch version differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kempnerforge import load_pretrained
from kempnerforge.checkpoint import load, resolve, tensor_info
from kempnerforge.cli.main import run
from kempnerforge.config import load_config
from kempnerforge.convert.verify import make_probe, our_logits
from kempnerforge.data.batching.batch import Batch
from kempnerforge.training.setup import assemble
from tests.interop import families, tiny_vlms
from tests.training.tiny import CONFIG, TIMING, make_job

ROOT = Path(__file__).resolve().parent.parent
STEPS, BATCHES = 8, 20
ADDED = ("eval/cut",)
"""Metrics that records made before do not have."""
Digests = dict[str, str]

TILES = """
[data.images]
fit = "tiles"
tiling = "grid"
max_side = 32
"""
LORA = """
[[lora]]
module = "transformer.layers.*.attention.*"
rank = 4

[[stages]]
name = "align"
steps = 3
freeze = [{ module = "transformer" }]

[[stages]]
name = "lora"
steps = 5
freeze = [{ module = "*" }, { module = "lora", frozen = false }]
optimizer.lr = 1e-3
"""
MIXTURE = """
[[data.parts]]
source = "jsonl"
path = "{folder}/train.jsonl"
prompt_column = "prompt"
eval_path = "{folder}/test.jsonl"

[[data.parts]]
source = "jsonl"
path = "{folder}/test.jsonl"
prompt_column = "prompt"
"""
TRAINED: dict[str, tuple[str, tuple[str, ...]]] = {
    **{arch: ("", (f"--vlm.arch={arch}",)) for arch in ("joint_decoder", "mot", "moma")},
    "cross_attention": ("", ("--vlm.arch=cross_attention", "--vlm.cross_attention_every_n_layers=1")),
    **{mask: ("", (f"--vlm.attention_mask={mask}",)) for mask in ("prefix", "image_bidirectional")},
    **{name: ("", (f"--optimizer.name={name}",)) for name in ("muon", "lion")},
    "schedule_free_adamw": ("", ("--optimizer.name=schedule_free_adamw", "--scheduler.name=constant", "--scheduler.warmup_steps=2")),
    **{name: ("", (f"--scheduler.name={name}", "--scheduler.warmup_steps=2")) for name in ("linear", "wsd")},
    **{name: ("", (f"--adapter.type={name}",)) for name in ("mlp_2layer", "pixel_shuffle", "avg_pool")},
    "perceiver": ("", ("--adapter.type=perceiver", "--adapter.latents=4")),
    "bf16": ("", ("--train.mixed_precision=bf16", "--train.ema_decay=0.9", "--train.activation_checkpointing=true")),
    "pad": ("", ("--data.batching=pad", "--train.grad_accum_steps=2")),
    "packed mixture": (MIXTURE, ("--data.batching=pack", "--data.num_workers=1")),
    "tiles": (TILES, ()),
    "lora": (LORA, ("--run.init_from={base}", '--run.init_allow=["*.lora_*"]')),
    "two ranks": ("", ("--nproc=2", "--vlm.arch=mot")),
}
"""Case: what its TOML has besides ``tests/training/tiny.py``, and the words of its command line."""


LATER = ("image_parts", "row_image_tokens", "row_codes", "target_weights")
"""Fields of a batch that the versions which are compared with do not have."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["record", "compare"])
    parser.add_argument("kept", type=Path, help="directory of the record")
    parser.add_argument("cases", nargs="*", help="of compare; default: all")
    args = parser.parse_args()
    kept: Path = args.kept.resolve()
    torch.set_num_threads(1)
    os.chdir(ROOT)
    if args.action == "record":
        kept.mkdir(parents=True)
        found = {name: case(kept / name.replace(" ", "-")) for name, case in cases()}
        (kept / "digests.json").write_text(json.dumps(found, indent=1))
        return 0
    before: dict[str, Digests] = json.loads((kept / "digests.json").read_text())
    wrong = 0
    for name, case in cases(kept):
        if args.cases and name not in args.cases:
            continue
        with tempfile.TemporaryDirectory() as folder:
            now = case(Path(folder) / "case")
        expected = before[name.removeprefix(CONTINUED)]
        differ = [key for key in now if now[key] != expected.get(key)]
        differ += [] if name.startswith(CONTINUED) else sorted(expected.keys() - now.keys())
        print(f"{name:28} {len(now):4} digests {'equal' if not differ else f'{len(differ)} DIFFER: {differ[:6]}'}", flush=True)
        wrong += bool(differ)
    return int(wrong > 0)


CONTINUED = "continued: "


def cases(kept: Path | None = None) -> Iterator[tuple[str, Callable[[Path], Digests]]]:
    """Every case by name; with a record at ``kept`` its runs are continued as well, and its sources of imports are taken."""
    yield "quickstart", quickstart
    for name, (toml, words) in TRAINED.items():
        yield name, lambda folder, toml=toml, words=words: trained(folder, toml, words)
        if kept is not None:
            old = kept / name.replace(" ", "-")
            yield f"{CONTINUED}{name}", lambda folder, old=old, words=words: continued(old, folder, words)
    for name in families.FAMILIES:
        yield f"import {name}", lambda folder, name=name: imported(folder, kept, f"import {name}", lambda at: text(name, at))
    for name in tiny_vlms.MODELS:
        yield f"import {name}", lambda folder, name=name: imported(folder, kept, f"import {name}", lambda at: tiny_vlms.save(name, at))


# ---- the cases ------------------------------------------------------------------------------------------------------


def quickstart(folder: Path) -> Digests:
    """Its first batches and eight steps of it."""
    command("train", "configs/quickstart.toml", f"--run.dir={folder}/run", f"--train.max_steps={STEPS}", "--eval.at_end=false")
    return batches(ROOT / "configs/quickstart.toml", ()) | run_digests(folder / "run")


def trained(folder: Path, toml: str, words: Iterable[str]) -> Digests:
    """A short run, its first batches, a checkpoint from its middle, and the export of its end."""
    config = CONFIG.replace('prompt_column = "prompt"\n', "").replace("eval_path", "# eval_path") if toml == MIXTURE else CONFIG
    if toml == MIXTURE:
        config = config.replace('source = "jsonl"\npath', 'source = "mixture"\n# path')
    job = make_job(folder, config=config, extra=toml.replace("{folder}", str(folder)))
    words = [word.replace("{base}", str(folder / "base")) for word in words]
    if toml == LORA:
        command("train", make_job(folder), f"--run.dir={folder}/base", "--train.max_steps=2")
        job = make_job(folder, extra=toml)
    fixed = (f"--train.max_steps={STEPS}", f"--checkpoint.interval={STEPS // 2}", "--checkpoint.keep_last_n=3", "--eval.interval=4")
    command("train", job, *fixed, *words)
    command("export", folder / "run", folder / "export", "--format=kempnerforge")
    sections = [word for word in words if not word.startswith("--nproc")]
    return batches(job, (*fixed, *sections)) | run_digests(folder / "run") | file_digests(folder / "export", "export")


def continued(old: Path, folder: Path, words: Iterable[str]) -> Digests:
    """The second half of a run that another version of the program began."""
    shutil.copytree(old / "run", folder)
    shutil.rmtree(folder / f"checkpoints/step-{STEPS:08d}")
    for name in ("complete.json", "report.html"):
        (folder / name).unlink()
    nproc = [word for word in words if word.startswith("--nproc")]
    command("train", folder / "config.toml", f"--run.dir={folder}", *nproc)
    return run_digests(folder)


def text(family: str, path: Path) -> None:
    theirs = families.THEIRS
    families.THEIRS = theirs | {"vocab_size": tiny_vlms.VOCAB, "max_position_embeddings": 160}
    families.save(family, path)
    families.THEIRS = theirs
    tiny_vlms.write_tokenizer(path, prefix=False)


def imported(folder: Path, kept: Path | None, name: str, save: Callable[[Path], object]) -> Digests:
    """A model of transformers here: its logits, the run that it becomes, and its export."""
    source = folder / "source" if kept is None else kept / name.replace(" ", "-") / "source"
    if kept is None:
        save(source)
    command("import", source, folder / "run")
    command("export", folder / "run", folder / "export")
    found = {"logits": digest(logits(folder / "run"))}
    if kept is not None and not torch.equal(logits(folder / "run"), logits(kept / name.replace(" ", "-") / "run")):
        found["loaded"] = "the run of the record has other logits"
    return found | tensor_digests(folder / "run") | file_digests(folder / "export", "export", source.parent)


@torch.no_grad()
def logits(run_dir: Path) -> Tensor:
    model, processor = load_pretrained(run_dir, device="cpu")
    assembly = processor.assembly
    probe = make_probe(assembly, None, tiny_vlms.VOCAB)
    return our_logits(model, probe.batch)


# ---- digests --------------------------------------------------------------------------------------------------------


def command(*words: object) -> None:
    """The command line, in this process if one is enough."""
    text_words = [str(word) for word in words]
    if any(word.startswith("--nproc") for word in text_words):
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-m", "kempnerforge", *text_words], check=True, env=env, stderr=subprocess.DEVNULL)
    elif code := run(text_words):
        raise SystemExit(f"kempnerforge {' '.join(text_words)}: exit code {code}")


def digest(value: object) -> str:
    """Of a tensor's values, shape and type, or of JSON."""
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous()
        head, body = f"{data.dtype} {tuple(data.shape)}", data.flatten().view(torch.uint8).numpy().tobytes()
        return hashlib.sha256(head.encode() + body).hexdigest()[:16]
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def batches(config: Path, words: Iterable[str]) -> Digests:
    """Of each of the first batches. Its pairs follow from the rest, and recordings of earlier versions do not have them."""
    assembly = assemble(load_config(config, list(words)))
    names = [f.name for f in fields(Batch) if not f.name.startswith("pair_") and f.name not in LATER]
    stream = islice(assembly.data.batches(assembly.stages[0], 0), BATCHES)
    return {f"batch {k}": digest([_plain(getattr(batch, name)) for name in names]) for k, batch in enumerate(stream)}


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return digest(value)
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else str(value)


def run_digests(run_dir: Path) -> Digests:
    """Of the metrics of each step and of the last checkpoint."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    rows = [{key: value for key, value in line.items() if key not in (*TIMING, *ADDED)} for line in lines]
    found = {f"metrics of step {row['step']}, {min(row.keys() - {'step'}, default='')}": digest(row) for row in rows}
    return found | tensor_digests(run_dir)


def tensor_digests(run_dir: Path) -> Digests:
    path = resolve(run_dir)
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in tensor_info(path).items()}
    load(path, tensors)
    return {f"checkpoint {name}": digest(tensor) for name, tensor in tensors.items()}


def file_digests(folder: Path, name: str, *named: Path) -> Digests:
    """Of the bytes of each file, but for the paths in ``named`` and that of the case, which some files hold."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        for place in (folder.parent, *named):
            content = content.replace(str(place).encode(), b"")
        found[f"{name} {path.relative_to(folder)}"] = digest(content.hex())
    return found


if __name__ == "__main__":
    sys.exit(main())
