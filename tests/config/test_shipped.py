"""Every TOML that is shipped loads."""

from __future__ import annotations

from pathlib import Path

import pytest

from kempnerforge.config import load_config

ROOT = Path(__file__).parents[2]
SHIPPED = sorted([*ROOT.glob("configs/**/*.toml"), *ROOT.glob("recipes/**/*.toml")])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_it_loads_and_says_how_long_it_runs(path: Path) -> None:
    job = load_config(path)
    assert job.total_steps() > 0
    assert not job.warnings()


def test_there_are_some() -> None:
    assert {"configs", "recipes"} <= {path.relative_to(ROOT).parts[0] for path in SHIPPED}
