"""The model card that goes with an exported model."""

from __future__ import annotations

from pathlib import Path

from kempnerforge.config import to_toml
from kempnerforge.inference.model import TrainedModel
from kempnerforge.training.history import changed_on_the_way, spans_of, trained_with
from kempnerforge.util.metrics import read_metrics


def model_card(restored: TrainedModel, name: str, form: str, lines: list[str]) -> str:
    """``README.md`` of an export: the model, its training data, its metrics. The person who publishes it
    chooses the licence.

    Args:
        name: a title.
        form: "hf" or "kempnerforge".
        lines: facts about the conversion.
    """
    job, state = restored.assembly.job, restored.state
    use = (
        "Loads with the `from_pretrained` of its class in transformers."
        if form == "hf"
        else "No class of transformers is this model: `kempnerforge.load_pretrained` reads it (weights in `model.safetensors`, `config.toml`)."
    )
    step, history, imported = state.step, state.history, state.imported
    changed = [f"* {line}" for line in changed_on_the_way(history, step)]
    metrics = [f"| `{key}` | {value:.6g} |" for key, value in _metrics(restored.path, step).items()]
    parts = [
        "---\ntags:\n- kempnerforge\n---",
        f"# {name}",
        use,
        "\n".join(f"* {line}" for line in lines),
        "**Licence: not stated.** Choose one that the licences of the parts and the data allow.",
        "## Data",
        f"Weights of {imported['source']}, not trained here."
        if imported and not step
        else "\n".join(f"* {line}" for line in trained_with(history, step)),
        "\n".join(["Not all steps were trained with one config. What changed on the way:", "", *changed]) if changed else "",
        f"## Metrics\n\nAt step {step}, {state.samples_seen:,} samples seen.",
        "\n".join(["| metric | value |", "|---|---|", *metrics]) if metrics else "None were measured.",
        "## Config" if not changed else f"## Config of the steps from {spans_of(history, step)[-1][0].start} on",
        f"```toml\n{to_toml(job).strip()}\n```",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _metrics(checkpoint: Path, step: int) -> dict[str, float]:
    """The last evaluation up to ``step``, if the checkpoint is still in its run."""
    run = checkpoint.resolve().parent
    return read_metrics(run.parent / "metrics.jsonl").last_evaluation(until=step) if run.name == "checkpoints" else {}
