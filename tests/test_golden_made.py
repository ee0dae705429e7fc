"""tools/check_golden.py on archives of other dimensions, depths, names and settings than those of tests/golden."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fixtures.archives import DIMS, MAKERS, NAMES, Archive, network_of

TOOLS = Path(__file__).parents[1] / "tools"
#: Methods whose archives hold features, without a network.
FEATURES = {"DiffTPT selection", "TDA", "MTA", "Tip-Adapter and Tip-Adapter-F", "TFUP and TFUP-T"}


@pytest.fixture(scope="module")
def tool(tiny_clip: Any) -> Any:
    """The tool, with each network made once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        module = importlib.import_module("check_golden")
        own = sys.modules["tiny_clip"]

        def backbone(golden: Any) -> Any:
            return network_of(own, golden.meta["dims"], golden.meta["weights_seed"])[0]

        patch.setattr(module.Golden, "backbone", property(backbone))
        yield module


@pytest.fixture(scope="module")
def made(tiny_clip: Any) -> Any:
    """Makes the archive of a method, once."""
    kept: dict[str, Archive] = {}

    def make(method: str) -> Archive:
        if method not in kept:
            kept[method] = Archive(method, tiny_clip, network=method not in FEATURES)
            MAKERS[method](kept[method])
        return kept[method]

    return make


def test_every_comparison_has_an_archive_made_here(tool: Any) -> None:
    assert set(MAKERS) == set(tool.CHECKS)


def test_the_dimensions_are_not_those_of_the_archives_at_hand() -> None:
    for path in (Path(__file__).parent / "golden").glob("*.npz"):
        with np.load(path, allow_pickle=False) as archive:
            meta = json.loads(archive["meta"].item())
        same = {key for key, value in meta.get("dims", {}).items() if value == DIMS[key]}
        assert same <= {"context_length", "vocab_size"}
        assert not set(NAMES) & set(meta.get("class_names", []))


@pytest.mark.parametrize("method", sorted(MAKERS))
def test_an_archive_of_other_settings_agrees(
    tool: Any, made: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    archive = made(method)
    status, lines = tool.main([archive.save(tmp_path)]), capsys.readouterr().out.splitlines()
    assert status == 0, "\n".join(line for line in lines if not line.endswith(("e-06", "e-07", "0.0e+00")))
    assert int(lines[-1].split(" ")[0]) >= 2


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the paths of all numbers and switches of metadata."""
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(value, (*path, key))
    elif isinstance(tree, bool | int | float):
        yield path


def changed(meta: dict[str, Any], path: tuple[Any, ...]) -> dict[str, Any]:
    """Return a copy of metadata with another value at ``path``."""
    copy = json.loads(json.dumps(meta))
    place = copy
    for key in path[:-1]:
        place = place[key]
    value = place[path[-1]]
    place[path[-1]] = not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else 0.6 * value
    return copy


@pytest.mark.parametrize("method", sorted(MAKERS))
def test_every_setting_of_an_archive_is_followed(tool: Any, made: Any, tmp_path: Path, method: str) -> None:
    archive, without_effect = made(method), set()
    for path in leaves({key: archive.meta[key] for key in ("cases", "hyper", "teacher") if key in archive.meta}):
        try:
            status = tool.main([archive.save(tmp_path, changed(archive.meta, path))])
        except (Exception, SystemExit):
            status = 1
        if not status:
            without_effect.add("/".join(map(str, path)))
    assert without_effect == archive.ignored
