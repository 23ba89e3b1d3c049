"""One trained run that the tests of the command line share; none of them changes it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.training.tiny import Ended, call, make_job


@dataclass(frozen=True)
class Trained:
    """A finished run: its folder with the data, its config, its directory and how training ended."""

    folder: Path
    job: Path
    run: Path
    ended: Ended


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("trained")
    job = make_job(folder)
    ended = call("train", job)
    assert ended.code == 0, ended
    return Trained(folder, job, folder / "run", ended)
