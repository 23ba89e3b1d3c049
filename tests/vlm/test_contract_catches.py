"""The contract suite on archs of a plugin: it finds them by itself, passes the sound one, and each broken one fails where it should."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import defaultdict

import pytest

from kempnerforge.contract import cases
from tests.dist import ROOT
from tests.vlm import tiny  # noqa: F401  registers an arch of recipes/

EXPECTED = {
    "renames": "a_text_checkpoint_loads_with_only_new_names_missing",
    "looks_ahead": "no_word_leaks",
    "mixes_texts": "several_texts_have_the_loss_of_each_alone",
    "mixes_samples": "nothing_leaks_from_sample_to_sample",
    "mixes_images": "a_row_is_alone",
    "is_blind": "the_image_matters",
    "cuts_the_graph": "a_batch_without_images_keeps_the_encoder_in_the_graph",
    "overlaps": "units_cover_every_parameter_once",
    "forgets": "the_state_is_the_parameters",
    "miscounts_the_cache": "the_cache_is_the_full_forward_pass",
    "averages": "the_loss_is_a_sum_over_targets",
}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_broken_arch_is_caught() -> None:
    chosen = " or ".join(["sound", *(f"({arch} and {test})" for arch, test in EXPECTED.items())])
    command = [
        "-m",
        "pytest",
        "-p",
        "tests.vlm.broken_archs",
        "tests/vlm/test_contract.py",
        "-q",
        "--tb=no",
        "-rfp",
        "-k",
        chosen,
        "-m",
        "not dist and not slow",
    ]
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, timeout=900, check=False)
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: {"FAILED": set(), "PASSED": set()})
    for outcome, test, case in re.findall(r"^(FAILED|PASSED) \S+::test_(\w+)\[(.*?)\]", result.stdout, re.MULTILINE):
        for arch in {"sound", *EXPECTED} & set(case.replace(" ", "-").split("-")):
            found[arch][outcome].add(test)
    assert found["sound"]["FAILED"] == set()
    assert set(EXPECTED.values()) <= found["sound"]["PASSED"], result.stdout[-2000:]
    assert {arch: test for arch, test in EXPECTED.items() if test not in found[arch]["FAILED"]} == {}


def test_processes_import_archs_however_they_came(monkeypatch: pytest.MonkeyPatch) -> None:
    """By ``pytest -p my_arch``, say: two processes know only what they are told to import."""
    monkeypatch.setattr(cases, "PLUGINS", [])
    assert str(ROOT / "recipes" / "plugin-arch" / "early_fusion.py") in [plugin.name for plugin in cases.plugins()]
