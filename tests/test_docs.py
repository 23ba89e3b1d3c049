"""The Python of ``docs/`` runs, and prints what the pages say."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

from tests.training.tiny import make_job

DOCS = Path(__file__).parents[1] / "docs"


def outputs(page: str) -> list[tuple[str, str]]:
    """Of each block of Python: what it prints, and what the page says that it prints; they share their names."""
    blocks = re.findall(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", (DOCS / page).read_text(encoding="utf-8"), flags=re.M | re.S)
    known: dict[str, object] = {}
    found = []
    for code, said in blocks:
        with contextlib.redirect_stdout(io.StringIO()) as shown:
            exec(code, known)
        found.append((shown.getvalue(), said))
    return found


def test_python_api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(tmp_path)
    job.write_text(job.read_text().replace(f"{tmp_path}/", ""))
    monkeypatch.chdir(tmp_path)
    batch, loop, run, answer, same, evaluated = (shown.splitlines() for shown, _ in outputs("python-api.md"))
    assert batch[0].startswith("torch.Size([4, ") and batch[0].endswith("torch.Size([4, 3, 16, 16])")
    assert 0 < float(loop[0]) < 10 and run == [] and len(answer) == 1 and same == answer
    exact_match, questions = evaluated[0].split()
    assert 0 <= float(exact_match) <= 1 and questions == "8"


def test_a_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = outputs("a-sample.md")
    assert len(found) == 5
    for shown, said in found:
        assert shown == said


def test_links_lead_somewhere() -> None:
    root = DOCS.parent
    for page in [*DOCS.rglob("*.md"), root / "README.md", root / "CONTRIBUTING.md", *root.glob("recipes/**/README.md")]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.relative_to(root)}: {target}"
