"""The house: imports go down, nothing goes in circles, and nothing is too long to read in one go."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import hpd

PACKAGE = Path(hpd.__file__).parent
# A module imports from its own package and from those before it.
RANKS = [
    "files",
    "locks",
    "http",
    "progress",
    "batch",
    "objectives",
    "methods",
    "config",
    "losses",
    "models",
    "data",
    "generation",
    "teachers",
    "evaluate",
    "estimate",
    "training",
    "generate",
    "demo",
    "experiments",
    "terminal",
    "cli",
    "__main__",
]
MODULES = {
    ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts): file for file in PACKAGE.rglob("*.py")
}
MAX_FUNCTION_LINES = 60
MAX_MODULE_LINES = 400
MAX_LINE_LENGTH = 110
MAX_FILES_AT_THE_TOP = 8


def package_of(module: str) -> str:
    """The part of the house that a module belongs to; the root itself has no part."""
    return module.split(".")[1] if "." in module else ""


def imports_of(module: str) -> Iterator[tuple[str, int]]:
    """Modules of hpd that a module imports anywhere: at the top, in functions, for type checkers only."""
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            while name and name not in MODULES and f"{name}.__init__" not in MODULES:
                name = name.rpartition(".")[0]
            if name:
                yield (name if name in MODULES else f"{name}.__init__"), node.lineno  # type: ignore[union-attr]


def test_every_module_has_a_rank():
    assert {package_of(module) for module in MODULES} - {"__init__"} == set(RANKS)


def test_imports_go_down():
    rank = {package: place for place, package in enumerate(RANKS)}
    up = [
        f"{module}:{line} imports {other}"
        for module in MODULES
        if module != "hpd.__init__"  # its names load on first use
        for other, line in imports_of(module)
        if other != "hpd.__init__" and rank[package_of(module)] < rank[package_of(other)]
    ]
    assert not up, "\n".join(up)


def test_no_circle():
    edges = {
        m: {other for other, _ in imports_of(m)} - {m, "hpd.__init__"} for m in MODULES if m != "hpd.__init__"
    }
    while leaves := [module for module, targets in edges.items() if not targets & edges.keys()]:
        for leaf in leaves:
            del edges[leaf]
    assert not edges, f"these modules import each other: {', '.join(sorted(edges))}"


def test_nothing_is_too_long():
    long = []
    for module, file in MODULES.items():
        lines = file.read_text(encoding="utf-8").splitlines()
        if len(lines) > MAX_MODULE_LINES:
            long.append(f"{module}: {len(lines)} lines")
        long += [
            f"{module}:{n}: {len(line)} columns"
            for n, line in enumerate(lines, 1)
            if len(line) > MAX_LINE_LENGTH
        ]
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1  # type: ignore[operator]
                if length > MAX_FUNCTION_LINES:
                    long.append(f"{module}:{node.lineno} {node.name}: {length} lines")
    assert not long, "\n".join(long)


def test_few_files_at_the_top():
    assert len(list(PACKAGE.glob("*.py"))) <= MAX_FILES_AT_THE_TOP


@pytest.mark.parametrize("name", [name for name in hpd.__all__ if name != "__version__"])
def test_public_names_are_what_their_home_holds(name):
    home = importlib.import_module(hpd._HOMES[name])
    assert getattr(hpd, name) is getattr(home, name)
    assert name in home.__all__


def test_a_class_name_means_one_thing():
    homes: dict[str, list[str]] = {}
    for module, file in MODULES.items():
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                homes.setdefault(node.name.lstrip("_"), []).append(module)
    assert not {name: where for name, where in homes.items() if len(where) > 1}


def test_packages_only_export():
    for module, file in MODULES.items():
        if not module.endswith("__init__") or module in ("hpd.__init__", "hpd.evaluate.__init__"):
            continue
        body = ast.parse(file.read_text(encoding="utf-8")).body
        assert ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))), f"{module} has no charter"
        kinds = (ast.Expr, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign)
        assert all(isinstance(node, kinds) for node in body), f"{module} does more than export"
