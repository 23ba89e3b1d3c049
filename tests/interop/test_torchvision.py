"""With torchvision installed all is as without: transformers then takes image processors that resize a little otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.dist import ROOT

SCRIPT = """
import json, sys
from pathlib import Path
from transformers.utils import is_torchvision_available
assert is_torchvision_available()
import transformers
from kempnerforge.training.convert import export_model, import_model
from tests.interop.tiny_vlms import save
here = Path(sys.argv[1])
save("llava", here / "there")
file = here / "there" / "preprocessor_config.json"
whole = {"image_processor_type": "CLIPImageProcessor", "crop_size": {"height": 28, "width": 28}}
file.write_text(json.dumps(json.loads(file.read_text()) | whole))
took = type(transformers.AutoImageProcessor.from_pretrained(here / "there")).__name__
assert took == "CLIPImageProcessor", f"the stand-in is not taken: {took}"
done = import_model(here / "there", here / "run", verify=False)
assert not any("does otherwise" in line for line in done.lines), done.lines
done = export_model(here / "run", here / "out", verify=False)
print(*done.lines, sep="\\n")
"""


def test_an_export_has_its_processor_with_torchvision_too(tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(__file__).parent / "stand_ins"), str(ROOT)])
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "processor: LlavaProcessor" in done.stdout and "are those of training" in done.stdout
    there = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"preprocessor_config.json", "processor_config.json", "chat_template.jinja"} <= there
