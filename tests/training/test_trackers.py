"""What W&B, MLflow and trackio have of a run, read back by their own libraries: offline, and of a run that was continued."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.training.tiny import call, make_job, metrics

CONSTANT = '\n[scheduler]\nname = "constant"\n'


def continued_run(folder: Path, tracker: str) -> tuple[Path, list[dict[str, float]]]:
    """A run of four steps that goes on to six; its directory, and the lines of its metrics."""
    job = make_job(folder, extra=CONSTANT)
    job.write_text(job.read_text().replace("tensorboard = false\n", f"tensorboard = false\ntrackers = [{tracker}]\n"))
    for steps in (4, 6):
        ended = call("train", job, f"--train.max_steps={steps}", "--allow-change=train.max_steps")
        assert ended.code == 0, ended
    return folder / "run", metrics(folder / "run", timing=True)


def loss_of(rows: list[dict[str, float]]) -> dict[int, float]:
    return {int(row["step"]): row["train/loss"] for row in rows if "train/loss" in row}


def records(file: Path) -> Iterator[bytes]:
    """The records of a file of W&B: seven bytes, then blocks of LevelDB's log (32 KiB, each fragment after 7 bytes: checksum, length, type)."""
    data, at, record = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        size, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last fragment
            yield record
            record = b""


def test_wandb_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    run, rows = continued_run(tmp_path, '{ type = "wandb", mode = "offline", project = "tests" }')
    files = sorted((run / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2, "one for each process"
    found: dict[int, float] = {}
    ids, configs, told = set(), [], set()
    for file in files:
        for data in records(file):
            record: Any = Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                ids.add((record.run.run_id, record.run.project, record.run.display_name))
                configs += [{update.key: json.loads(update.value_json) for update in record.run.config.update}]
            values = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            if "train/loss" in values:
                found[int(json.loads(values["_step"]))] = json.loads(values["train/loss"])
            told |= set(values) | {item.key or "/".join(item.nested_key) for item in record.summary.update}
    assert ids == {((run / "wandb" / "id").read_text(), "tests", "run")}
    assert configs[0]["model"]["dim"] == 32 and found == loss_of(rows)
    assert {"eval/exact_match", "checkpoints"} <= told and any("report" in key for key in told)


def test_mlflow_in_a_file(tmp_path: Path) -> None:
    mlflow: Any = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    run, rows = continued_run(tmp_path, '{ type = "mlflow", experiment = "tests" }')
    client = mlflow.MlflowClient(f"sqlite:///{run / 'mlflow.db'}")
    (found,) = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    assert found.info.run_id == (run / "mlflow-id").read_text() and found.info.status == "FINISHED"
    assert found.data.params["model.dim"] == "32" and found.data.params["train.max_steps"] == "4"
    assert found.data.tags["checkpoints"] == str(run / "checkpoints")
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert {point.step: point.value for point in history} == loss_of(rows)
    assert [file.path for file in client.list_artifacts(found.info.run_id)] == ["report.html"]
    last = client.get_metric_history(found.info.run_id, "eval/exact_match")[-1]
    assert (last.step, last.value) == (6, rows[-1]["eval/exact_match"])


def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    trackio: Any = pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    run, rows = continued_run(tmp_path, '{ type = "trackio", project = "tests" }')
    (found,) = trackio.Api().runs("tests")
    assert found.name == f"run-{(run / 'trackio-id').read_text()[:6]}"
    assert found.config["model"]["dim"] == 32 and found.config["checkpoints"] == str(run / "checkpoints")
    logs = SQLiteStorage.get_logs("tests", found.name)
    assert {row["step"]: row["train/loss"] for row in logs if "train/loss" in row} == loss_of(rows)
    assert any(math.isclose(row.get("eval/exact_match", -1), rows[-1]["eval/exact_match"]) for row in logs)


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_tracker_that_is_not_installed_is_named_before_the_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda module, *rest: None if module == name else real(module, *rest))
    ended = call("check", make_job(tmp_path), f"--metrics.trackers=['{name}']")
    assert ended.code == 2 and f"type = '{name}' needs the package {name}: pip install 'kempnerforge[{name}]'" in ended.err, ended.err


def test_where_wandb_writes_is_one_of_two(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    ended = call("check", make_job(tmp_path), "--metrics.trackers=[{type = 'wandb', mode = 'of line'}]")
    assert ended.code == 2 and "mode = 'of line': allowed are 'online', 'offline'" in ended.err, ended.err
