"""``vlprompt bank`` (tools/make_diffusion_bank.py): generate images of a data set's images with a diffusion model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from vlprompt._terminal import show
from vlprompt.cli.parse import COMMAND_LINE, CommandLine, check_run, read_command_line
from vlprompt.config.keys import keys_in
from vlprompt.config.types import Name, Positive, Words, field_hints, from_text, refusal, validate, validated
from vlprompt.errors import ConfigError, bulleted
from vlprompt.generation.recipe import COUNT, TOOL, GenerationSettings

if TYPE_CHECKING:
    from vlprompt.generation.making import Filled, Progress

T = TypeVar("T")
BANK_HELP = f"""\
{TOOL} --bank FOLDER --data.name NAME [--data.root DIR] [options]

Generates images of every test image with a diffusion model, for methods that use them (DiffTPT). They are found by the
content of the test image, shared by all runs, and generated once: the same command resumes where it stopped, replaces
damaged files, and with a larger --count generates only the missing images. Runs use them with --data.bank FOLDER.

  --bank FOLDER           folder of the generated images; each recipe (all options below except --count) has a subfolder
  --data.KEY VALUE        the images, as for `vlprompt train` (--data.name, --data.root, --data.classes, ...)
  --split SPLIT           test (default), val or train
  --count N               generated images per image ({COUNT})
  --pipeline NAME         folder or hub name of any diffusers pipeline that generates images from images (DiffTPT's,
                          {GenerationSettings.pipeline}); `tiny` and `tiny-img2img`
                          have random weights and generate noise, for trials
  --revision REV          branch, tag or commit on the hub
  --safety-checker X      on (default) or off
  --precision X           auto (default: fp16 on a GPU, else fp32), fp32, fp16 or bf16
  --steps N, --guidance X, --eta X, --scheduler CLASS, --size PIXELS, --seed N
                          generation options (50, 3, 0, the pipeline's, the pipeline's, 0)
  --strength X, --prompt TEXT
                          of img2img pipelines (0.8, "a photo")
  --format X              png (default) and webp are lossless; jpeg has quality 75
  --batch-size N          images per batch (16); changes results only by rounding
  --device X              auto (default), cpu, cuda, cuda:1, mps
  --offline               use only files on this machine, without access to the hub

Example: {TOOL} --bank banks --data.name imagenet_r --data.root data --safety-checker off
"""

FLAGS = ("offline",)


@validated("")
class BankOptions:
    """The options of ``vlprompt bank``."""

    bank: Annotated[Name, Words("the folder where pictures are kept")]
    split: Literal["train", "val", "test"] = "test"
    count: Positive = COUNT
    batch_size: Positive = 16
    device: Name = "auto"


OPTIONS = tuple(name.replace("_", "-") for kind in (BankOptions, GenerationSettings) for name in field_hints(kind))


def bank(words: list[str]) -> int:
    """Run ``vlprompt bank`` and return its exit status.

    Raises:
        VlpromptError: Options are not accepted (the text lists all), or a pipeline or data cannot be used.
    """
    line = read_command_line(words, "bank", flags=FLAGS, options=OPTIONS)
    if line.configs:
        line.problems.append(f"{COMMAND_LINE}: --config has no meaning here; give --data.name NAME")
        line.configs.clear()
    options, settings = _options(line, BankOptions), _options(line, GenerationSettings)
    config, problems = check_run(line, within=("data.",))
    if config is None or options is None or settings is None or problems:
        texts = list(dict.fromkeys(problems))
        count = "1 problem" if len(texts) == 1 else f"{len(texts)} problems"
        raise ConfigError(f"{count}:\n{bulleted(texts)}\nSee `{TOOL} --help`.")
    from vlprompt.generation.bank import create_bank
    from vlprompt.generation.making import fill
    from vlprompt.generation.pipeline import load_generator
    from vlprompt.runs.session import load_task

    samples = getattr(load_task(config.data, config.seed), options.split)
    if not samples:
        raise ConfigError(f"--split is {options.split!r}, and {config.data.name} has no such images")
    generator = load_generator(settings, _device(options.device), offline="offline" in line.flags)
    image_bank = create_bank(Path(options.bank), generator.recipe)
    images = f"{len(samples):,} {options.split} images of {config.data.name}"
    show(f"{images}, {options.count} pictures each; {image_bank.folder}")
    skip = config.data.on_bad_image == "skip"
    with _progress() as report:
        filled = fill(image_bank, generator, samples, options.count, options.batch_size, report, skip=skip)
    show(_summary(filled))
    show(f"runs take them with: --data.bank {image_bank.folder}")
    return 0


def _options(line: CommandLine, kind: type[T]) -> T | None:
    """Return the options of ``line`` that are fields of ``kind``; problems are added to ``line``."""
    values, failed = {}, {}
    for name, hint in field_hints(kind).items():
        option = name.replace("_", "-")
        try:
            if option in line.options:
                values[name] = from_text(hint, line.options[option])
        except ValueError as error:
            failed[name] = refusal(option, line.options[option], hint, str(error))
    options, problems = validate(kind, values)
    texts = [problem.text for problem in problems if not keys_in(problem.text, failed)]
    line.problems += [f"{COMMAND_LINE}: --{text}" for text in [*failed.values(), *texts]]
    return None if failed else options


def _device(name: str) -> Any:
    from vlprompt.backbone.backbone import checked_device

    if name != "auto":
        return checked_device(name)
    import torch

    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


@contextmanager
def _progress() -> Iterator[Any]:
    """Yield a function that shows progress: bars with the time left on a terminal, else one line per minute."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}"))
    bars, tasks = Bars(*columns, console=console, disable=not console.is_terminal), dict[str, TaskID]()
    last_line = {"at": time.monotonic()}

    def report(progress: Progress) -> None:
        left = "" if progress.left is None else f"{time_text(progress.left)} left"
        if progress.stage not in tasks:
            tasks[progress.stage] = bars.add_task(progress.stage, total=progress.total, left=left)
        bars.update(tasks[progress.stage], completed=progress.done, left=left)
        finished = progress.stage == "making" and progress.done == progress.total
        if not console.is_terminal and (finished or time.monotonic() - last_line["at"] >= 60):
            last_line["at"] = time.monotonic()
            show(f"{progress.stage}: {progress.done:,} of {progress.total:,}, {left or 'begun'}", flush=True)

    with bars:
        yield report


def time_text(seconds: float) -> str:
    """Return a time as text: ``40 s``, ``12 min``, ``3 h 05 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _summary(filled: Filled) -> str:
    text = f"{filled.images:,} images: {filled.found:,} pictures were there, {filled.made:,} made"
    if filled.remade:
        text += f" ({filled.remade:,} of them again: damaged or missing)"
    if filled.skipped:
        names = ", ".join(filled.skipped[:3])
        text += f"; {len(filled.skipped):,} images could not be read and were left out ({names}, ...)"
    return text
