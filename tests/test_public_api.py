"""The public face: names, docstrings and annotations of everything, imports that stay light, and the README's lines."""

from __future__ import annotations

import configparser
import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import vlprompt

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(vlprompt.__path__, "vlprompt.")
    if not module.name.endswith("__main__")  # importing it runs it
)


def public(members: dict[str, Any], module: str) -> Iterator[tuple[str, Any]]:
    """Functions and classes that ``module`` defines under a public name."""
    for name, value in members.items():
        value = inspect.unwrap(value) if callable(value) else value
        ours = getattr(value, "__module__", None) == module
        if not name.startswith("_") and ours and (inspect.isfunction(value) or inspect.isclass(value)):
            yield name, value


def functions_of(owner: type) -> Iterator[tuple[str, Any]]:
    """Public methods and properties that a class defines itself, and its own ``__init__``."""
    for name, value in vars(owner).items():
        if name.startswith("_") and name != "__init__":
            continue
        if isinstance(value, (classmethod, staticmethod)):
            value = value.__func__
        if isinstance(value, property):
            value = value.fget
        if inspect.isfunction(value) and value.__module__ == owner.__module__ and value.__qualname__.endswith(name):
            yield name, inspect.unwrap(value)


def everything() -> Iterator[tuple[str, str, Any]]:
    """``(where, name, function or class)`` of all that is public in the package."""
    for name in MODULES:
        for called, value in public(vars(importlib.import_module(name)), name):
            yield name, called, value
            if inspect.isclass(value):
                for inner, function in functions_of(value):
                    yield name, f"{called}.{inner}", function


def written(value: Any) -> bool:
    """Whether a docstring was written (a dataclass or NamedTuple gets its signature as one by itself)."""
    doc = inspect.getdoc(value) if inspect.isclass(value) else value.__doc__
    return bool(doc and doc.strip()) and not doc.startswith(f"{value.__name__}(")


def test_the_walk_finds_the_package() -> None:
    assert len(MODULES) > 40 and "vlprompt.methods.coop" in MODULES
    names = {f"{where}.{name}" for where, name, _ in everything()}
    assert {"vlprompt.io.head.Head.with_classes", "vlprompt.errors.nearest"} <= names and len(names) > 250


@pytest.mark.parametrize("name", vlprompt.__all__)
def test_every_public_name_exists_and_is_documented(name: str) -> None:
    value = getattr(vlprompt, name)
    assert name in dir(vlprompt)
    if name != "__version__":
        assert written(value) and value.__module__.startswith("vlprompt.")


def test_public_names_are_those_that_can_be_found() -> None:
    assert vlprompt.__all__ == sorted(vlprompt.__all__, key=lambda name: (name.lower() == name, name))
    with pytest.raises(AttributeError, match="no attribute 'load_hed'"):
        vlprompt.load_hed  # noqa: B018


@pytest.mark.parametrize("name", MODULES)
def test_every_module_is_documented_and_keeps_its_promises(name: str) -> None:
    module = importlib.import_module(name)
    assert (module.__doc__ or "").strip() or "\n" not in inspect.getsource(module).strip()
    assert [entry for entry in getattr(module, "__all__", ()) if not hasattr(module, entry)] == []


def test_everything_public_is_documented() -> None:
    bare = [
        f"{where}.{name}" for where, name, value in everything() if not name.endswith("__init__") and not written(value)
    ]
    assert bare == []


def test_everything_public_is_annotated() -> None:
    bare = []
    for where, name, value in everything():
        if inspect.isclass(value):
            continue
        hints = inspect.signature(value)
        kinds = {parameter.name: parameter.annotation for parameter in hints.parameters.values()}
        bare += [f"{where}.{name}({key})" for key, kind in kinds.items() if kind is inspect.Parameter.empty
                 and key not in ("self", "cls")]  # fmt: skip
        if hints.return_annotation is inspect.Signature.empty:
            bare.append(f"{where}.{name} ->")
    assert bare == []


def test_the_types_reach_the_users_checker() -> None:
    package = ROOT / "vlprompt"
    assert (package / "py.typed").is_file()
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    shipped = {path for pattern in setup["options.package_data"]["vlprompt"].split() for path in package.glob(pattern)}
    assert {package / "py.typed", *package.rglob("*.pyi")} <= shipped


#: The names under which packages of the extras are imported, where they are called otherwise.
IMPORTED_AS = {"scikit-learn": "sklearn", "resvg-py": "resvg_py", "pillow-heif": "pillow_heif"}
#: Packages that others need; nothing of vlprompt names them.
NEEDED_BY_OTHERS = {"accelerate"}  # diffusers


def test_every_extra_is_used() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = setup["options.extras_require"]
    wanted = {re.split("[<>=[]", line)[0] for name in extras if name != "dev" for line in extras[name].split()}
    files = [*(ROOT / "vlprompt").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]
    words = {word for path in files for word in re.findall(r"\w+", path.read_text(encoding="utf-8"))}
    assert sorted(name for name in wanted - NEEDED_BY_OTHERS if IMPORTED_AS.get(name, name) not in words) == []


def imported_by(code: str) -> set[str]:
    """Heavy packages that ``code`` imports in a process of its own."""
    heavy = "{'torch', 'pytorch_lightning', 'open_clip', 'torchvision', 'PIL', 'numpy'} & set(sys.modules)"
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", f"import sys\n{code}\nprint(*sorted({heavy}))"]
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=True, timeout=120)
    return set(done.stdout.split())


def test_importing_is_light() -> None:
    code = "import vlprompt, vlprompt.errors, vlprompt.cli.main; vlprompt.__version__; dir(vlprompt)"
    assert imported_by(code) == set()


def test_help_imports_no_command() -> None:
    code = "import sys; from vlprompt.cli.main import main; main(['--help']); print(*sys.modules)"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=True, timeout=120)
    modules = {name for name in done.stdout.splitlines()[-1].split() if name.startswith("vlprompt.")}
    light = ("_dist", "_lazy", "_terminal", "cli", "cli.main", "errors", "version")
    assert modules == {f"vlprompt.{name}" for name in light}


def test_data_come_without_torch() -> None:
    assert "torch" not in imported_by("import vlprompt.datasets.catalogue; vlprompt.datasets.catalogue.list_datasets()")


def test_five_lines_train_save_and_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLPROMPT_CACHE", str(tmp_path / "cache"))
    backbone = vlprompt.load_backbone("demo")
    data = vlprompt.load_dataset("demo", shots=2, seed=1, classes="base")
    method = vlprompt.create_method("coop", backbone, data.class_names, context_init="a photo of a")
    run = vlprompt.train(method, data, transform="center", epochs=2, output=str(tmp_path / "runs"))
    head = vlprompt.load_head(run.head_dir)

    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(head(images), method(images))
    assert head.class_names == data.class_names and "coop" in run.table()
    assert 0 <= run.results["results"]["new"]["accuracy"] <= 100
    fresh = vlprompt.create_method("coop", backbone, data.class_names, context_init="a photo of a")
    assert vlprompt.train(fresh, data, transform="center", epochs=2, output=str(tmp_path / "runs")).reused
    with torch.no_grad():
        assert torch.equal(fresh(images), method(images))  # a finished run's learnables are taken over
