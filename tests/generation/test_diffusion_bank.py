"""Banks of generated images: addressed by content, filled once, resumed after a kill; damaged images are replaced."""

from __future__ import annotations

import json
import multiprocessing
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.fixtures.processes import die
from vlprompt.datasets import FileSource, Sample, ZipSource
from vlprompt.errors import ConfigError, DataError
from vlprompt.generation import DiffusionBank, GenerationSettings, Recipe, content_sha256, open_bank
from vlprompt.generation.bank import create_bank
from vlprompt.generation.making import ATTEMPTS, Progress, fill

FACTS: dict[str, Any] = {"format": "png", "seed": 0, "call": {"guidance_scale": 3.0}}


class Painter:
    """Generates noise from an image's corner pixel and the seed; counts images."""

    def __init__(self, flagged: int = 0) -> None:
        self.batches: list[int] = []
        self.flagged = flagged

    @property
    def count(self) -> int:
        return sum(self.batches)

    def generate(self, images: Sequence[Image.Image], seeds: Sequence[int]) -> list[Image.Image | None]:
        self.batches.append(len(images))
        generated: list[Image.Image | None] = []
        for image, seed in zip(images, seeds, strict=True):
            corner = np.asarray(image)[0, 0].tolist()
            noise = np.random.default_rng([seed, *corner]).integers(0, 256, (6, 6, 3), dtype=np.uint8)
            generated.append(Image.fromarray(noise))
        for index in range(min(self.flagged, len(generated))):
            generated[index] = None
        self.flagged = max(0, self.flagged - len(images))
        return generated


@pytest.fixture
def samples(tmp_path: Path, paint: Callable[..., Path]) -> list[Sample]:
    return [Sample(f"{n}.png", 0, FileSource(str(paint(tmp_path / "images" / f"{n}.png", n)))) for n in range(4)]


@pytest.fixture
def bank(tmp_path: Path) -> DiffusionBank:
    return create_bank(tmp_path / "bank", Recipe(FACTS, {"options": "--pipeline p"}))


def files(bank: DiffusionBank) -> dict[str, tuple[bytes, int]]:
    paths = sorted(bank.folder.rglob("*.png"))
    return {path.relative_to(bank.folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def pixels(images: Sequence[Image.Image]) -> list[bytes]:
    return [image.tobytes() for image in images]


def test_filled_once(bank: DiffusionBank, samples: list[Sample]) -> None:
    first, reports = Painter(), list[Progress]()
    filled = fill(bank, first, samples, 5, 3, reports.append)
    assert (filled.images, filled.found, filled.made, filled.remade) == (4, 0, 20, 0)
    assert first.batches == [3] * 6 + [2], "batches span source images"
    assert [report.done for report in reports if report.stage == "checking"] == [1, 2, 3, 4]
    making = [report for report in reports if report.stage == "making"]
    assert [report.done for report in making] == [0, 3, 6, 9, 12, 15, 18, 20]
    assert {report.total for report in making} == {20}
    assert making[0].left is None and making[3].left is not None and making[3].left > 0 and making[-1].left == 0
    second = Painter()
    again = fill(bank, second, samples, 5, 3)
    assert second.batches == [] and (again.found, again.made) == (20, 0)
    assert fill(bank, second, samples, 7, 100).made == 8 and second.batches == [8]
    for sample in samples:
        seven = pixels(bank.images(sample.source, 7))
        assert len(set(seven)) == 7 and pixels(bank.images(sample.source, 5)) == seven[:5]


def test_batches_do_not_change_images(bank: DiffusionBank, samples: list[Sample], tmp_path: Path) -> None:
    other = create_bank(tmp_path / "other", bank.recipe)
    fill(bank, Painter(), samples, 5, 3)
    fill(other, Painter(), samples[::-1], 5, 7)
    assert {name: data for name, (data, _) in files(bank).items()} == {
        name: data for name, (data, _) in files(other).items()
    }


def test_images_are_addressed_by_content(bank: DiffusionBank, samples: list[Sample], tmp_path: Path) -> None:
    fill(bank, Painter(), samples[:1], 2, 2)
    source: Any = samples[0].source
    renamed = tmp_path / "elsewhere.bin"
    renamed.write_bytes(Path(source.path).read_bytes())
    assert pixels(bank.images(FileSource(str(renamed)), 2)) == pixels(bank.images(source, 2))
    twice = [*samples, Sample("copy.png", 1, FileSource(str(renamed)))]
    painter = Painter()
    filled = fill(bank, painter, twice, 2, 2)
    assert filled.images == 4 and painter.count == 6
    with pytest.raises(DataError, match=r"nowhere.png cannot be read"):
        bank.images(FileSource(str(tmp_path / "nowhere.png")), 1)


def test_source_images_in_archives(bank: DiffusionBank, samples: list[Sample], tmp_path: Path) -> None:
    import zipfile

    source: Any = samples[0].source
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(source.path, "x/0.png")
    zipped = ZipSource(str(tmp_path / "a.zip"), "x/0.png")
    fill(bank, Painter(), [Sample("x/0.png", 0, zipped)], 2, 2)
    assert len(bank.images(zipped, 2)) == 2
    image = zipped.open()
    assert image.width != image.height

    class Turned:
        def open(self) -> Image.Image:
            return Image.frombytes("RGB", (image.height, image.width), image.tobytes())

        def stamp(self) -> str:
            return ""

    assert content_sha256(Turned()) != content_sha256(zipped), "the same bytes in another shape"


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "other", "record", "no record"])
def test_damaged_images_are_replaced(damage: str, bank: DiffusionBank, samples: list[Sample]) -> None:
    fill(bank, Painter(), samples, 3, 4)
    whole, image = files(bank), content_sha256(samples[1].source)
    path = bank.path(image, 2)
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-20] ^= 1
    if damage in ("flip", "cut", "other"):
        other = bank.path(image, 1).read_bytes()
        path.write_bytes({"flip": bytes(data), "cut": bytes(data[:-5]), "other": other}[damage])
    record = path.parent / "pictures.json"
    if damage == "record":
        record.write_text(record.read_text()[:-9])
    elif damage == "no record":
        record.unlink()
    elif damage == "gone":
        path.unlink()
    with pytest.raises(
        DataError, match=r"(damaged or missing|0 of the 3 generated images of .*1.png).*vlprompt bank --bank"
    ):
        bank.images(samples[1].source, 3)
    assert len(bank.images(samples[0].source, 3)) == 3
    painter = Painter()
    filled = fill(bank, painter, samples, 3, 4)
    lost = 3 if "record" in damage else 1
    assert painter.count == lost and filled.remade == (0 if "record" in damage else 1) and filled.found == 12 - lost
    assert {name: data for name, (data, _) in files(bank).items()} == {name: data for name, (data, _) in whole.items()}
    kept = {name: stat for name, stat in whole.items() if image not in name or (lost == 1 and "002" not in name)}
    assert kept.items() <= files(bank).items(), "no other file was written"


def test_too_few_images_name_source_pipeline_and_command(bank: DiffusionBank, samples: list[Sample]) -> None:
    fill(bank, Painter(), samples[:1], 2, 2)
    with pytest.raises(DataError) as caught:
        bank.images(samples[0].source, 63)
    text = str(caught.value)
    assert "has 2 of the 63 generated images of" in text and "0.png" in text
    assert f"vlprompt bank --bank {bank.folder.parent} --count 63 --pipeline p --data.name NAME" in text


class Killed(Painter):
    """Kills its process while it generates images, with some of them stored."""

    def generate(self, images: Sequence[Image.Image], seeds: Sequence[int]) -> list[Image.Image | None]:
        generated = super().generate(images, seeds)
        if self.count > 40:
            die()
        return generated


def test_a_killed_process_is_resumed(bank: DiffusionBank, samples: list[Sample], tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=fill, args=(bank, Killed(), samples, 30, 2))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    home = bank.path(content_sha256(samples[1].source), 0).parent
    (home / ".writing-1-abcdef01.tmp").write_bytes(b"half")
    finished = {}
    for sample in samples:
        image = content_sha256(sample.source)
        finished |= {
            bank.path(image, number): bank.path(image, number).stat().st_mtime_ns for number in bank.record(image)
        }
    assert 30 < len(finished) < 120
    painter = Painter()
    filled = fill(bank, painter, samples, 30, 8)
    assert filled.found == len(finished) and painter.count == 120 - len(finished)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in finished.items()), "finished images are kept"
    assert not list(bank.folder.rglob("*.tmp"))
    whole = create_bank(tmp_path / "whole", bank.recipe)
    fill(whole, Painter(), samples, 30, 8)
    assert {name: data for name, (data, _) in files(bank).items()} == {n: data for n, (data, _) in files(whole).items()}


def test_two_processes_fill_one_bank(bank: DiffusionBank, samples: list[Sample]) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=fill, args=(bank, Painter(), order, 6, 2)) for order in (samples, samples[::-1])]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    painter = Painter()
    assert fill(bank, painter, samples, 6, 2).found == 24 and painter.count == 0


def test_flagged_images_are_generated_again(bank: DiffusionBank, samples: list[Sample]) -> None:
    painter = Painter(flagged=5)
    fill(bank, painter, samples[:1], 4, 4)
    assert painter.batches == [4, 4, 1], "all four, all four again, and the flagged one of these"
    assert len(set(pixels(bank.images(samples[0].source, 4)))) == 4
    with pytest.raises(DataError, match=r"flags every generated image of 1.png .*--safety-checker off"):
        fill(bank, Painter(flagged=4 * ATTEMPTS + 4), samples[1:2], 4, 4)


def test_unreadable_images(bank: DiffusionBank, samples: list[Sample]) -> None:
    for position in (1, 2):
        path = Path(samples[position].source.path)  # type: ignore[attr-defined]
        path.unlink() if position == 1 else path.write_bytes(path.read_bytes()[:50])
    painter = Painter()
    with pytest.raises(DataError, match=r"1.png cannot be read"):
        fill(bank, painter, samples, 2, 2)
    assert painter.count == 0, "raised before any image was generated"
    filled = fill(bank, painter, samples, 2, 2, skip=True)
    assert filled.skipped == ["1.png", "2.png"] and filled.made == 4


def test_open_bank(bank: DiffusionBank, tmp_path: Path) -> None:
    for path in (bank.folder, bank.folder.parent):
        assert open_bank(path).recipe_id == bank.recipe_id
    with pytest.raises(ConfigError, match=r"data.bank '.*none' is not a folder. Generate them: .*vlprompt bank"):
        open_bank(tmp_path / "none")
    with pytest.raises(ConfigError, match="has no generated images"):
        open_bank(tmp_path)
    other = create_bank(tmp_path / "bank", Recipe({**FACTS, "seed": 1}, {"options": "--seed 1"}))
    with pytest.raises(ConfigError, match=rf"several recipes. Give one of:(.|\n)*{other.folder.name}: --seed 1"):
        open_bank(bank.folder.parent)
    text = (bank.folder / "recipe.json").read_text()
    for changed, match in ((text.replace("3.0", "4.0"), "was changed"), (text[:-9], "is not the recipe")):
        (bank.folder / "recipe.json").write_text(changed)
        with pytest.raises(DataError, match=match):
            open_bank(bank.folder)
    (bank.folder / "recipe.json").write_text(text.replace("bank 1", "bank 9"))
    with pytest.raises(DataError, match="'vlprompt diffusion bank 9'"):
        open_bank(bank.folder)


def test_a_bank_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written to .*--bank FOLDER"):
        create_bank(tmp_path / "file", Recipe(FACTS))


@pytest.mark.parametrize(("kind", "lossless"), [("png", True), ("webp", True), ("jpeg", False)])
def test_formats(kind: str, lossless: bool, samples: list[Sample], tmp_path: Path) -> None:
    bank = create_bank(tmp_path / kind, Recipe({**FACTS, "format": kind}))
    fill(bank, Painter(), samples[:1], 1, 1)
    image = content_sha256(samples[0].source)
    assert bank.path(image, 0).suffix == f".{kind}" and bank.path(image, 0).is_file()
    (stored,) = bank.images(samples[0].source, 1)
    (made,) = Painter().generate([samples[0].source.open()], [bank.recipe.seed_of(image, 0)])
    assert made is not None and (stored.tobytes() == made.tobytes()) is lossless


@given(st.integers(0, 100), st.integers(0, 100), st.integers(0, 3))
def test_seeds_differ_between_images(number: int, other: int, attempt: int) -> None:
    recipe = Recipe(FACTS)
    seed = recipe.seed_of("a", number, attempt)
    assert 0 <= seed < 2**63
    assert (seed == recipe.seed_of("a", other, attempt)) is (number == other)
    assert seed not in (recipe.seed_of("b", number, attempt), recipe.seed_of("a", number, attempt + 1))
    assert seed != Recipe({**FACTS, "seed": 1}).seed_of("a", number, attempt)


def test_a_recipe_is_identified_by_its_facts() -> None:
    recipe = Recipe(FACTS, {"options": "x"})
    assert recipe.id == Recipe(dict(reversed(FACTS.items())), {"options": "y"}).id
    assert recipe.id != Recipe({**FACTS, "call": {"guidance_scale": 3.5}}).id
    assert json.loads(recipe.text())["id"] == recipe.id


def test_settings_are_difftpts_and_are_checked() -> None:
    defaults = GenerationSettings()
    assert (defaults.steps, defaults.guidance, defaults.eta) == (50, 3.0, 0.0)
    assert defaults.pipeline == "lambdalabs/sd-image-variations-diffusers"
    with pytest.raises(ConfigError) as caught:
        GenerationSettings(pipeline="", steps=0, guidance=-1, eta=2, strength=0, size=12, seed=-1)
    texts = str(caught.value).splitlines()
    for name in ("pipeline", "steps", "guidance", "eta", "strength", "size", "seed"):
        assert sum(text.startswith(f"{name} is ") for text in texts) == 1
    with pytest.raises(ConfigError, match="leaves none of 4 steps; accepted: 0.25 or more"):
        GenerationSettings(steps=4, strength=0.2)


@pytest.mark.parametrize(
    "about", [7, None, ["--steps 1"], {"options": 7}, {"options": None}, {"options": "--prompt 'a"}]
)
def test_a_recipe_with_other_options_than_a_text_is_refused(bank: DiffusionBank, about: Any) -> None:
    path = bank.folder / "recipe.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"about": about}))
    with pytest.raises(DataError, match="is not the recipe of a bank"):
        open_bank(bank.folder)


def test_options_of_a_recipe_are_quoted_in_the_advised_command(bank: DiffusionBank, samples: list[Sample]) -> None:
    path = bank.folder / "recipe.json"  # the options are not part of the id: others may have changed them
    path.write_text(json.dumps(json.loads(path.read_text()) | {"about": {"options": "--steps 1; touch x $(touch y)"}}))
    with pytest.raises(DataError) as error:
        open_bank(bank.folder).images(samples[0].source, 1)
    assert "--steps '1;' touch x '$(touch' 'y)' --data.name NAME" in str(error.value)
