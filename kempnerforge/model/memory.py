"""A model that does not fit into this machine's memory is refused before its parameters are allocated."""

from __future__ import annotations

import os
import re
import resource
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kempnerforge.util.errors import InputError
from kempnerforge.util.reading import entries

MOST_TENSORS, HINT = 100_000, "; look at "


def memory_bytes() -> int:
    """Memory of this machine, or the limit of a control group that this process is in."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        groups = Path("/proc/self/cgroup").read_text()
    except OSError:
        groups = ""
    return min([whole, *group_limits(groups, Path("/sys/fs/cgroup"))])


def group_limits(groups: str, root: Path) -> list[int]:
    """The limits of memory, in bytes, of control groups and of those around them.

    Args:
        groups: as in ``/proc/self/cgroup``: "0::/path" (version 2), "4:memory:/path" (version 1).
        root: the folder that the groups are in. In a container it is the folder of the container's own group,
            whose path in ``groups`` is one outside the container.
    """
    found = []
    for line in ["0::/", *groups.splitlines()]:
        _, kinds, path = line.split(":", 2)
        top = root / kinds if kinds else root
        own = top / path.lstrip("/")
        for folder in [own, *own.parents] if kinds in ("", "memory") else []:
            if folder.is_relative_to(top):
                with suppress(OSError, ValueError):  # no such limit, or "max"
                    found.append(int((folder / ("memory.limit_in_bytes" if kinds else "memory.max")).read_text()))
    return found


def available_bytes() -> int:
    """Memory of this machine that no process uses, caches of files not counted as used."""
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        found = None
    return int(found[1]) * 1024 if found else memory_bytes()


def resident_bytes() -> int:
    """Memory that this process has now; where that is not Linux: that it had at most."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class TooLargeError(InputError):
    """A model that this machine cannot hold."""

    def largest_of(self, config: Mapping[str, Any]) -> str:
        """The message, with the largest sizes in ``config`` if it names none yet."""
        sizes = [(value, name) for name, key, value in entries(dict(config)) if type(value) is int and not key.endswith(("_id", "_index"))]
        named = [f"{name} = {value}" for value, name in sorted(sizes, reverse=True)[:4]]
        return f"{self}{HINT}{', '.join(named)}" if named and HINT not in str(self) else str(self)


@contextmanager
def within_memory(sizes: Mapping[str, Any], meta: bool = False, most: int | None = None) -> Iterator[None]:
    """While a model is built, refuses it at the first parameter that is too many, before that parameter is
    filled.

    Args:
        sizes: the keys that decide how large the model is, for the message.
        meta: count the parameters on the meta device, not those in memory.
        most: bytes of all parameters; None: the memory of this machine.

    Raises:
        InputError: the model is larger, or has more than ``MOST_TENSORS`` parameters.
    """
    most = memory_bytes() if most is None else most
    seen: dict[int, nn.Parameter] = {}
    total = 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal total
        if parameter is None or parameter.is_meta != meta or id(parameter) in seen:
            return
        seen[id(parameter)] = parameter
        total += parameter.nbytes
        if total > most or len(seen) > MOST_TENSORS:
            raise TooLargeError(
                f"the model has more than {total / 2**30:,.1f} GiB of parameters in {len(seen):,} tensors, and this machine has "
                f"{most / 2**30:,.1f} GiB of memory; {name} of a {type(module).__name__} has shape {tuple(parameter.shape)}"
            )

    handle = torch.nn.modules.module.register_module_parameter_registration_hook(count)
    try:
        yield
    except TooLargeError as error:
        raise TooLargeError(error.largest_of(sizes)) from error
    except (RuntimeError, TypeError) as error:
        if not re.search("overflow|not enough memory|allocate memory", str(error)):
            raise
        found = TooLargeError(f"the model is too large; {' '.join(str(error).split())[:200]}")
        raise TooLargeError(found.largest_of(sizes)) from error
    finally:
        handle.remove()
