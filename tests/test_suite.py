"""What every test of this suite has to do: assert something, reach its end, and depend on no clock and no free port."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FILES = sorted(path for path in TESTS.rglob("*.py") if path.is_relative_to(TESTS))
#: Calls that check something.
CHECKS = {"raises", "warns", "fail", "deprecated_call", "assert_close", "assert_called_once_with", "assert_outcomes"}
CLOCKS = {"monotonic", "perf_counter", "time", "process_time"}


def name_of(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def checks(node: ast.AST) -> bool:
    """Whether the code asserts something by itself."""
    return any(
        isinstance(part, ast.Assert)
        or (isinstance(part, ast.Call) and (name_of(part) in CHECKS or name_of(part) == "run" and fails_loudly(part)))
        for part in ast.walk(node)
    )


def fails_loudly(call: ast.Call) -> bool:
    """Whether a call of ``subprocess.run`` raises where the process fails."""
    return any(word.arg == "check" and getattr(word.value, "value", False) is True for word in call.keywords)


def checking_helpers(trees: list[ast.Module]) -> set[str]:
    """Return the names of helpers and fixtures that assert something, or that call one which does."""
    bodies = {function.name: function for tree in trees for function in functions(tree)}
    known = {name for name, body in bodies.items() if not name.startswith("test") and checks(body)}
    while True:
        more = {
            name
            for name, body in bodies.items()
            if name not in known and not name.startswith("test") and mentions(body, known)
        }
        if not more:
            return known
        known |= more


def mentions(node: ast.AST, names: set[str]) -> bool:
    return any(isinstance(part, ast.Call) and name_of(part) in names for part in ast.walk(node))


def own_nodes(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """Return the nodes of a function without those of functions inside it."""
    waiting: list[ast.AST] = list(function.body)
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            waiting += ast.iter_child_nodes(node)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(TESTS).as_posix())
def test_tests_assert_and_reach_their_end(path: Path) -> None:
    tree = ast.parse(path.read_text())
    shared = [
        ast.parse(other.read_text()) for other in (*TESTS.glob("fixtures/*.py"), *path.parent.glob("conftest.py"))
    ]
    helpers = checking_helpers([tree, *shared])
    problems = []
    for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
        if function.name.startswith("test_") and not checks(function) and not mentions(function, helpers):
            problems.append(f"line {function.lineno}: {function.name} asserts nothing")
        for node in own_nodes(function) if function.name.startswith("test_") else ():
            if isinstance(node, ast.Return):
                problems.append(
                    f"line {node.lineno}: {function.name} returns and counts as passed; skip, or cut it in two"
                )
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(TESTS).as_posix())
def test_tests_depend_on_no_clock_and_no_free_port(path: Path) -> None:
    tree, problems = ast.parse(path.read_text()), []
    measured = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and mentions(node.value, CLOCKS)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert) and (
            mentions(node.test, CLOCKS)
            or any(isinstance(part, ast.Name) and part.id in measured for part in ast.walk(node.test))
        ):
            problems.append(f"line {node.lineno}: seconds are measured, never asserted")
        if isinstance(node, ast.Call) and name_of(node) == "bind":
            problems.append(f"line {node.lineno}: another process can take a free port; see fixtures/processes.py")
        if isinstance(node, ast.Call) and name_of(node) == "sleep" and getattr(node.args[0], "value", 1) > 0.02:
            problems.append(f"line {node.lineno}: wait for what is expected, not for a time")
    assert not problems, "\n".join(problems)
