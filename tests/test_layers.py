"""Imports point down: no module imports from a higher layer, and no two modules import each other.

Every import of every module is looked at, also those inside functions and under ``TYPE_CHECKING``.
"""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "vlprompt"

#: Packages and modules of ``vlprompt``, low to high. What shares a layer does not import each other.
LAYERS = (
    ("errors", "_lazy"),
    ("_dist", "_files", "_finite", "_memory", "_random", "_shapes", "_terminal", "registry", "schedule", "version"),
    ("config",),
    ("backbone", "datasets", "needs"),
    ("prompts",),
    ("caches", "objectives", "testtime"),
    ("methods",),
    ("meta",),
    ("data", "generation", "io"),
    ("pairs",),
    ("engine",),
    ("runs",),
    ("protocols",),
    ("cli",),
    ("__main__",),
)
#: Two towers that meet in ``engine``: models know no data sets, and data sets know no models.
TOWERS = (
    {"backbone", "prompts", "caches", "objectives", "testtime", "methods", "meta", "io"},
    {"datasets", "data", "generation", "pairs"},
)
#: Where modules of vlprompt are imported by a name that is computed, so that what is imported cannot be read off.
COMPUTED = {
    "vlprompt.cli.main": "the command of the command line",
    "vlprompt._lazy": "the names of a package, which its stub lists; what vlprompt/__init__.py provides",
    "vlprompt.datasets.readers": "the reader that a card names",
    "vlprompt.methods": "every method",
    "vlprompt.objectives": "every objective",
}


@dataclass(frozen=True)
class Import:
    """``source`` imports ``target`` in ``line``; ``kind`` is ``top``, ``function`` or ``typing``."""

    source: str
    target: str
    line: int
    kind: str

    def __str__(self) -> str:
        return f"{self.source}:{self.line} imports {self.target} ({self.kind})"


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def _statements(node: ast.AST, kind: str) -> Iterator[tuple[ast.Import | ast.ImportFrom, str]]:
    """Yield the import statements below ``node``, and where each stands."""
    typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    for child in ast.iter_child_nodes(node):
        inner = kind
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            inner = "function"
        elif typing and isinstance(node, ast.If) and child in node.body:
            inner = "typing"
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, inner
        yield from _statements(child, inner)


def _lazy_names(package: str) -> dict[str, str]:
    """Return the modules that the names of a package with a stub are loaded from."""
    stub = MODULES[package].with_suffix(".pyi")
    if not stub.is_file():
        return {}
    found: dict[str, str] = {}
    for statement in ast.parse(stub.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.ImportFrom):
            found |= {alias.asname or alias.name: str(statement.module) for alias in statement.names}
    return found


def _imports(module: str) -> Iterator[Import]:
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    for statement, kind in _statements(tree, "top"):
        if isinstance(statement, ast.Import):
            targets = [alias.name for alias in statement.names]
        else:
            assert statement.level == 0 and statement.module, f"{module}:{statement.lineno}: a relative import"
            package = statement.module
            lazy = _lazy_names(package) if package in MODULES else {}
            targets = [
                f"{package}.{alias.name}" if f"{package}.{alias.name}" in MODULES else lazy.get(alias.name, package)
                for alias in statement.names
            ]
        for target in targets:
            if target.split(".")[0] == "vlprompt":
                yield Import(module, target, statement.lineno, kind)
    if any(isinstance(node, ast.Attribute) and node.attr == "iter_modules" for node in ast.walk(tree)):
        for other in MODULES:  # a package that imports every module in it
            if other.rpartition(".")[0] == module:
                yield Import(module, other, 0, "top")


IMPORTS = [each for module in MODULES for each in _imports(module)]


def _with_packages(imports: list[Import]) -> dict[str, set[str]]:
    """Return what each module imports; importing a.b.c runs the packages a and a.b as well."""
    graph: dict[str, set[str]] = defaultdict(set)
    for each in imports:
        parts = each.target.split(".")
        for length in range(2, len(parts) + 1):
            package = ".".join(parts[:length])
            # The packages that a module is in have begun to be imported before it.
            if package == each.target or not f"{each.source}.".startswith(f"{package}."):
                graph[each.source].add(package)
    return graph


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Return the nodes of a circle in ``graph``, the first one twice; empty if there is none."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node not in done:
            for other in sorted(graph.get(node, ())):
                if found := visit(other, [*path, node]):
                    return found
            done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := visit(node, []))), [])


def _layer(module: str) -> int:
    part = module.split(".")[1]
    found = [number for number, names in enumerate(LAYERS) if part in names]
    assert found, f"{part} has no layer: add it to LAYERS"
    return found[0]


# -- the modules ------------------------------------------------------------------------------------------------------
def test_every_module_has_a_layer() -> None:
    known = {module.split(".")[1] for module in MODULES if "." in module}
    assert sorted(known) == sorted(name for names in LAYERS for name in names)


def test_nothing_imports_upwards() -> None:
    wrong = []
    for each in IMPORTS:
        if each.source == "vlprompt":
            continue
        if each.target == "vlprompt":
            wrong.append(f"{each}: the top of the package is above all its modules")
            continue
        source, target = each.source.split(".")[1], each.target.split(".")[1]
        if source != target and _layer(each.target) >= _layer(each.source):
            wrong.append(str(each))
        if any(source in tower and target not in tower and target in other for tower, other in (TOWERS, TOWERS[::-1])):
            wrong.append(f"{each}: models and data sets do not know each other")
    assert not wrong, "\n".join(wrong)


def test_the_top_imports_only_what_is_quick() -> None:
    top = {each.target for each in IMPORTS if each.source == "vlprompt" and each.kind == "top"}
    assert {_layer(target) for target in top} <= {0, 1}


def test_no_circles() -> None:
    assert circle(_with_packages([each for each in IMPORTS if each.kind != "typing"])) == []


def test_imports_inside_functions_are_for_the_command_line() -> None:
    late = {each for each in IMPORTS if each.kind == "function" and not each.source.startswith("vlprompt.cli")}
    assert sorted(str(each) for each in late) == []


def test_computed_imports_are_known() -> None:
    calls = {
        module
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module")
        and not isinstance(node.args[0], ast.Constant)
    }  # fmt: skip
    assert calls == set(COMPUTED)


def test_what_a_card_calls_a_reader_is_a_module_of_readers() -> None:
    from vlprompt.datasets.readers import _HOMES

    files = {path.stem for path in (ROOT / "datasets" / "readers").glob("*.py")}
    assert {home.partition(":")[0] for home in _HOMES.values()} <= files


@pytest.mark.parametrize("package", [module for module in MODULES if MODULES[module].with_suffix(".pyi").is_file()])
def test_a_stub_lists_what_its_package_has(package: str) -> None:
    loaded = importlib.import_module(package)
    names = _lazy_names(package)
    assert loaded.__all__ == dir(loaded) == sorted(names) and names
    for name, home in names.items():
        assert getattr(loaded, name) is getattr(importlib.import_module(home), name)
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        loaded.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("graph", "expected"),
    [
        ({"a": {"b"}, "b": {"c"}}, []),
        ({"a": {"b"}, "b": {"c"}, "c": {"b"}}, ["b", "c", "b"]),
        ({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": set()}, []),
        ({"a": {"a"}}, ["a", "a"]),
    ],
)
def test_circles_are_found(graph: dict[str, set[str]], expected: list[str]) -> None:
    assert circle(graph) == expected


# -- data sets are facts ----------------------------------------------------------------------------------------------
def test_no_module_of_datasets_imports_torch_at_its_top() -> None:
    graph = _with_packages([each for each in IMPORTS if each.kind == "top"])
    reached, waiting = set(), [module for module in MODULES if module.startswith("vlprompt.datasets")]
    while waiting:
        module = waiting.pop()
        if module not in reached:
            reached.add(module)
            waiting += graph[module]
    wrong = []
    for module in sorted(reached):
        tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
        for statement, kind in _statements(tree, "top"):
            names = [alias.name for alias in statement.names] if isinstance(statement, ast.Import) else []
            names += [str(statement.module)] if isinstance(statement, ast.ImportFrom) else []
            if kind == "top" and {"torch", "torchvision", "pytorch_lightning"} & {name.split(".")[0] for name in names}:
                wrong.append(f"{module}:{statement.lineno}")
    assert wrong == []


def test_a_data_set_is_found_and_read_without_torch() -> None:
    code = (
        "import sys, vlprompt.datasets as d\n"
        "assert 'demo' in d.list_datasets() and len(d.load_dataset('demo').train) > 0\n"
        "print(sorted({'torch', 'torchvision', 'numpy', 'PIL'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert "torch" not in result.stdout, result.stdout
