"""How much memory a process may use."""

from __future__ import annotations

from pathlib import Path

from kempnerforge.model.memory import available_bytes, group_limits, memory_bytes, resident_bytes


def limit(folder: Path, name: str, value: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(value + "\n")


def test_limits_of_groups_around_this_one_count(tmp_path: Path) -> None:
    """As SLURM sets them: on the job, not on the step that the process is in."""
    limit(tmp_path / "slurm", "memory.max", "max")
    limit(tmp_path / "slurm" / "job_1", "memory.max", "2000")
    limit(tmp_path / "slurm" / "job_1" / "step_0", "memory.max", "max")
    limit(tmp_path / "slurm" / "job_2", "memory.max", "1")
    assert group_limits("0::/slurm/job_1/step_0\n", tmp_path) == [2000]
    limit(tmp_path, "memory.max", "3000")  # of a container
    assert sorted(group_limits("0::/slurm/job_1/step_0\n", tmp_path)) == [2000, 3000, 3000]
    assert group_limits("", tmp_path) == group_limits("0::/gone\n", tmp_path)[:1] == [3000]


def test_limits_of_version_1(tmp_path: Path) -> None:
    limit(tmp_path / "memory" / "job", "memory.limit_in_bytes", "500")
    limit(tmp_path / "cpu" / "job", "memory.limit_in_bytes", "1")
    assert group_limits("4:memory:/job/step\n1:cpu:/job\n9:name=systemd:/\n0::/\n", tmp_path) == [500]


def test_what_is_used_is_less_than_what_is_there() -> None:
    assert 2**24 < resident_bytes() < memory_bytes()
    assert available_bytes() > 0
