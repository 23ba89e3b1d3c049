"""The house rules that no type checker sees: who may import whom, where an arch may be named, what is never called."""

from __future__ import annotations

import ast
import dataclasses
import re
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator
from functools import cache
from pathlib import Path

import pytest

from kempnerforge.config import JobConfig, StageConfig, registry
from kempnerforge.config.build import UNIONS, fields_of

PACKAGE = Path(__file__).resolve().parents[1] / "kempnerforge"
LAYERS = [
    {"util"},
    {"config"},
    {"checkpoint", "report"},
    {"model", "data", "distributed"},
    {"eval", "interop"},
    {"vlm"},
    {"training"},
    {"inference", "convert", "inspection", "contract"},
    {"serve", "study"},
    {"cli"},
]
"""From the ground up. Imports point down, or stay in their layer."""
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FILES = sorted(PACKAGE.rglob("*.py"))


def each_file(check: Callable[[Path], None]) -> Callable[[], None]:
    """One test of all files, which names each that fails."""

    def test() -> None:
        wrong = []
        for path in FILES:
            try:
                check(path)
            except AssertionError as error:
                wrong.append(f"{path.relative_to(PACKAGE)}: {error}")
        assert not wrong, "\n".join(wrong)

    test.__name__, test.__doc__ = check.__name__, check.__doc__
    return test


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(tree: ast.Module, path: Path) -> Iterator[str]:
    """Full names of all modules and of what is taken from them, also in functions and for type checkers alone."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = ("kempnerforge", *path.relative_to(PACKAGE).parent.parts)
            base = [".".join(parents[: len(parents) + 1 - node.level])] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def part(path: Path) -> str:
    """The subpackage that a file belongs to; a file of the top level is its own."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def strings(tree: ast.Module) -> Iterator[ast.Constant]:
    """String constants that are no docstrings (bare strings as statements)."""
    bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    yield from (n for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in bare)


def test_the_package_is_seen() -> None:
    assert len(FILES) > 60
    assert {part(path) for path in FILES} - {"__init__", "__main__"} <= LEVEL.keys(), "a new subpackage needs a layer"


@each_file
def test_imports_point_down(path: Path) -> None:
    if part(path) not in LEVEL:
        return
    for name in imported(parse(path), path):
        words = name.split(".")
        if words[0] == "kempnerforge" and len(words) > 1:
            assert words[1] in LEVEL, f"{path.name} imports {name}"
            assert LEVEL[words[1]] <= LEVEL[part(path)], f"{path.name} (layer {LEVEL[part(path)]}) imports {name} (layer {LEVEL[words[1]]})"


def test_no_file_imports_itself() -> None:
    """Not by way of others either, and not inside functions or for type checkers."""
    modules = {
        ".".join(("kempnerforge", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path for path in FILES
    }
    found = {
        name: {known for target in imported(parse(path), path) if (known := nearest(target, modules))} for name, path in modules.items()
    }
    for name in sorted(modules):
        reached, waiting = set[str](), set(found[name]) - {name}
        while waiting:
            reached.add(one := waiting.pop())
            waiting |= found[one] - reached
        assert name not in reached, f"{name} is imported by {sorted(one for one in reached if name in found[one])}, which it imports"


def nearest(target: str, modules: Collection[str]) -> str:
    """The module that ``target`` is, or is defined in; empty for those of others."""
    while target and target not in modules:
        target = target.rpartition(".")[0]
    return target


def test_config_needs_neither_torch_nor_numpy() -> None:
    code = "import sys, kempnerforge.config; print(sorted({'torch', 'numpy', 'transformers', 'PIL'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=True)
    assert result.stdout.strip() == "[]"


@each_file
def test_config_imports_the_standard_library_and_toml_alone(path: Path) -> None:
    if part(path) == "config":
        outside = {name.split(".")[0] for name in imported(parse(path), path)} - sys.stdlib_module_names
        assert outside <= {"kempnerforge", "tomli", "tomli_w"}


# ---- archs are named in their own file and in the config ----------------------------------------------------------------

registry.vlm_configs.import_all()
ARCHS = {name: registry.vlm_configs.get(name) for name in registry.vlm_configs}
ARCH_CLASSES = {cls.__name__ for cls in ARCHS.values()}


FORMATS = {PACKAGE / name: {"hf"} for name in ("cli/check.py", "cli/export.py", "convert/card.py", "convert/commands.py")}
"""Words that mean a form of files there."""


@each_file
def test_no_arch_is_named(path: Path) -> None:
    """Neither its name nor its config class: what differs between archs is behind ``VLM`` and ``VLMConfig``."""
    if part(path) == "config":
        return
    own = path.stem if part(path) == "vlm" else ""
    tree = parse(path)
    found = [n.value for n in strings(tree) if n.value in ARCHS and n.value != own and n.value not in FORMATS.get(path, ())]
    names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} | {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    names |= {name.split(".")[-1] for name in imported(tree, path)}
    allowed = {ARCHS[own].__name__} if own in ARCHS else set()
    assert found == []
    assert names & ARCH_CLASSES <= allowed


@each_file
def test_no_question_for_the_kind_of_vlm(path: Path) -> None:
    """``isinstance`` over config classes of ``[vlm]`` would be a ladder of archs in disguise. An arch may assert its own."""
    if part(path) == "config":
        return
    own = {ARCHS[path.stem].__name__} if part(path) == "vlm" and path.stem in ARCHS else set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "issubclass"):
            asked = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
            assert not asked & (ARCH_CLASSES - own | {"VLMConfig"}), f"{path.name}:{node.lineno}"


def test_nothing_below_names_a_module_of_an_arch() -> None:
    """Only ``vlm/build.py`` finds the arch files, and it finds them by listing the folder."""
    modules = {f"kempnerforge.vlm.{name}" for name in ARCHS}
    for path in FILES:
        if part(path) != "vlm":
            assert not {n for n in imported(parse(path), path) if any(n.startswith(m) for m in modules)}, path


# ---- what is never called -----------------------------------------------------------------------------------------------


OWN_JSON = (
    "util/reading.py", "checkpoint/manifest.py", "data/text/render_process.py", "data/text/rendering.py", "data/text/tokenizer.py",
    "convert/processor.py",
)  # fmt: skip
"""The reader, and files that parse what this package itself has just written."""


@each_file
def test_nothing_dangerous_is_called(path: Path) -> None:
    tree = parse(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg in ("shell", "trust_remote_code"):
            assert isinstance(node.value, ast.Constant) and node.value.value is False, f"{path.name}:{node.value.lineno}: {node.arg}"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "os.system", "os.popen"), f"{path.name}:{node.lineno}: {called}"
            if called in ("json.load", "json.loads", "tomllib.load", "tomli.load"):  # without limits: see util/reading.py
                assert path.relative_to(PACKAGE).as_posix() in OWN_JSON, f"{path.name}:{node.lineno}: {called}"
            if called == "torch.load":
                assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords), f"{path.name}:{node.lineno}"
    names = set(imported(tree, path))
    assert not any(re.match(r"(torchvision|timm|tensorflow|jax)\b", name) for name in names)
    if path != PACKAGE / "checkpoint" / "reader.py":
        assert not any(re.match(r"(pickle|dill|cloudpickle|shelve)\b", name) for name in names)


@each_file
def test_files_and_functions_stay_readable(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", text)
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 80, f"{path.name}: {node.name}"
        if isinstance(node, ast.ExceptHandler):
            bare = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            assert not (bare and all(isinstance(s, ast.Pass) for s in node.body)), f"{path.name}:{node.lineno}: swallows everything"


# ---- config: what can be written is read --------------------------------------------------------------------------------


def sections() -> dict[str, type]:
    """Every dataclass that a TOML file can fill."""
    found: dict[str, type] = {}
    waiting: list[type] = [JobConfig, StageConfig]
    for union in UNIONS.values():
        waiting += [union.class_for(name) for name in union.entries]
    while waiting:
        cls = waiting.pop()
        if cls.__name__ not in found:
            found[cls.__name__] = cls
            for hint in fields_of(cls).values():
                inner = [hint, *getattr(hint, "__args__", ())]
                waiting += [c for c in inner if isinstance(c, type) and dataclasses.is_dataclass(c) and c not in UNIONS]
    return found


def reads(node: ast.AST) -> Iterator[str]:
    """Attributes that are read under ``node``. What only a section's own check reads does not count."""
    if isinstance(node, ast.FunctionDef) and node.name == "__post_init__":
        return
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        yield node.attr
    for child in ast.iter_child_nodes(node):
        yield from reads(child)


READ = {name for path in FILES for name in reads(parse(path))} | {"plugins"}  # the loader takes these from the table, before there is a job


@pytest.mark.parametrize("name", sorted(sections()))
def test_every_key_is_read(name: str) -> None:
    """A key that nothing reads would be a promise that nothing keeps. An arch that has a config but no model yet is spared."""
    cls = sections()[name]
    arch = registry.vlm_configs.name_of(cls)
    if arch is None or (PACKAGE / "vlm" / f"{arch}.py").exists():
        assert fields_of(cls).keys() - READ == set()
