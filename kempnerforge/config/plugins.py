"""Code outside this package that registers an extension (see ``registry``), imported before a config is read.

A plugin is known by what it is: its source as it was imported, not by the name of its file or module. Plugins
that the record of a run, a checkpoint or an export names may be code of others: they run only if ``trusting``
says so.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from weakref import WeakKeyDictionary

from kempnerforge.config import registry
from kempnerforge.util.errors import ConfigError
from kempnerforge.util.reading import regular

ENTRY_POINTS = "kempnerforge.plugins"
FILE_PREFIX = "kempnerforge_plugin_"
"""Of the names of modules that are loaded from files; only this process knows them."""
LOG = logging.getLogger("kempnerforge")
DIFF_LINES = 30
"""Lines of the difference of a changed source that a message shows at most."""
MAX_KEPT = 1 << 18
"""Bytes of the source of a plugin that a checkpoint keeps at most."""


@dataclass(frozen=True)
class Plugin:
    """A plugin and its source.

    Attributes:
        name: as a config has it, or "entry point NAME".
        source: name and content of the plugin's file, or of all ``.py`` files of a package; then of the
            modules in its package or folder that it imports, by dotted name.
    """

    name: str
    source: Mapping[str, bytes]

    @property
    def sha256(self) -> str:
        """Of the content; the plugin's own file counts without its name."""
        (_, own), *helpers = self.source.items()
        digest = hashlib.sha256(own)
        for name, content in sorted(helpers):
            digest.update(f"\0{name}\0{len(content)}\0".encode() + content)
        return digest.hexdigest()


@dataclass(frozen=True)
class PluginRecord:
    """What a run keeps of a plugin: its name, and the names of the files of its source, which
    ``plugin_files`` has.
    """

    name: str
    sha256: str
    files: list[str]


_plugins: dict[str, Plugin] = {}
"""What was imported last under each name."""
_trusting: ContextVar[bool] = ContextVar("trusting", default=False)
_sources: WeakKeyDictionary[ModuleType, Mapping[str, bytes]] = WeakKeyDictionary()
"""Of each module as it was when it was imported."""


@contextmanager
def trusting(yes: bool = True) -> Iterator[None]:
    """Whether plugins that records name are run in the block."""
    before = _trusting.set(yes)
    try:
        yield
    finally:
        _trusting.reset(before)


def check_trust(names: Sequence[str], folder: Path, origin: str) -> None:
    """Raises ConfigError for plugins that the record ``origin`` names and that are not trusted. What this
    process has imported already is.
    """
    new = [(name, described) for name in names if (described := _not_yet_run(name, folder))]
    listed = ", ".join(described for _, described in new)
    if new and not _trusting.get():
        raise ConfigError(
            [
                f"{origin}: plugins: {listed}: this is code, named by a record, that would run. --trust-plugins runs it"
                " (load_pretrained(..., trust_plugins=True)), --plugins=FILE runs yours in its place"
            ]
        )
    if new:
        LOG.warning("%s: trusted, and run: %s", origin, listed)


def _not_yet_run(name: str, folder: Path) -> str:
    """A plugin with the file that it is and the SHA-256 of that; empty if it has been imported, or is not
    there.
    """
    if not name.endswith(".py"):
        return "" if name in sys.modules else f"{name!r} (a module)"
    path = (folder / name).resolve()
    if not path.is_file():
        return ""  # nothing that could run
    content = path.read_bytes()
    return "" if _module_name(content) in sys.modules else f"{str(path)!r} (SHA-256 {hashlib.sha256(content).hexdigest()})"


def load_plugins(names: Sequence[str], folder: Path, origin: str) -> list[str]:
    """Imports the plugins of a config and those that installed packages announce.

    Args:
        names: modules ("my_lab.arch"), or files that end in ".py", relative to ``folder``.
        folder: the directory of the file that names them.
        origin: that file, for messages.

    Returns:
        The names, files as absolute paths.

    Raises:
        ConfigError: a plugin cannot be imported.
    """
    problems, resolved = [], []
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            entry.load()
            _keep(f"entry point {entry.name}", sys.modules[entry.module])
        except (Exception, SystemExit) as error:
            problems.append(f"{origin}: entry point {entry.name!r} of {ENTRY_POINTS!r} ({entry.value}): {_describe(error)}")
    for name in names:
        try:
            resolved.append(_load(name, folder))
        except (Exception, SystemExit) as error:
            missing = isinstance(error, FileNotFoundError) or (isinstance(error, ModuleNotFoundError) and error.name == name)
            hint = "; --plugins=FILE says where it is now, as load_pretrained(..., plugins=[FILE]) does" if missing else ""
            problems.append(f"{origin}: plugins: {name!r} cannot be imported: {_describe(error)}{hint}")
    if problems:
        raise ConfigError(problems)
    return resolved


def plugins_of(names: Sequence[str]) -> list[Plugin]:
    """The plugins in force in this process for a config that names ``names``: those, and the installed ones."""
    return [plugin for key, plugin in _plugins.items() if key in names or key.startswith("entry point ")]


def _describe(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _keep(name: str, module: ModuleType) -> None:
    if module not in _sources:
        _sources[module] = _source(module)
    _plugins[name] = Plugin(name, _sources[module])


def _load(name: str, folder: Path) -> str:
    if not name.endswith(".py"):
        _keep(name, importlib.import_module(name))
        return name
    path = (folder / name).resolve()
    if not regular(path).is_file():
        raise FileNotFoundError(f"no file {path}")
    content = path.read_bytes()
    # NOTE: a fixed name for a fixed content, so that a plugin runs once in a process however often, and by
    # however many names, it is named
    module_name = _module_name(content)
    before = _plugins.get(str(path))
    if before is not None and (old := _module_name(next(iter(before.source.values())))) != module_name:  # the file was edited
        registry.forget(old)
        sys.modules.pop(old, None)
    if module_name not in sys.modules:
        loader = _Content(module_name, str(path), content)
        spec = importlib.util.spec_from_file_location(module_name, path, loader=loader)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        try:
            loader.exec_module(module)
        except BaseException:
            del sys.modules[module_name]
            registry.forget(module_name)
            raise
        _sources[module] = {path.name: content, **_source(module)}
    module = sys.modules[module_name]
    _plugins[str(path)] = Plugin(str(path), {path.name: content, **dict(list(_sources[module].items())[1:])})
    return str(path)


class _Content(SourceFileLoader):
    """Of source that was read already. NOTE: byte code in __pycache__ is not looked at: it may be of an
    earlier file of the same size and second.
    """

    def __init__(self, name: str, path: str, content: bytes) -> None:
        super().__init__(name, path)
        self.content = content

    def get_data(self, path: str) -> bytes:
        return self.content

    def path_stats(self, path: str) -> Mapping[str, float]:
        raise OSError(f"{path}: no byte code")


def _module_name(content: bytes) -> str:
    return f"{FILE_PREFIX}{hashlib.sha256(content).hexdigest()[:12]}"


# ---- the source of a module ----------------------------------------------------------------------


def _source(module: ModuleType) -> dict[str, bytes]:
    """As ``Plugin.source``; nothing of what has no file."""
    file = Path(module.__file__) if module.__file__ else None
    if file is None or not file.is_file():
        return {module.__name__: b""}
    found, queue, folder = {file.name: file.read_bytes()}, [module], file.parent
    if hasattr(module, "__path__"):
        below = sorted(path for path in folder.rglob("*.py") if path != file and path.is_file())
        found |= {path.relative_to(folder).as_posix(): path.read_bytes() for path in below}
        queue += [part for name, part in sys.modules.items() if name.startswith(f"{module.__name__}.") and _python_file(part)]
        folder = folder.parent
    seen = {part.__name__ for part in queue}
    while queue:
        for helper in _imported(queue.pop()):
            if helper.__name__ not in seen and (path := _beside(helper, module, folder)) is not None:
                seen.add(helper.__name__)
                queue.append(helper)
                found[f"{helper.__name__}.py"] = path.read_bytes()
    return found


def _beside(helper: ModuleType, plugin: ModuleType, folder: Path) -> Path | None:
    """The file of ``helper`` if it is of the ``plugin``'s package or lies in its folder."""
    top, path = helper.__name__.partition(".")[0], _python_file(helper)
    if path is None or top == __name__.partition(".")[0]:
        return None
    same, installed = top == plugin.__name__.partition(".")[0], {"site-packages", "dist-packages"} & set(path.parts)
    return path if same or (path.is_relative_to(folder.resolve()) and not installed) else None


def _python_file(module: ModuleType) -> Path | None:
    file = getattr(module, "__file__", None)
    return Path(file).resolve() if file and file.endswith(".py") else None


def _imported(module: ModuleType) -> Iterator[ModuleType]:
    """The modules that import statements of ``module`` name, anywhere in it, as far as their files exist."""
    assert module.__file__ is not None
    names: list[str] = []
    for node in ast.walk(ast.parse(Path(module.__file__).read_bytes())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(base, module.__package__) if node.level else base
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    yield from (sys.modules[name] for name in names if name in sys.modules)


# ---- the same plugins? ---------------------------------------------------------------------------


def record_plugins(plugins: Sequence[Plugin]) -> list[PluginRecord]:
    return [PluginRecord(plugin.name, plugin.sha256, list(plugin.source)) for plugin in plugins]


def plugin_files(plugins: Sequence[Plugin]) -> dict[str, bytes]:
    """The sources of ``plugins`` by their path in a checkpoint, which keeps them. Plugins of more than
    ``MAX_KEPT`` bytes are left out.
    """
    small = [plugin for plugin in plugins if sum(map(len, plugin.source.values())) <= MAX_KEPT]
    return {_kept(plugin.sha256, name): content for plugin in small for name, content in plugin.source.items()}


def _kept(sha256: str, name: str) -> str:
    return f"plugins/{sha256[:12]}/{name}"


def plugin_changes(before: Sequence[PluginRecord], now: Sequence[Plugin], copies: Path) -> list[str]:
    """What is different: a line for each plugin that changed, went or came, with the difference of a source
    that is kept in ``copies``.
    """
    known = {entry.sha256: entry for entry in before}
    gone, came = [known[sha] for sha in known if sha not in {p.sha256 for p in now}], [p for p in now if p.sha256 not in known]
    lines = []
    for entry in gone:
        same = [plugin for plugin in came if Path(plugin.name).name == Path(entry.name).name]
        other = (same or came or [None])[0] if same or len(gone) == len(came) == 1 else None
        if other is None:
            lines.append(f"plugins: {entry.name!r} ({entry.sha256[:8]}) -> unset")
            continue
        came.remove(other)
        renamed = "" if other.name == entry.name else f" -> {other.name!r}"
        lines.append(f"plugins: {entry.name!r}{renamed}: its source changed, {entry.sha256[:8]} -> {other.sha256[:8]}")
        lines[-1] += "".join(f"\n    {line}" for line in _difference(entry, other, copies))
    return [*lines, *(f"plugins: unset -> {plugin.name!r} ({plugin.sha256[:8]})" for plugin in came)]


def _difference(before: PluginRecord, now: Plugin, copies: Path) -> list[str]:
    """Unified, of the files whose old content is kept."""
    lines: list[str] = []
    main_file = next(iter(now.source))
    for index, name in enumerate(before.files):
        copy = copies / _kept(before.sha256, name)
        if copy.is_file():
            old, new = copy.read_bytes(), now.source.get(main_file if index == 0 else name, b"")
            a, b = (content.decode(errors="replace").splitlines() for content in (old, new))
            lines += difflib.unified_diff(a, b, name, name, n=1, lineterm="")
    return lines if len(lines) <= DIFF_LINES else [*lines[:DIFF_LINES], f"... {len(lines) - DIFF_LINES} more lines"]
