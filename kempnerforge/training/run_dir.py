"""The run directory: claimed by one job, checked before anything is written; its first files."""

from __future__ import annotations

import difflib
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from kempnerforge.checkpoint.lock import RunLock
from kempnerforge.checkpoint.ranks import from_rank0, rank
from kempnerforge.checkpoint.store import find
from kempnerforge.config import to_toml
from kempnerforge.config.dump import FlatConfig
from kempnerforge.config.files import read_toml
from kempnerforge.data.text.tokenizer import Tokenizer
from kempnerforge.training.complete import NAME as COMPLETE
from kempnerforge.training.complete import remove_results
from kempnerforge.training.run_state import SavedRun, with_own_names
from kempnerforge.training.same_run import config_changes, not_allowed
from kempnerforge.training.tokenizer import TOKENIZER
from kempnerforge.util.errors import InputError
from kempnerforge.util.files import move_aside, same_files, why_not_writable, write_text

LOG = logging.getLogger("kempnerforge")

SHOWN, SHOWN_WIDTH = 8, 120
"""Lines, and characters of each, of a difference that is printed."""


@contextmanager
def claimed(run_dir: Path, fresh: bool) -> Iterator[ExitStack]:
    """Makes ``run_dir`` and holds its lock; call it on all ranks. Directories that were made here are removed
    if they are empty at the end.

    Args:
        fresh: an old run in the directory will be moved away, see ``move_old_run``.

    Raises:
        InputError: the directory cannot be made or written to.
        CheckpointError: another job holds the lock.
    """
    made, problem = from_rank0(lambda: _make(run_dir))
    try:
        if problem := problem or from_rank0(lambda: _why_not_usable(run_dir, fresh)):
            raise InputError(f"run.dir = {str(run_dir)!r}: {problem}")
        with ExitStack() as locks:
            locks.enter_context(RunLock(run_dir))
            yield locks
    finally:
        for folder in made if rank() == 0 else ():
            with suppress(OSError):
                folder.rmdir()


def _make(run_dir: Path) -> tuple[list[Path], str]:
    """The directories that were made, the innermost first; or why that is not possible."""
    try:
        missing = [path for path in (run_dir, *run_dir.parents) if not path.exists()]
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = f"it is a link to {os.readlink(run_dir)!r}, which is not there" if os.path.islink(run_dir) else error.strerror or error
        return [], f"cannot be made: {why}"
    return missing, ""


def _why_not_usable(run_dir: Path, fresh: bool) -> str:
    """Why a run cannot write where it will; empty if it can."""
    real_dir, moves = run_dir.resolve(), fresh and _holds_a_run(run_dir)
    if moves and os.path.ismount(real_dir):
        return f"{real_dir} is where a disk is mounted: it cannot be moved aside"
    folders = (run_dir, real_dir.parent) if moves else (run_dir, run_dir / "checkpoints", run_dir / "events")
    return next((why for folder in folders if (why := why_not_writable(folder))), "")


def _holds_a_run(run_dir: Path) -> bool:
    return any(path.name != ".lock" for path in run_dir.iterdir())


def saved_run(run_dir: Path) -> SavedRun | None:
    """The newest checkpoint in ``run_dir``; None if there is none.

    Raises:
        InputError: the run is complete, and its checkpoints are gone.
        CheckpointError: no checkpoint is whole.
    """
    found = find(run_dir / "checkpoints")
    if found is None and (run_dir / COMPLETE).exists():
        raise InputError(f"run.dir = {str(run_dir)!r}: holds a complete run, whose checkpoints are gone; use --fresh to start over")
    return SavedRun.of(*found) if found is not None else None


# ---- the copies of config and tokenizer beside the checkpoints -----------------------------------


def check_copies(config: FlatConfig, run: SavedRun, run_dir: Path, allow: Sequence[str]) -> None:
    """Checks that config and tokenizer in ``run_dir`` are as in the checkpoint. Damaged ones are no error:
    they are written again later.

    Args:
        config: the job that continues the run, as data.

    Raises:
        InputError: with the edits.
    """
    for name, edits in (("config.toml", _config_edits(config, run, run_dir, allow)), (TOKENIZER, _tokenizer_edits(run, run_dir))):
        if edits:
            listed = "\n  ".join(edits)
            raise InputError(
                f"{run_dir / name}: is not the one of the run, by its checkpoint {run.path.name}:\n  {listed}\n"
                "an edit here changes nothing; put it back, or delete it: it is written again"
            )


def _config_edits(config: FlatConfig, run: SavedRun, run_dir: Path, allow: Sequence[str]) -> list[str]:
    try:
        copy = read_toml(run_dir / "config.toml")
    except InputError:
        return []
    return not_allowed(config_changes(copy if run.state.history else with_own_names(copy), config), allow)


def _tokenizer_edits(run: SavedRun, run_dir: Path) -> list[str]:
    """The first lines of the difference; none if the copy is too damaged to be used as a tokenizer."""
    copy, original = run_dir / TOKENIZER, run.path / TOKENIZER
    if not copy.is_dir() or same_files(copy, original):
        return []
    try:
        Tokenizer.from_pretrained(str(copy))
    except InputError:
        return []
    edits = []
    for name in sorted({file.name for folder in (copy, original) for file in folder.iterdir() if file.is_file()}):
        files = (original / name, copy / name)
        before, after = (file.read_text("utf-8", "replace").splitlines() if file.is_file() else [] for file in files)
        edits += [line[:SHOWN_WIDTH] for line in difflib.unified_diff(before, after, name, name, n=0, lineterm="")]
    return edits[:SHOWN]


# ---- writing -------------------------------------------------------------------------------------


def move_old_run(run_dir: Path) -> bool:
    """Renames an existing run, its lock with it; a link to it stays one. Returns whether there was a run.

    The directory exists afterwards, without a lock.
    """
    if not _holds_a_run(run_dir):
        return False
    run_dir = run_dir.resolve()
    moved = move_aside(run_dir)
    (moved / ".lock").unlink()
    LOG.info("moved the run that was there to %s", moved)
    run_dir.mkdir()
    return True


def write_start(run_dir: Path, config: FlatConfig, tokenizer: Tokenizer, run: SavedRun | None) -> None:
    """Writes config and tokenizer, and removes results of an earlier end of the run."""
    remove_results(run_dir)
    _write_tokenizer(tokenizer, run_dir, run.path / TOKENIZER if run is not None else None)
    path = run_dir / "config.toml"
    if os.path.lexists(path):
        try:
            read_toml(path)
        except InputError:
            LOG.warning("%s is damaged: moved to %s, and written again", path, move_aside(path))
    write_text(path, to_toml(config.table))


def _write_tokenizer(tokenizer: Tokenizer, run_dir: Path, original: Path | None) -> None:
    """Writes the tokenizer, in one move; an ``original`` in a checkpoint is copied if it differs."""
    path, part = run_dir / TOKENIZER, run_dir / f".{TOKENIZER}-{os.getpid()}"
    if original is None:
        tokenizer.save(part)
    elif same_files(path, original):
        return
    else:
        shutil.copytree(original, part)
    if os.path.lexists(path):
        if original is not None:
            LOG.warning("%s is damaged: moved to %s, and written again from the checkpoint", path, move_aside(path))
        else:  # from an attempt that ended before its first checkpoint
            shutil.rmtree(path)
    part.rename(path)
