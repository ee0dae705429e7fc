"""``vlprompt data``: what is printed, the statuses, and that torch stays out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vlprompt.cli.main import main

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "fewshot_caltech101.json").read_text())


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = main(["data", *words])
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture(scope="module")
def caltech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published split of Caltech-101 with empty files in place of its images."""
    root = tmp_path_factory.mktemp("caltech")
    images = root / "caltech-101" / "101_ObjectCategories"
    fields = GOLDEN["class_fields"]
    split: dict[str, list[list[object]]] = {"train": [], "val": [], "test": []}
    for label, row in enumerate(GOLDEN["classes"]):
        (images / row[0]).mkdir(parents=True)
        for part, items in split.items():
            column = fields.index({"train": "train image numbers"}.get(part, part))
            items += [[f"{row[0]}/image_{number:04d}.jpg", label, row[1]] for number in row[column]]
    for items in split.values():
        for path, _, _ in items:
            (images / str(path)).touch()
    (root / "caltech-101" / "split_zhou_Caltech101.json").write_text(json.dumps(split))
    return root


@pytest.mark.covering(every=3)
@pytest.mark.parametrize("row", sorted(GOLDEN["rows"]))
def test_published_shots(row: str, caltech: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seed, shots = ("".join(c for c in word if c.isdigit()) for word in row.split("_"))
    from hashlib import sha256

    for part in ("train", "val"):
        words = ("shots", "caltech101", "--root", str(caltech), "--shots", shots, "--seed", seed, "--part", part)
        status, out, _ = run(capsys, *words, "--paths")
        assert status == 0
        assert sha256(out.removesuffix("\n").encode()).hexdigest() == GOLDEN["rows"][row]["sha256"][part]
        assert run(capsys, *words, "--print-hash")[1].strip() == GOLDEN["rows"][row]["sha256"][part]


def test_shots_are_exported_and_counted(caltech: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("shots", "caltech101", "--root", str(caltech), "--shots", "1")
    status, out, _ = run(capsys, *words, "--classes", "base")
    assert status == 0 and "50 images" in out and "1,549 images" in out
    status, out, _ = run(capsys, *words, "--export", str(tmp_path / "list.jsonl"))
    assert status == 0 and "--data.shots_file" in out
    assert len((tmp_path / "list.jsonl").read_text().splitlines()) == 201
    assert run(capsys, *words, "--export", str(tmp_path / "x"), "--classes", "new")[0] == 3


def test_lists(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "list")
    assert status == 0 and out.count("\n") > 40 and "imagenet_sketch" in out and "1,281,167" in out
    rows = json.loads(run(capsys, "list", "--group", "fewshot11", "--json")[1])
    assert len(rows) == 11 and {row["name"] for row in rows} >= {"imagenet", "dtd"}
    assert next(row for row in json.loads(run(capsys, "list", "demo", "--json")[1]))["here"] is True
    assert run(capsys, "list", "*5*")[0] == 0
    status, _, err = run(capsys, "list", "--group", "fewshot12")
    assert status == 3 and "Did you mean 'fewshot11'" in err


def test_show_and_where(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, out, _ = run(capsys, "show", "pets")
    assert status == 0 and "oxford_pets" in out and "CC BY-SA 4.0" in out and "abyssinian" in out
    assert json.loads(run(capsys, "show", "pets", "--json")[1])["classes"]["count"] == 37
    status, out, _ = run(capsys, "where", "terra", "--root", str(tmp_path))
    assert status == 0 and str(tmp_path / "terra_incognita") in out and "not there" in out


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["chek"], "Did you mean 'check'"),
        (["check", "caltech100"], "Did you mean 'caltech101'"),
        (["check", "dtd", "--decod"], "'--decod' is not an option of `vlprompt data check`. Did you mean '--decode'"),
        (["show"], "takes one NAME, got 0"),
        (["shots", "demo", "--shots", "many"], "--shots is 'many'"),
        (["shots", "demo", "--part", "trian"], "--part is 'trian'"),
        (["shots", "demo", "--shots", "0"], "shots is 0"),
        (["shots", "demo", "--sampler", "dasl"], "Did you mean 'dassl-v1'"),
        (["split", "dtd", "--protocol", "coup"], "dtd has: coop, official, custom"),
        (["new", "--name", "x"], "needs --from-folder"),
        (["import-shots", "x.json"], "needs --name"),
    ],
)
def test_wrong_usage(words: list[str], match: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, *words)
    assert status == 3 and match in err


def test_check_statuses(tmp_path: Path, paint: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "check", "demo")[0] == 0
    status, out, _ = run(capsys, "check", "dtd", "--root", str(tmp_path))
    assert status == 2 and "dtd: cannot be used" in out and "is not there" in out
    for name in ("a", "b"):
        for number in range(4):
            paint(tmp_path / "mine" / name / f"{number}.png", number)
    words = ("check", "folder", "--root", str(tmp_path / "mine"))
    assert run(capsys, *words)[0] == 0
    status, out, _ = run(capsys, *words, "--strict")
    assert status == 1 and "S17 2 classes have fewer than 16 training images" in out
    (tmp_path / "mine" / "a" / "0.png").write_bytes(b"")
    status, out, _ = run(capsys, *words, "--json")
    found = json.loads(out)[0]
    assert (
        status == 2
        and not found["ok"]
        and {"code": "S16", "severity": "error"}.items() <= found["problems"][-2].items()
    )


def test_a_folder_of_ones_own_becomes_a_data_set(
    tmp_path: Path, paint: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLPROMPT_CARDS", str(tmp_path / "cards"))
    for name in ("a", "b"):
        for number in range(4):
            paint(tmp_path / "mine" / name / f"{number}.png", number)
    status, out, _ = run(capsys, "new", "--from-folder", str(tmp_path / "mine"), "--name", "mine")
    assert status == 0 and "2 classes; images: 4 train, 2 val, 2 test" in out
    assert run(capsys, "check", "mine")[0] == 0 and "mine" in run(capsys, "list")[1]
    status, _, err = run(capsys, "new", "--from-folder", str(tmp_path / "mine"), "--name", "mine")
    assert status == 3 and "already" in err


def test_torch_is_not_imported(caltech: Path) -> None:
    code = f"""
import sys
from vlprompt.cli.main import main
root = ["--root", {str(caltech)!r}]
words = ["list"], ["show", "dtd"], ["check", "caltech101", *root], ["shots", "caltech101", "--print-hash", *root]
print([main(["data", *own]) for own in words])
print([name for name in ("torch", "torchvision", "pytorch_lightning", "open_clip", "timm") if name in sys.modules])
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.splitlines()[-2:] == ["[0, 0, 2, 0]", "[]"], done.stdout[-500:] + done.stderr
