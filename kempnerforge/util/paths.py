"""Paths as a user of a shell writes them. A relative path starts at the working directory; in ``extends`` and
``plugins`` of a file it starts at the folder of that file.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

from kempnerforge.util.errors import InputError

PathText = Annotated[str, "path"]
"""The type of a config field that holds a path, or a name that may be one (of a tokenizer, say): it is
expanded when the config is loaded."""


def expand(text: str) -> str:
    """``text`` with ``~``, ``~user``, ``$NAME`` and ``${NAME}`` replaced.

    Raises:
        ValueError: there is no such user or variable, and no file that is called so.
    """
    found = os.path.expandvars(os.path.expanduser(text))
    if os.path.lexists(found):
        return found
    if found.startswith("~"):
        raise InputError(f"there is no user {found[1:].partition('/')[0]!r}; a file of this name is './{found}'")
    if unset := re.search(r"\$(\w+|\{\w+\})", found):
        raise InputError(f"{unset[0]} is not set in the environment")
    return found


def place_of(path: str | Path) -> Path:
    """``path`` as a program or a command was given it, expanded."""
    return Path(expand(os.fspath(path)))


def is_no_hub_id(path: str) -> bool:
    """Whether ``path`` can only be a path: no name of the Hugging Face hub looks like that."""
    return os.path.isabs(path) or not path or path.startswith((".", "~")) or path.count("/") > 1


def start_of(path: str | Path) -> str:
    """What a message says after a path that is not there: where a relative one was looked for; nothing of an
    absolute one.
    """
    return "" if os.path.isabs(path) else f" (relative to the working directory, {os.getcwd()})"
