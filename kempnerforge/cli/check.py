"""``kempnerforge check``."""

from __future__ import annotations

import argparse
import json
import sys

from kempnerforge.config import load_config, to_toml

HELP = """Check a config without training: every cross check, and what each stage trains and costs.

Reads the data, takes the first batch of every stage and runs the model on the meta device, so that a model that does not fit here can be
checked here. FLOPs are those of one sample, forward and backward; memory is what one process holds for one micro-batch."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="the TOML file")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead of the tables")


def run(args: argparse.Namespace) -> int:
    job = load_config(args.config, args.overrides)
    from kempnerforge.training.plan import plan

    found = plan(job)
    if args.json:
        print(json.dumps({"warnings": job.warnings(), "stages": [_as_json(stage) for stage in found.stages]}))
        return 0
    print(to_toml(found.assembly.job))
    tokenizer, layout = found.assembly.tokenizer, found.assembly.layout
    print(f"tokenizer {job.data.tokenizer}: {tokenizer.vocab_size} tokens; {layout.image_tokens} positions an image; compute {found.dtype}")
    for stage in found.stages:
        _show(stage)
    for line in job.warnings():
        print(f"warning: {line}", file=sys.stderr)
    return 0


def _as_json(plan) -> dict:
    modules = {m.name: {"parameters": m.parameters, "trainable": m.trainable, "flops_per_sample": m.flops} for m in plan.cost.modules}
    return {
        "name": plan.stage.name,
        "steps": plan.stage.steps,
        "modules": modules,
        "parameters": sum(m.parameters for m in plan.cost.modules),
        "trainable": sum(m.trainable for m in plan.cost.modules),
        "flops_per_sample": plan.cost.flops,
        "state_bytes": plan.cost.state_bytes,
        "activation_bytes": plan.cost.activation_bytes,
        "row_length": plan.row_length,
        "useful_share": plan.useful,
    }


def _show(plan) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"stage {plan.stage.name}: steps {plan.stage.start} to {plan.stage.end}", title_justify="left")
    table.add_column("module")
    for column in ("parameters", "trainable", "lr x", "MFLOP/sample"):
        table.add_column(column, justify="right")
    for m in plan.cost.modules:
        scale = ", ".join(f"{s:g}" for s in plan.lr_scale.get(m.name, [])) if m.trainable else "frozen" if m.parameters else ""
        table.add_row(m.name, f"{m.parameters:,}", f"{m.trainable:,}", scale, f"{m.flops / 1e6:,.1f}")
    total = plan.cost.modules
    table.add_row(
        "total",
        f"{sum(m.parameters for m in total):,}",
        f"{sum(m.trainable for m in total):,}",
        "",
        f"{plan.cost.flops / 1e6:,.1f}",
        style="bold",
    )
    console = Console(width=100)
    console.print(table)
    memory = (
        f"weights, gradients, optimizer {plan.cost.state_bytes / 2**20:,.1f} MiB; activations {plan.cost.activation_bytes / 2**20:,.1f} MiB"
    )
    console.print(f"{memory}; rows of {plan.row_length} positions, {plan.useful:.0%} of them useful\n", highlight=False)
