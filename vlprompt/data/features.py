"""Image features computed once: a folder of safetensors files, each named by the hash of what it depends on."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlprompt.data.records import Sample
from vlprompt.data.views import View
from vlprompt.errors import ConfigError, DataError

_SCHEMA = "vlprompt features 1"


def default_folder() -> Path:
    """Return where features are kept if nothing is said: ``$VLPROMPT_CACHE`` or ``~/.cache/vlprompt``, ``features``."""
    return Path(os.environ.get("VLPROMPT_CACHE") or "~/.cache/vlprompt").expanduser() / "features"


class FeatureStore:
    """A folder of feature tensors, addressed by what they were computed from.

    An entry is written to a temporary name and renamed, so that a killed or concurrent writer never leaves a partial
    one; an entry that cannot be read, or whose checksum or key differs, is computed again.
    """

    def __init__(self, folder: str | Path) -> None:
        """Keep features in ``folder``, which is made when the first entry is written."""
        self.folder = Path(folder).expanduser()

    def path(self, key: Mapping[str, Any]) -> Path:
        """Return the file of ``key``: the SHA-256 of its canonical JSON."""
        return self.folder / f"{hashlib.sha256(_canonical(key).encode()).hexdigest()}.safetensors"

    def get(self, key: Mapping[str, Any], compute: Callable[[], Tensor]) -> Tensor:
        """Return the tensor stored under ``key``, or compute and store it.

        Args:
            key: Everything the tensor depends on, as JSON values.
            compute: Called without arguments if there is no valid entry.

        Returns:
            The tensor, on the CPU.

        Raises:
            DataError: If the folder cannot be written.
        """
        path = self.path(key)
        stored = self._read(path, _canonical(key))
        if stored is not None:
            return stored
        tensor = compute().detach().cpu().contiguous()
        self._write(path, _canonical(key), tensor)
        return tensor

    def _read(self, path: Path, key: str) -> Tensor | None:
        if not path.is_file():
            return None
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                tensor: Tensor = file.get_tensor("features")
        except (SafetensorError, OSError):
            return None
        valid = metadata == {"schema": _SCHEMA, "key": key, "sha256": _tensor_sha256(tensor)}
        return tensor if valid else None

    def _write(self, path: Path, key: str, tensor: Tensor) -> None:
        metadata = {"schema": _SCHEMA, "key": key, "sha256": _tensor_sha256(tensor)}
        temporary = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(prefix=".writing-", suffix=".tmp", dir=self.folder)
            os.close(descriptor)
            save_file({"features": tensor}, temporary, metadata=metadata)
            os.replace(temporary, path)
            temporary = None
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"Image features cannot be written to {self.folder}: {error}. Give another folder: "
                "export VLPROMPT_CACHE=FOLDER"
            ) from error
        finally:
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)


def extract(
    encode: Callable[[Tensor], Tensor],
    samples: Sequence[Sample],
    view: View,
    batch_size: int = 100,
    device: str | torch.device = "cpu",
    workers: int = 0,
) -> Tensor:
    """Encode every sample once, in order.

    Args:
        encode: Images ``[B, 3, H, W]`` on ``device`` to raw features ``[B, D]``.
        samples: What to encode.
        view: A deterministic view.
        batch_size: Images per call of ``encode``.
        device: Where ``encode`` wants its images.
        workers: Processes that decode images.

    Returns:
        Features ``[N, D]``, float32, on the CPU.

    Raises:
        DataError: If an image cannot be decoded, or there are no samples.
    """
    from torch.utils.data import DataLoader

    if not samples:
        raise DataError("There are no images to compute features of.")
    dataset = _Pictures(list(samples), view)
    loader: DataLoader[Tensor] = DataLoader(dataset, batch_size=batch_size, num_workers=workers)  # type: ignore[arg-type]
    with named_errors(), torch.no_grad():
        return torch.cat([encode(images.to(device)).float().cpu() for images in loader])


class _Pictures:
    """Views of samples by position."""

    def __init__(self, samples: list[Sample], view: View) -> None:
        self.samples, self.view = samples, view

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Tensor:
        image: Tensor = self.view(self.samples[index].source.open())
        return image


@contextmanager
def named_errors() -> Iterator[None]:
    """Strip the traceback that a DataLoader's worker process puts into the text of our errors."""
    marker = f"{DataError.__module__}.{DataError.__qualname__}: "
    try:
        yield
    except DataError as error:
        if marker not in str(error):
            raise
        raise DataError(str(error).rpartition(marker)[2].strip()) from None


def _canonical(key: Mapping[str, Any]) -> str:
    try:
        return json.dumps(key, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"A feature store key must consist of JSON values: {error}.") from error


def _tensor_sha256(tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()
