"""Every TOML that is shipped loads; recipes name theirs, and their CPU variants can be run in order."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from kempnerforge.config import load_config
from kempnerforge.study.cells import job_of, rows_of
from kempnerforge.study.config import load_study
from tests.dist import ROOT

STUDIES = sorted(path for path in ROOT.glob("recipes/studies/*.toml") if "[study]" in path.read_text(encoding="utf-8"))
SHIPPED = sorted({*ROOT.glob("configs/**/*.toml"), *ROOT.glob("recipes/**/*.toml")} - {*STUDIES})


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_it_loads_and_says_how_long_it_runs(path: Path) -> None:
    job = load_config(path)
    assert job.total_steps() > 0
    assert not job.warnings()


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_study_has_rows_that_load(path: Path) -> None:
    study = load_study(path)
    rows = rows_of(study)
    assert len(rows) > 1 and len(study.cfg.seeds) >= 5
    assert [line for row in rows for line in job_of(study, row).warnings()] == []


def test_there_are_some() -> None:
    assert {"configs", "recipes"} <= {path.relative_to(ROOT).parts[0] for path in SHIPPED}


RECIPES = sorted(ROOT.glob("recipes/*/README.md"))
CPU = sorted(ROOT.glob("recipes/*/cpu-*.toml"))


@pytest.mark.parametrize("readme", RECIPES, ids=lambda path: path.parent.name)
def test_a_recipe_names_its_configs_and_none_that_are_not_there(readme: Path) -> None:
    names = re.findall(r"[`\s]([\w./-]+\.toml)\b", readme.read_text(encoding="utf-8"))
    named = {(base / name).resolve() for name in names for base in (readme.parent, ROOT) if (base / name).is_file()}
    assert set(readme.parent.glob("*.toml")) <= named
    wrong = [name for name in names if "/" in name and not any((base / name).is_file() for base in (readme.parent, ROOT))]
    assert wrong == []


def test_cpu_variants_have_a_directory_each_and_start_from_one_another() -> None:
    jobs = [load_config(path) for path in CPU]
    dirs = {job.run.dir for job in jobs}
    assert len(dirs) == len(jobs) > 6
    assert {job.run.init_from for job in jobs} - {""} <= dirs


def test_run_cpu_orders_and_fills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    run_cpu = importlib.import_module("run_cpu")
    order = run_cpu.in_order(CPU[::-1])
    assert sorted(order) == CPU
    places = {load_config(path).run.dir: place for place, path in enumerate(order)}
    for path in order:
        job = load_config(path)
        assert places.get(job.run.init_from, -1) < places[job.run.dir]
    table = "| row | what | parameters | match | blank | minutes |\n|---|---|---|---|---|---|\n"
    (tmp_path / "README.md").write_text(table + "| `cpu-a.toml` | this, that | @@ | @@ | @@ | @@ |\n| `b.toml` | x | @@ | @@ | @@ | @@ |\n")
    monkeypatch.setattr(run_cpu, "results", lambda config: ["10", "99.00 %", "-", "1.0"])
    once = run_cpu.filled(tmp_path / "README.md")
    assert once == table + "| `cpu-a.toml` | this, that | 10 | 99.00 % | - | 1.0 |\n| `b.toml` | x | @@ | @@ | @@ | @@ |\n"
    (tmp_path / "README.md").write_text(once)
    assert run_cpu.filled(tmp_path / "README.md") == once
