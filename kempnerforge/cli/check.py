"""``kempnerforge check``."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kempnerforge.cli.numbers import whole
from kempnerforge.config import load_config, to_toml
from kempnerforge.util.errors import InputError, visible

if TYPE_CHECKING:
    from kempnerforge.inspection.cluster import ClusterStage
    from kempnerforge.inspection.plan import Plan, StagePlan
    from kempnerforge.training.batch_size import Choice
    from kempnerforge.training.setup import Assembly

HELP = """Check a config without training: every cross check, and what each stage trains and costs.

Reads the data, takes the first batch of every stage and runs the model on the meta device, so that a model that does not fit here can be
checked here. FLOPs are counted, not estimated: of one training sample, forward and backward, and of an answer to the stage's first prompt.
Memory is what one process holds for one micro-batch. With train.batch_size = "auto" the micro-batch is the one that one process takes
here. The line "export" says what `kempnerforge export` can write of it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="the TOML file")
    parser.add_argument(
        "--gpus", type=whole(1, 1 << 20), default=0, metavar="N", help="also plan the job for N devices: memory, traffic, time of a step"
    )
    parser.add_argument("--gpu", choices=("a100", "h100", "h200"), help="of --gpus: which (default: h200)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead of the tables")
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved TOML as well, sizes that follow from the data included"
    )


def run(args: argparse.Namespace) -> int:
    if args.gpu and not args.gpus:
        raise InputError(f"--gpu {args.gpu}: only --gpus reads it")
    args.gpu = args.gpu or "h200"
    job = load_config(args.config, args.overrides)
    from kempnerforge.inspection.data_remarks import data_remarks
    from kempnerforge.inspection.plan import plan

    found = plan(job)
    held_out = found.assembly.data.examined
    warnings = [*found.assembly.warnings(), *(held_out.remarks() if held_out else ()), *data_remarks(found.assembly)]
    export = _export(found.assembly)
    cluster = _on_cluster(found, args)
    warnings += [str(choice) for choice in found.choices.values() if not choice.rows]
    warnings += [f"{args.gpus} x {args.gpu}, stage {stage.stage.name!r}: {line}" for stage in cluster for line in stage.warnings]
    if args.json:
        stages = [_as_json(stage, found.choices.get(stage.stage.index)) for stage in found.stages]
        counts = held_out.counts() if held_out else None
        print(
            json.dumps(
                {"warnings": warnings, "stages": stages, "held_out": counts, "export": export}
                | ({"cluster": [_cluster_json(stage) for stage in cluster]} if cluster else {})
            )
        )
        return 0
    if args.print_config:
        print(to_toml(found.assembly.job))
    tokenizer, layout = found.assembly.tokenizer, found.assembly.data.layout
    print(f"tokenizer {job.data.tokenizer}: {tokenizer.vocab_size} tokens; {layout.image_tokens} positions an image; compute {found.dtype}")
    for stage in found.stages:
        _show(stage)
        if (choice := found.choices.get(stage.stage.index)) and choice.rows:
            print(choice)
        for note in found.assembly.data.notes(stage.stage):
            print(f"note: {visible(note)}")
    for stage in cluster:
        _show_cluster(stage, args.gpu)
    if held_out:
        print(held_out.summary())
    reason = export["reason"]
    print(f"export: kempnerforge only, because {visible(reason)}" if reason else f"export: hf ({export['class']})")
    for line in warnings:
        print(f"warning: {visible(line)}", file=sys.stderr)
    return 0


def _export(assembly: Assembly) -> dict[str, str | None]:
    """The format of an export, and the class of transformers that it is or the reason why it is none."""
    from kempnerforge.convert.commands import class_of

    try:
        return {"format": "hf", "class": class_of(assembly).name, "reason": None}
    except InputError as error:
        return {"format": "kempnerforge", "class": None, "reason": str(error)}


def _on_cluster(found: Plan, args: argparse.Namespace) -> list[ClusterStage]:
    if not args.gpus:
        return []
    from kempnerforge.inspection.cluster import GPUS, on_cluster

    return on_cluster(found, args.gpus, GPUS[args.gpu])


def _cluster_json(stage: ClusterStage) -> dict[str, Any]:
    return {
        "name": stage.stage.name,
        "processes": stage.processes,
        "memory_bytes": stage.memory,
        "rows": stage.rows,
        "largest_rows": stage.largest_rows,
        "gathered_bytes": stage.gathered,
        "reduced_bytes": stage.reduced,
        "copied_bytes": stage.copied,
        "exchanged_bytes": stage.exchanged,
        "compute_s": stage.compute_s,
        "exposed_s": stage.exposed_s,
        "tokens_per_s": stage.tokens / stage.step_s,
        "mfu": stage.mfu,
    }


def _show_cluster(stage: ClusterStage, gpu: str) -> None:
    gib = lambda size: f"{size / 2**30:,.1f} GiB"
    kinds = ", ".join(f"{kind} {gib(size)}" for kind, size in stage.memory.items() if size)
    sent = stage.gathered + stage.reduced + stage.copied + stage.exchanged
    print(f"stage {stage.stage.name} on {stage.processes} x {gpu}, a process: {gib(stage.total)} ({kinds})")
    print(f"  micro-batches of {stage.rows} rows, at most {stage.largest_rows} fit; a step receives {gib(sent)}")
    print(
        f"  step {stage.step_s:.3g} s, {stage.exposed_s / stage.step_s:.0%} of it communication that nothing hides; "
        f"{stage.tokens / stage.step_s:,.0f} useful tokens/s, MFU {stage.mfu:.1%} (a model of time: docs/runs.md)"
    )


def _as_json(plan: StagePlan, choice: Choice | None) -> dict[str, Any]:
    from kempnerforge.training.accounting import GenerationCost

    modules = {
        m.name: {
            "parameters": m.parameters,
            "trainable": m.trainable,
            "flops_per_sample": m.flops,
            "forward_flops_per_sample": m.forward_flops,
        }
        for m in plan.cost.modules
    }
    answer = plan.generation if isinstance(plan.generation, GenerationCost) else None
    return {
        "name": plan.stage.name,
        "steps": plan.stage.steps,
        "modules": modules,
        "parameters": sum(m.parameters for m in plan.cost.modules),
        "trainable": sum(m.trainable for m in plan.cost.modules),
        "flops_per_sample": plan.cost.flops,
        "forward_flops_per_sample": plan.cost.forward_flops,
        "prompt_length": answer.prompt_length if answer else None,
        "prefill_flops": answer.prefill_flops if answer else None,
        "decode_flops_per_token": answer.decode_flops if answer else None,
        "state_bytes": plan.cost.state_bytes,
        "activation_bytes": plan.cost.activation_bytes,
        "row_length": plan.row_length,
        "useful_share": plan.useful,
        "auto": asdict(choice) if choice else None,
    }


def _show(plan: StagePlan) -> None:
    from rich.table import Table

    from kempnerforge.util.screen import Screen

    cost, parts = plan.cost, plan.cost.modules
    table = Table(title=f"stage {plan.stage.name}: steps {plan.stage.start} to {plan.stage.end}", title_justify="left")
    table.add_column("module", overflow="fold")
    for column in ("parameters", "trainable", "lr", "forward\nMFLOP", "backward\nMFLOP"):
        table.add_column(column, justify="right", no_wrap=column != "lr")
    for m in parts:
        scale = ", ".join(f"{s:g}" for s in plan.lr.get(m.name, [])) if m.trainable else "frozen" if m.parameters else ""
        table.add_row(m.name, f"{m.parameters:,}", f"{m.trainable:,}", scale, _mega(m.forward_flops), _mega(m.backward_flops))
    sizes = f"{sum(m.parameters for m in parts):,}", f"{sum(m.trainable for m in parts):,}"
    table.add_row("total", *sizes, "", _mega(cost.forward_flops), _mega(cost.backward_flops), style="bold")
    console = Screen(sys.stdout, width=100)
    console.print(table)
    for line in (
        f"training: {_mega(cost.flops)} MFLOP a sample; rows of {plan.row_length} positions, {plan.useful:.0%} of them useful",
        _generation_line(plan),
        f"memory: weights, gradients, optimizer {cost.state_bytes / 2**20:,.1f} MiB; activations {cost.activation_bytes / 2**20:,.1f} MiB\n",
    ):
        console.print(line)


def _generation_line(plan: StagePlan) -> str:
    answer = plan.generation
    if isinstance(answer, str):
        return f"generation: {answer}"
    prompt = f"{_mega(answer.prefill_flops)} MFLOP to read a prompt of {answer.prompt_length} positions"
    return f"generation: {prompt}, {_mega(answer.decode_flops)} MFLOP a token"


def _mega(flops: float) -> str:
    return f"{flops / 1e6:,.1f}"
