"""Image generation by a diffusers pipeline: source images and seeds to generated images of one size."""

from __future__ import annotations

import contextlib
import inspect
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vlprompt._files import file_checksum, home_path, parse_json, read_text, sha256_text
from vlprompt.errors import ConfigError, DataError, bulleted, did_you_mean
from vlprompt.generation.libraries import import_diffusers, quiet
from vlprompt.generation.recipe import OFFICIAL, GenerationSettings, Recipe
from vlprompt.generation.tiny import TINY, save_tiny

if TYPE_CHECKING:
    from PIL.Image import Image

VARIATION = "StableDiffusionImageVariationPipeline"
#: Constants of CLIP's preprocessing, which the image-variation weights were trained with.
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_LARGEST_INDEX = 2**24
_WEIGHTS = (".safetensors", ".bin", ".json", ".txt", ".model")


class PipelineGenerator:
    """A loaded pipeline with its settings.

    Attributes:
        recipe: Everything that generated images depend on besides source image and seed.
    """

    def __init__(self, pipe: Any, settings: GenerationSettings, name: str, weights_sha256: str, precision: str) -> None:
        """Wrap ``pipe``; ``name`` is its class, ``precision`` fp32, fp16 or bf16; see :func:`load_generator`."""
        self._pipe, self.settings, self.variation = pipe, settings, name == VARIATION
        denoiser = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
        latent = getattr(getattr(denoiser, "config", None), "sample_size", None)
        default = latent * getattr(pipe, "vae_scale_factor", 8) if isinstance(latent, int) else 512
        self.size = settings.size or default
        numbers: dict[str, Any] = {
            "num_inference_steps": settings.steps,
            "guidance_scale": settings.guidance,
            "eta": settings.eta,
            **({} if self.variation else {"strength": settings.strength}),
        }
        parameters = inspect.signature(pipe.__call__).parameters
        self._numbers = {key: value for key, value in numbers.items() if key in parameters}
        self._sides = {key: self.size for key in ("height", "width") if key in parameters}
        conditioning = "shorter side to size bicubic; center crop; img2img"
        if self.variation:
            side = self._encoder_size = int(pipe.image_encoder.config.image_size)
            conditioning = f"squash {side} bicubic without antialiasing; CLIP mean and std; image embedding"
        diffusers, transformers = import_diffusers()
        facts = {
            "pipeline": type(pipe).__name__,
            "weights_sha256": weights_sha256,
            "scheduler": {"class": type(pipe.scheduler).__name__, "config": _plain(pipe.scheduler.config)},
            "call": self._numbers,
            "prompt": None if self.variation else settings.prompt,
            "size": self.size,
            "precision": precision,
            "conditioning": conditioning,
            "safety_checker": getattr(pipe, "safety_checker", None) is not None,
            "format": settings.format,
            "seed": settings.seed,
        }
        versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
        versions |= {"transformers": transformers.__version__}
        self.recipe = Recipe(facts, {"options": _options(settings), "versions": versions})

    def generate(self, images: Sequence[Image], seeds: Sequence[int]) -> list[Image | None]:
        """Generate an image per source image and seed.

        Every image has a separate random generator on the CPU, so that it does not depend on the rest of the batch
        (except for rounding).

        Args:
            images: PIL RGB source images; repeat a source image for several generated images.
            seeds: Seed of each generated image.

        Returns:
            PIL RGB images of ``size`` x ``size``; None for an image that the safety checker flagged.
        """
        from PIL import Image

        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        inputs: dict[str, Any] = {**self._numbers, "generator": generators, "output_type": "np"}
        if self.variation:
            inputs |= {"image": torch.stack([self._condition(image) for image in images]), **self._sides}
        else:
            inputs |= {"image": torch.stack([self._start(image) for image in images])}
            inputs |= {"prompt": [self.settings.prompt] * len(images)}
        try:
            with torch.no_grad():
                result = self._pipe(**inputs)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"--batch-size is {len(images)}, too large for the memory of the device; give a smaller number"
            ) from error
        flagged = getattr(result, "nsfw_content_detected", None) or [False] * len(images)
        pixels = (np.asarray(result.images) * 255).round().clip(0, 255).astype(np.uint8)
        return [None if bad else Image.fromarray(array) for array, bad in zip(pixels, flagged, strict=True)]

    def _condition(self, image: Image) -> Tensor:
        """Return DiffTPT's input of the image encoder, ``[3, S, S]``; the pipeline does not resize tensors."""
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms import functional as F

        side = self._encoder_size
        # The weights were trained without antialiasing, so inference must not use it either.
        resized = F.resize(F.to_tensor(image), [side, side], InterpolationMode.BICUBIC, antialias=False)
        conditioned: Tensor = F.normalize(resized, _MEAN, _STD)
        return conditioned

    def _start(self, image: Image) -> Tensor:
        """Return the initial image of img2img, ``[3, size, size]`` in 0..1."""
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms import functional as F

        resized = F.resize(image, self.size, InterpolationMode.BICUBIC)
        start: Tensor = F.to_tensor(F.center_crop(resized, [self.size, self.size]))
        return start


def load_generator(
    settings: GenerationSettings, device: str | torch.device, *, offline: bool = False
) -> PipelineGenerator:
    """Load a pipeline onto ``device``.

    Args:
        settings: The pipeline and its settings.
        device: Device of the pipeline.
        offline: Whether to use local files only.

    Raises:
        ConfigError: If a value is not accepted, the pipeline is not found or does not generate images from images, or
            diffusers is not installed.
        DataError: If files of the pipeline cannot be read.
    """
    diffusers, _ = import_diffusers()
    device = torch.device(device)
    precision = settings.precision
    if precision == "auto":
        precision = "fp16" if device.type == "cuda" else "fp32"
    with _folder(settings, offline) as folder:
        index = _index(folder, settings.pipeline)
        name = index["_class_name"]
        pipe = _load(diffusers, folder, settings, index, _TYPES[precision])
        digest = _weights_sha256(folder, index, settings.safety_checker == "off")
    if settings.scheduler is not None:
        kind = getattr(diffusers, settings.scheduler, None)
        if not isinstance(kind, type) or not hasattr(kind, "set_timesteps"):
            known = [name for name in dir(diffusers) if name.endswith("Scheduler")]
            raise ConfigError(f"--scheduler is {settings.scheduler!r}.{did_you_mean(settings.scheduler, known)}")
        pipe.scheduler = kind.from_config(pipe.scheduler.config)  # type: ignore[attr-defined]
    pipe.set_progress_bar_config(disable=True)
    if hasattr(pipe.vae, "enable_slicing"):
        pipe.vae.enable_slicing()  # decoding needs the most memory
    return PipelineGenerator(pipe.to(device), settings, name, digest, precision)


def _load(diffusers: Any, folder: Path, settings: GenerationSettings, index: dict[str, Any], dtype: Any) -> Any:
    name = index["_class_name"]
    # Components that a pipeline was saved without must be passed as None.
    more: dict[str, Any] = {component: None for component, value in index.items() if value == [None, None]}
    if settings.safety_checker == "off" and "safety_checker" in index:
        more |= {"safety_checker": None, "requires_safety_checker": False}
    kind = getattr(diffusers, VARIATION) if name == VARIATION else diffusers.AutoPipelineForImage2Image
    try:
        with quiet():
            return kind.from_pretrained(str(folder), torch_dtype=dtype, local_files_only=True, **more)
    except ValueError as error:
        if "find a pipeline linked to" not in str(error):
            raise _unreadable(settings, error) from error
        raise ConfigError(
            f"--pipeline {settings.pipeline} is a {name}, which does not generate images from images; accepted: "
            f"{VARIATION}, or a pipeline that diffusers' AutoPipelineForImage2Image supports, such as "
            "StableDiffusionPipeline"
        ) from error
    except Exception as error:  # errors of diffusers and transformers on damaged files have no common type
        raise _unreadable(settings, error) from error


def _unreadable(settings: GenerationSettings, error: Exception) -> DataError:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return DataError(
        f"Pipeline {settings.pipeline} cannot be loaded: {first[:300]}. Fetch its files again: "
        f"hf download {settings.pipeline} --local-dir FOLDER, then --pipeline FOLDER"
    )


@contextlib.contextmanager
def _folder(settings: GenerationSettings, offline: bool) -> Iterator[Path]:
    """Yield the folder of the pipeline's files."""
    name = settings.pipeline
    local = home_path(name)
    if name in TINY:
        with tempfile.TemporaryDirectory() as folder:
            yield save_tiny(Path(folder), name)
    elif local.is_dir():
        yield local
    elif name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ConfigError(
            f"--pipeline {name!r}: there is no such folder, and names on the hub are OWNER/NAME; accepted: a folder "
            f"with model_index.json, a name such as {OFFICIAL[0]}, or {' or '.join(TINY)}"
        )
    else:
        yield _fetched(settings, offline)


def _fetched(settings: GenerationSettings, offline: bool) -> Path:
    name = settings.pipeline
    revision = settings.revision or (OFFICIAL[1] if name == OFFICIAL[0] else None)
    diffusers, _ = import_diffusers()
    try:
        return Path(diffusers.DiffusionPipeline.download(name, revision=revision, local_files_only=offline))
    except Exception as error:  # errors of the hub, the network and the file system
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"--pipeline {name} (revision {revision or 'newest'}) cannot be fetched from the Hugging Face hub"
            f"{', which --offline disables' if offline else ''}: {first[:300]}. Fetch it on a machine with a network, "
            f"hf download {name}{f' --revision {revision}' if revision else ''} --local-dir FOLDER, and give "
            "--pipeline FOLDER"
        ) from error


def _index(folder: Path, name: str) -> dict[str, Any]:
    """Return the checked index of a pipeline's folder.

    Diffusers imports the modules that an index and the files in its folder name. Only diffusers and transformers are
    accepted, whatever version is installed, and folders with code are refused.

    Raises:
        ConfigError: There is no index.
        DataError: The index is damaged, or loading the folder would run its code.
    """
    path = folder / "model_index.json"
    try:
        index = parse_json(read_text(path, _LARGEST_INDEX))
    except FileNotFoundError:
        raise ConfigError(
            f"--pipeline {name}: the folder has no model_index.json, which diffusers' save_pretrained writes; "
            "accepted: a folder with this file"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}. Fetch the pipeline again.") from error
    if not isinstance(index, dict) or not _is_identifier(index.get("_class_name")):
        raise DataError(f"{path} does not name the pipeline's class. Fetch the pipeline again.")
    problems = [problem for key, value in index.items() if (problem := _component_problem(key, value))]
    code = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*.py"))
    problems += [f"the folder holds code, {file}, which is never run" for file in code]
    problems += [f"{file} maps classes to code (auto_map)" for file in _configs_with_code(folder, index)]
    if problems:
        raise DataError(
            f"Pipeline {name} is refused:\n{bulleted(problems)}\nUse a pipeline that consists of classes of diffusers "
            f"and transformers, such as {OFFICIAL[0]}."
        )
    return index


def _component_problem(key: str, value: Any) -> str:
    """Return why an entry of an index is not accepted; empty if it is."""
    if not (key.isidentifier() and key.isascii()):
        return f"model_index.json has the key {key[:80]!r}, which is not a name"
    if key.startswith("_") or value == [None, None] or isinstance(value, str | int | float | None):
        return ""
    if not (isinstance(value, list) and len(value) == 2 and all(map(_is_identifier, value))):
        return f"model_index.json: {key} is {str(value)[:80]!r}; expected a library and a class"
    libraries = import_diffusers()[0].pipelines
    if value[0] in ("diffusers", "transformers") or hasattr(libraries, value[0]):
        return ""
    return f"model_index.json: {key} is of the library {value[0]!r}; accepted: diffusers, transformers"


def _is_identifier(value: Any) -> bool:
    return isinstance(value, str) and value.isidentifier() and value.isascii() and not value.startswith("_")


def _configs_with_code(folder: Path, index: dict[str, Any]) -> Iterator[str]:
    """Yield the JSON files of components that map classes to code, or that cannot be read."""
    for key, value in index.items():
        for path in sorted((folder / key).glob("*config*.json")) if isinstance(value, list) else ():
            try:
                config = parse_json(read_text(path, _LARGEST_INDEX))
            except (OSError, ValueError):
                continue  # diffusers reports it
            if isinstance(config, dict) and "auto_map" in config:
                yield path.relative_to(folder).as_posix()


def _weights_sha256(folder: Path, index: dict[str, Any], unchecked: bool) -> str:
    """Return a hash of all files that generated images depend on, independent of the folder's path."""
    lines = []
    components = sorted(name for name, value in index.items() if isinstance(value, list))
    for component in components:
        if unchecked and component == "safety_checker":
            continue
        for path in sorted((folder / component).rglob("*")):
            if path.suffix in _WEIGHTS and path.is_file():
                lines.append(f"{path.relative_to(folder).as_posix()}\t{file_checksum(path)}\n")
    return sha256_text("".join(lines))


def _options(settings: GenerationSettings) -> str:
    """Return the settings as command-line options."""
    import shlex

    defaults = GenerationSettings()
    return " ".join(
        f"--{name.replace('_', '-')} {shlex.quote(str(value))}"
        for name, value in vars(settings).items()
        if name == "pipeline" or value != getattr(defaults, name)
    )


def _plain(config: Any) -> dict[str, Any]:
    """Return a scheduler's configuration as JSON values, without versions and paths."""
    values: dict[str, Any] = parse_json(json.dumps(dict(config), default=str))
    return {key: value for key, value in values.items() if not key.startswith("_")}
