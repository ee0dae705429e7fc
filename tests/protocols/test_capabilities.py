"""What ``vlprompt list methods`` says of each method, and that the README says the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlprompt.cli.main import main
from vlprompt.methods import list_methods
from vlprompt.protocols.capabilities import capabilities, markdown

#: Numbers that the papers or their code have on ViT-B/16.
PUBLISHED = {
    "zeroshot": 0,
    "coop": 16 * 512,
    "cocoop": 35_360,
    "kgcoop": 4 * 512,
    "prograd": 16 * 512,
    "vpt": 73_728,
    "ivlp": 46_080,
    "maple": 3_555_072,
    "promptsrc": 46_080,
    "visual_prompt": 69_840,
    "upt": 566_400,
    "clip_adapter": 512**2 // 2,
    "restore": 3_555_072 + 2 * 2_100_736,
    "dept_lowrank": 7_938,
    "clip_lora": 184_320,
    "ramt": 28_901_376,
}


SOURCES = ("coop", "zeroshot", "tip_adapter", "tfup", "promptkd", "tpt", "tda")


def test_parameter_counts_are_the_published_numbers() -> None:
    found = {one.name: one for one in capabilities(list_methods())}
    assert {name: found[name].parameters for name in PUBLISHED} == PUBLISHED
    assert all(one.cached is not one.image for one in found.values())
    frozen_text = "ape gda mta promptkd ramt tda tfup tfup_t tip_adapter tip_adapter_f visual_prompt vpt zero zeroshot"
    frozen_text += " clip_adapter taskres linear_probe lp_plus_plus"
    assert sorted(one.name for one in found.values() if not one.text) == sorted(frozen_text.split())
    whence = {name: found[name].learns_from for name in SOURCES}
    assert whence == {
        "coop": "labelled images",
        "zeroshot": "-",
        "tip_adapter": "labelled images",
        "tfup": "unlabelled images",
        "promptkd": "unlabelled images",
        "tpt": "each test image",
        "tda": "test images so far",
    }
    assert all(one.about for one in found.values())
    assert {one.towers for one in found.values() if one.image} == {"any", "vision transformers"}
    assert found["visual_prompt"].towers == "any"


def test_what_was_checked_against_official_code_has_tensors_of_it() -> None:
    archives = {path.stem for path in (Path(__file__).parents[1] / "golden").glob("*.npz")}
    shared = {"tip_adapter_f": "tip_adapter", "tfup_t": "tfup"}  # one archive for both
    for one in capabilities(list_methods()):
        assert (shared.get(one.name, one.name) in archives) is (one.checked == "official code"), one.name


def test_the_readme_has_the_table() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert markdown(capabilities(list_methods())) in text, "print it again: vlprompt list methods --markdown"


def test_the_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "methods", "ma*"]) == 0
    out = capsys.readouterr().out
    assert "3,555,072" in out and "vision transformers" in out and len(out.splitlines()) == 2
    assert main(["list", "methods", "coop", "--markdown"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("| `coop` | learned context vectors")
