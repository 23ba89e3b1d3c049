"""With torchvision installed all is as without: transformers then takes image processors that resize a little otherwise. And where timm is
installed, too, nothing here imports it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.dist import ROOT
from tests.interop.tiny_vlms import save

CASES = {
    "tests/interop/test_processors.py": "(answers_in_transformers and (turns or crop or idefics)) or same_processor",
    "tests/convert/test_convert.py": "import_and_export_give_the_same_model",
    "tests/eval/test_lm_eval_task.py": "transformers_gives_the_model and inside",
    "tests/model/test_image_processor.py": "",
}
"""Tests that compare with transformers' own processors: a file, and which of it."""
TAKEN = """
import sys
from transformers import AutoImageProcessor
from transformers.utils import is_timm_available, is_torchvision_available
print(is_torchvision_available(), is_timm_available(), type(AutoImageProcessor.from_pretrained(sys.argv[1])).__name__)
"""


def with_stand_ins(*command: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(__file__).parent / "stand_ins"), str(ROOT)])
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, cwd=ROOT)


@pytest.mark.slow
def test_the_stand_ins_are_taken(tmp_path: Path) -> None:
    save("llava", tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "CLIPImageProcessor"}')
    done = with_stand_ins("-c", TAKEN, str(tmp_path))
    assert done.stdout.split() == ["True", "True", "CLIPImageProcessor"], done.stderr[-3000:]  # without torchvision the name ends in Pil


@pytest.mark.slow
def test_processors_are_those_of_training_with_torchvision_too() -> None:
    """Imports, exports, and what lm-eval asks."""
    files, parts = [*CASES], [f"({Path(file).stem} and ({words or 'test'}))" for file, words in CASES.items()]
    done = with_stand_ins("-m", "pytest", "-x", "-p", "no:xdist", *files, "-k", " or ".join(parts))
    assert done.returncode == 0, done.stdout[-5000:]
    print(done.stdout.splitlines()[-1])
