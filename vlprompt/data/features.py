"""Feature store: a folder of safetensors files, each named by the hash of everything its features depend on."""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlprompt._files import (
    canonical_json,
    home_path,
    leftovers,
    locked,
    open_regular,
    replacing,
    sha256_tensors,
    sha256_text,
)
from vlprompt._finite import check_finite, not_finite
from vlprompt.data.batches import ImageBatches, make_loader
from vlprompt.data.pixel_cache import PixelCache
from vlprompt.data.samplers import Key
from vlprompt.data.tally import count_encoded
from vlprompt.data.transforms import Transform
from vlprompt.datasets.records import Sample
from vlprompt.errors import ConfigError, DataError, NotFiniteError

SCHEMA = "vlprompt features 2"
LOCKS = ".locks"
#: Entries whose checksum this process has verified: size, modification time and inode of the file.
_VERIFIED: dict[Path, tuple[int, int, int]] = {}


def default_folder() -> Path:
    """Return the default folder: ``features`` under ``$VLPROMPT_CACHE`` or ``~/.cache/vlprompt``."""
    return home_path(os.environ.get("VLPROMPT_CACHE") or "~/.cache/vlprompt") / "features"


class Rows(NamedTuple):
    """Features ``[N, D]`` of N images, and the positions of unreadable images, whose rows are zeros."""

    features: Tensor
    missing: tuple[int, ...] = ()


class FeatureStore:
    """A folder of feature tensors, addressed by everything they were computed from.

    An entry is written to a temporary file and renamed, so that a killed writer leaves no partial entry. A lock per
    entry makes concurrent processes compute it once. Entries are memory-mapped; an entry whose checksum or key differs
    is computed again with a warning.

    Attributes:
        folder: Folder of the entries.
        encoded: Number of images encoded through this object, as opposed to read from the folder.
    """

    def __init__(self, folder: str | Path) -> None:
        """Store features in ``folder``, which is created with the first entry."""
        self.folder = home_path(folder)
        self.encoded = 0

    def path(self, key: Mapping[str, Any]) -> Path:
        """Return the file of ``key``: the SHA-256 of its canonical JSON."""
        return self.folder / f"{sha256_text(_canonical(key))}.safetensors"

    def get(self, key: Mapping[str, Any], compute: Callable[[], Tensor]) -> Tensor:
        """Return the tensor stored under ``key``, or compute and store it.

        Args:
            key: Everything the tensor depends on, as JSON values.
            compute: Called without arguments if there is no valid entry; returns ``[N, D]``, one row per image.

        Returns:
            The tensor, on the CPU.

        Raises:
            DataError: If the folder cannot be written.
            NotFiniteError: A feature is not finite; nothing is stored.
        """
        return self.rows(key, lambda: Rows(compute())).features

    def rows(
        self,
        key: Mapping[str, Any],
        compute: Callable[[], Rows],
        *,
        number: int | None = None,
        recompute: bool = False,
    ) -> Rows:
        """Return the features stored under ``key``, or compute and store them; see :meth:`get`.

        Args:
            key: Everything the features depend on, as JSON values.
            compute: Called if there is no valid entry.
            number: Number of images; an entry of another number is not valid. None: any number.
            recompute: Whether to compute the features even if they are stored.
        """
        path, text = self.path(key), _canonical(key)
        stored = None if recompute else read_entry(path, text, number)
        if stored is not None:
            return stored
        with self._locked(path):
            # Another process may have written it while this one waited.
            stored = None if recompute else read_entry(path, text, number)
            if stored is not None:
                return stored
            if path.is_file() and not recompute:
                warnings.warn(
                    f"The stored features {path} are damaged; they are computed again.",
                    stacklevel=1,
                )
            computed = compute()
            encoded = len(computed.features) - len(computed.missing)
            self.encoded += encoded
            count_encoded(encoded)
            computed = computed._replace(features=computed.features.detach().cpu().contiguous())
            check_finite(
                {"features": computed.features}, "encoding", "Compute in full precision: --backbone.precision fp32"
            )
            self._write(path, text, computed)
            return read_entry(path, text) or computed

    @contextlib.contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        lock = contextlib.ExitStack()
        try:
            (self.folder / LOCKS).mkdir(parents=True, exist_ok=True)
            lock.enter_context(locked(lock_of(path)))
        except OSError as error:
            raise self._unwritable(error) from error
        with lock:
            yield

    def _write(self, path: Path, key: str, rows: Rows) -> None:
        """Write an entry. The caller holds its lock: temporary files of this name are left by killed writers."""
        tensors = {"features": rows.features, "missing": torch.tensor(rows.missing, dtype=torch.int64)}
        metadata = {"schema": SCHEMA, "key": key, "sha256": _sha256(tensors)}
        try:
            for stale in leftovers(self.folder, path.stem):
                stale.unlink(missing_ok=True)
            with replacing(path) as temporary:
                save_file(tensors, temporary, metadata=metadata)
        except (OSError, SafetensorError) as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: Exception) -> DataError:
        return DataError(
            f"Image features cannot be written to {self.folder}: {error}. Give another folder: "
            "export VLPROMPT_CACHE=FOLDER"
        )


def lock_of(entry: Path) -> Path:
    """Return the lock file of an entry."""
    return entry.parent / LOCKS / f"{entry.stem}.lock"


def read_entry(path: Path, key: str | None = None, number: int | None = None) -> Rows | None:
    """Return an entry, memory-mapped; ``None`` if there is none, it is damaged, or its key is not ``key``.

    An entry is damaged if its checksum or its ``number`` of images differs, or a feature is not finite. This is checked
    when this process first reads the file, and again after the file has changed. With a ``key``, the access time is set
    to the current time, for :func:`~vlprompt.data.eviction.prune`.

    Raises:
        DataError: This user may not read the file, or it is not a regular file.
    """
    try:
        open_regular(path).close()  # safetensors would wait for the end of a pipe
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DataError(
            f"The stored features {path} cannot be read: {error.strerror}. Make the file readable for this user, or "
            "give another folder: export VLPROMPT_CACHE=FOLDER"
        ) from error
    try:
        status = path.stat()
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError):
        return None
    stamp = (status.st_size, status.st_mtime_ns, status.st_ino)
    if metadata.keys() != {"schema", "key", "sha256"} or metadata["schema"] != SCHEMA:
        return None
    if tensors.keys() != {"features", "missing"} or key not in (None, metadata["key"]):
        return None
    features, missing = tensors["features"], tensors["missing"].flatten().tolist()
    if _VERIFIED.get(path) != stamp:
        if metadata["sha256"] != _sha256(tensors) or not_finite(tensors):
            return None
        _VERIFIED[path] = stamp
    if features.ndim < 2 or len(features) != (len(features) if number is None else number):
        return None
    if not all(isinstance(position, int) and 0 <= position < len(features) for position in missing):
        return None
    # The modification time is part of the stamp and must not change.
    used = status.st_atime_ns if key is None else time.time_ns()
    with contextlib.suppress(OSError):
        os.utime(path, ns=(used, status.st_mtime_ns))
    return Rows(features, tuple(missing))


def extract(
    encode: Callable[[Tensor], Tensor],
    samples: Sequence[Sample],
    transform: Transform,
    batch_size: int = 100,
    device: str | torch.device = "cpu",
    workers: int = 0,
) -> Tensor:
    """Encode every sample once, in order.

    Args:
        encode: Images ``[B, 3, H, W]`` on ``device`` to raw features ``[B, D]``.
        samples: Samples to encode.
        transform: A deterministic transform.
        batch_size: Images per call of ``encode``.
        device: Device of the images passed to ``encode``.
        workers: Processes that decode images.

    Returns:
        Features ``[N, D]``, float32, on the CPU.

    Raises:
        DataError: If an image cannot be decoded, or there are no samples.
    """
    images = ImageBatches(PixelCache(samples, transform), torch.zeros(len(samples)))
    return encode_all(encode, images, batch_size, device, workers).features


def encode_all(
    encode: Callable[[Tensor], Tensor],
    images: ImageBatches,
    batch_size: int,
    device: str | torch.device,
    workers: int,
    epoch: int = 0,
) -> Rows:
    """Encode all ``images`` with the random draws of ``epoch``; see :func:`extract`.

    Raises:
        DataError: If an image cannot be decoded, unless ``images.skip``, or no image can be decoded.
        NotFiniteError: A feature is not finite.
    """
    keys: list[Key] = [(epoch, index) for index in range(len(images))]
    blocks, read = [], []
    with torch.no_grad():
        for batch in make_loader(images, keys, batch_size, workers):
            if len(batch["images"]):
                normalised = images.cache.transform.finish(batch["images"].to(device))
                features = encode(normalised).float().cpu()
                if wrong := (~features.isfinite().flatten(1).all(dim=1)).nonzero().flatten().tolist():
                    first = images.cache.samples[batch["index"].tolist()[wrong[0]]].id
                    raise NotFiniteError(
                        f"features of {len(wrong)} of {len(features)} images of a batch are not finite, the first of "
                        f"{first!r}. Compute in full precision: --backbone.precision fp32"
                    )
                blocks.append(features)
                read += batch["index"].tolist()
    if not blocks:
        raise DataError(
            f"None of the {len(images)} images can be read." if keys else "There are no images to compute features of."
        )
    features = torch.cat(blocks)
    if len(read) == len(images):
        return Rows(features)
    all_rows = features.new_zeros(len(images), *features.shape[1:])
    all_rows[read] = features
    return Rows(all_rows, tuple(sorted(set(range(len(images))) - set(read))))


def _canonical(key: Mapping[str, Any]) -> str:
    try:
        return canonical_json(key)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"A feature store key must consist of JSON values: {error}.") from error


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    return sha256_tensors(tensors, lambda name, tensor: f"{name} {tensor.dtype} {tuple(tensor.shape)}\n")
