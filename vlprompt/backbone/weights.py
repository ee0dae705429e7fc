"""Weight files: reading them without running code in them, and loading them into a network exactly."""

from __future__ import annotations

import argparse
import pathlib
import shlex
import warnings
import zipfile
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlprompt._files import file_checksum, open_regular
from vlprompt.backbone.architecture import ARCHIVE_FIELDS, same_shapes_as
from vlprompt.backbone.image_size import other_size
from vlprompt.errors import BackboneError, bulleted, did_you_mean

#: Classes of plain values that training scripts save with the weights. They hold attributes and run no code.
_PLAIN = [argparse.Namespace, pathlib.PosixPath, pathlib.PurePosixPath]
#: Separates a file from one of its state dicts: ``last.pt::ema``.
PART = "::"
_PREFIXES = ("module", "_orig_mod", "model", "clip", "clip_model", "net", "network")
_WRAPPERS = ("state_dict", "model", "ema", "model_ema", "module")
_OPTIMISERS = ("optim", "sched", "lr_sched", "scaler")
_DEEPEST = 3


def _convert(load: str) -> str:
    """Return the command that converts a file of Python objects, read by the expression ``load``, to safetensors.

    It accepts a whole module, a state dict, and a checkpoint that holds either under one of the usual names.
    """
    code = (
        f"import torch, safetensors.torch as s; x = {load}; "
        f"n = [k for k in {_WRAPPERS} if isinstance(x, dict) and k in x]; "
        "assert len(n) < 2, 'choose one of them: x = x[NAME]: ' + str(n); x = x[n[0]] if n else x; "
        "x = x.state_dict() if hasattr(x, 'state_dict') else x; "
        "s.save_file({k: v.clone().contiguous() for k, v in x.items() if torch.is_tensor(v)}, 'weights.safetensors')"
    )
    return f"If you trust the file, convert it once: {_python(code)}"


def _python(code: str) -> str:
    """Return the command that runs ``code``, quoted for a shell."""
    plain = not set(code) & set('"$`!\\')
    return f'python -c "{code}"' if plain else f"python -c {shlex.quote(code)}"


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors or torch file by name, on the CPU; the file's bytes determine its kind.

    Wrappers of training checkpoints (a state dict among other entries, prefixes such as ``module.`` and ``_orig_mod.``)
    are removed. Of several state dicts, such as ``model`` and ``ema``, one is named after the path: ``last.pt::ema``.
    Torch files are read with ``weights_only=True``, TorchScript archives only if their SHA-256 is that of an OpenAI
    release.

    Raises:
        BackboneError: The file is missing, a folder, cut short or of another kind, holds objects that are not tensors,
            values that are not finite, or several state dicts of which none is named.
    """
    path, part = split_part(path)
    if path.is_dir():
        raise BackboneError(
            f"{path} is a folder, not a weight file. For a folder with open_clip_config.json and weights use "
            f"--backbone.name local-dir:{path}"
        )
    if not path.is_file():
        raise BackboneError(f"there is no weight file {path}; give the path of a .safetensors, .pt, .pth or .bin file")
    kind = _kind(path)
    if kind == "safetensors":
        state: Any = _read_safetensors(path)
    elif kind == "torchscript":
        state = _read_openai_archive(path)
    else:
        state = _read_torch(path)
    return _checked(_unwrapped(state, path, part), path)


def _kind(path: Path) -> str:
    with open_regular(path) as file:
        head = file.read(64)
    size = path.stat().st_size
    if head.startswith(b"version https://git-lfs"):
        raise BackboneError(f"{path} is a Git LFS pointer of {size} bytes, not the weights; run `git lfs pull` there")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise BackboneError(f"{path} is a web page, not weights; download the file itself (the page's `resolve` link)")
    # A safetensors file also begins with "PK" if its header has 19,280 bytes; JSON follows then.
    if head.startswith(b"PK") and head[8:9] != b"{":
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except zipfile.BadZipFile:
            raise BackboneError(_cut(path, "the archive's directory is missing")) from None
        if any("/code/" in name or name.endswith("constants.pkl") for name in names):
            return "torchscript"
        if not any(name.endswith("data.pkl") for name in names):
            raise BackboneError(f"{path} is an archive of other files ({', '.join(names[:3])}), not of torch weights")
        return "torch"
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        return "safetensors"
    if not head.startswith((b"\x80", b"(")):
        raise BackboneError(f"{path} ({size} bytes) is neither a safetensors nor a torch file; download it again")
    return "torch"


def _cut(path: Path, reason: str) -> str:
    return f"{path} ({path.stat().st_size} bytes) is cut short or damaged: {reason}. Download it again."


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(str(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise BackboneError(_cut(path, str(error).splitlines()[0])) from None


def _read_torch(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with _accepting_plain_values():
                return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds of errors
        # operand 149 is the frame opcode that opens every pickle since Python 3.4
        message = str(error).replace("operand 149", "object")
        if not any(
            phrase in message for phrase in ("Unsupported object", "Unsupported global", "Unsupported class", "GLOBAL")
        ):
            reason = (message.strip().splitlines() or [type(error).__name__])[0]
            raise BackboneError(_cut(path, reason[:200])) from None
        raise BackboneError(
            f"{path} holds Python objects, not only tensors; loading them could run code, so it is refused.\n"
            + _convert(f"torch.load({str(path)!r}, map_location='cpu', weights_only=False)")
        ) from None


def _accepting_plain_values() -> AbstractContextManager[Any]:
    accept: Any = getattr(torch.serialization, "safe_globals", None)  # torch 2.5 and later
    return nullcontext() if accept is None else accept(_PLAIN)


def openai_archives() -> dict[str, str]:
    """Return a map from SHA-256 to file name of OpenAI's TorchScript releases, from the URLs in open_clip."""
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_models_by_tag

    urls = [get_pretrained_cfg(name, "openai").get("url", "") for name in list_pretrained_models_by_tag("openai")]
    return {url.split("/")[-2]: url.split("/")[-1] for url in urls if "openaipublic" in url}


def _read_openai_archive(path: Path) -> dict[str, Tensor]:
    checksum = file_checksum(path)
    if checksum not in openai_archives():
        raise BackboneError(
            f"{path} is a TorchScript archive, which holds a program as well as weights. Only OpenAI's releases are "
            f"accepted, and its SHA-256 ({checksum[:12]}...) is not one of theirs.\n"
            "For OpenAI's weights use --backbone.pretrained openai, which loads the safetensors release.\n"
            + _convert(f"torch.jit.load({str(path)!r}, map_location='cpu')")
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program: Any = torch.jit.load(str(path), map_location="cpu")
    # The fields mark the dict as OpenAI's, which determines the activation; some archives hold them as attributes.
    state = {name: tensor.detach() for name, tensor in program.state_dict().items()}
    return {name: torch.zeros(()) for name in ARCHIVE_FIELDS} | state


def split_part(path: Path) -> tuple[Path, str]:
    """Split ``FILE::NAME`` into the file and the name of one of its state dicts; without one the name is empty."""
    file, mark, part = str(path).rpartition(PART)
    return (Path(file), part) if mark and file and not path.exists() else (path, "")


def _unwrapped(state: Any, path: Path, part: str) -> Any:
    """Return the state dict in a checkpoint, without prefixes that all of its names share."""
    found = _state_dicts(state)
    if part and part not in found:
        names = ", ".join(name for name in found if name) or "none"
        raise BackboneError(f"{path} has no state dict {part!r}; it has: {names}.{did_you_mean(part, list(found))}")
    if len(found) > 1 and not part:
        lines = [f"{name}: {len(tensors)} tensors" for name, tensors in found.items()]
        raise BackboneError(
            f"{path} holds several state dicts:\n{bulleted(lines, limit=8)}\n"
            f"Name one of them: --backbone.pretrained {path}{PART}{next(iter(found))}"
        )
    if found:
        state = found[part] if part else next(iter(found.values()))
    while isinstance(state, Mapping) and state:
        prefixes = {str(name).partition(".")[0] for name in state}
        if len(prefixes) > 1 or prefixes.isdisjoint(_PREFIXES) or not all("." in str(name) for name in state):
            break
        state = {str(name).partition(".")[2]: value for name, value in state.items()}
    return state


def _state_dicts(value: Any, name: str = "", depth: int = 0) -> dict[str, Mapping[str, Any]]:
    """Return the state dicts in a checkpoint by their dotted names; those of optimisers are none."""
    if not isinstance(value, Mapping) or depth > _DEEPEST or not all(isinstance(key, str) for key in value):
        return {}
    if any(isinstance(entry, Tensor) and "." in key for key, entry in value.items()):
        return {name: value}
    found: dict[str, Mapping[str, Any]] = {}
    for key, entry in value.items():
        if not key.lower().startswith(_OPTIMISERS):
            found |= _state_dicts(entry, f"{name}.{key}" if name else key, depth + 1)
    return found


def _checked(state: Any, path: Path) -> dict[str, Tensor]:
    if not isinstance(state, Mapping):
        raise BackboneError(f"{path} holds a {type(state).__name__}, not a state dict of named tensors")
    state = {name: value for name, value in state.items() if name not in ARCHIVE_FIELDS or isinstance(value, Tensor)}
    others = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if others or not state:
        contents = f"entries that are not tensors: {', '.join(others[:5])}" if others else "no tensors"
        raise BackboneError(f"{path} is not a state dict of named tensors: it holds {contents}")
    broken = [name for name, value in state.items() if value.is_floating_point() and not torch.isfinite(value).all()]
    if broken:
        raise BackboneError(f"{path} holds values that are not finite (NaN or infinity), first in {broken[0]!r}")
    return {str(name): value for name, value in state.items()}


def load_weights(model: nn.Module, state: Mapping[str, Tensor], *, name: str, source: str) -> None:
    """Copy ``state`` into ``model``; names and shapes must match exactly.

    Raises:
        BackboneError: Missing or unexpected names, wrong shapes, or whole numbers in place of floating-point ones; the
            network is unchanged in that case.
    """
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict

    fitted = {key: value for key, value in state.items() if key not in ARCHIVE_FIELDS}
    fitted = dict(convert_state_dict(model, fitted))  # renames MobileCLIP's parameters
    if "positional_embedding" in fitted and hasattr(model, "text"):
        fitted = dict(convert_to_custom_text_state_dict(fitted))
    expected = model.state_dict()
    for scalar in ("logit_scale", "logit_bias"):  # stored as [] or as [1]
        if scalar in fitted and scalar in expected and fitted[scalar].numel() == expected[scalar].numel():
            fitted[scalar] = fitted[scalar].reshape(expected[scalar].shape)
    wrong = [key for key in expected if key in fitted and _kind_of(fitted[key]) != _kind_of(expected[key])]
    if wrong:
        lines = [f"{key}: {fitted[key].dtype}, expected {expected[key].dtype}" for key in wrong]
        raise BackboneError(
            f"{source} does not fit {name}: {len(wrong)} tensors hold other numbers.\n{bulleted(lines, limit=4)}\n"
            "Quantised weights are not supported; use those in float32, float16 or bfloat16."
        )
    missing = [key for key in expected if key not in fitted]
    unexpected = [key for key in fitted if key not in expected]
    shapes = [key for key in expected if key in fitted and expected[key].shape != fitted[key].shape]
    if missing or unexpected or shapes:
        lines = [f"missing: {key}" for key in missing[:4]] + [f"unexpected: {key}" for key in unexpected[:4]]
        lines += [f"{key}: shape {list(fitted[key].shape)}, expected {list(expected[key].shape)}" for key in shapes[:4]]
        size = "" if missing or unexpected else other_size(model, fitted, shapes)
        raise BackboneError(
            f"{source} does not fit {name}: {len(missing)} tensors missing, {len(unexpected)} unexpected, "
            f"{len(shapes)} with a wrong shape.\n{bulleted(lines)}\n{_remedy(state, name, source, size)}"
        )
    model.load_state_dict(fitted)


def _kind_of(tensor: Tensor) -> str:
    return "float" if tensor.is_floating_point() else "int" if tensor.dtype != torch.bool else "bool"


def _remedy(state: Mapping[str, Tensor], name: str, source: str, size: str) -> str:
    if advice := prefix_advice(state, source):
        return advice
    architecture = same_shapes_as(state, source)
    if architecture and architecture != name.removesuffix("-quickgelu"):
        return f"Its sizes match {architecture}: use --backbone.name {architecture}"
    if size:
        return size
    if name == "from-file":
        return "The file is incomplete; download it again."
    return (
        "Use --backbone.name with the architecture of the file (`vlprompt list backbones`), or from-file, which "
        "determines the architecture from the shapes of an OpenAI-format file."
    )


def prefix_advice(state: Mapping[str, Tensor], source: str) -> str:
    """Return what to do about a prefix in front of the names of a CLIP in ``state``; empty if there is none."""
    found = (name.partition("visual.") for name in state if "visual." in name)
    prefix = next((before for before, _, _ in found), "")
    if not prefix:
        return ""
    others = [name for name in state if not name.startswith(prefix)]
    more = f", and others do not (first {others[0]!r})" if others else ""
    return (
        f"{len(state) - len(others)} of its names begin with {prefix!r}{more}. Keep the CLIP alone, without the "
        f"prefix:\n{_without_prefix(source, prefix)}"
    )


def _without_prefix(source: str, prefix: str) -> str:
    code = (
        "import safetensors.torch as s; from pathlib import Path; from vlprompt.backbone.weights import read_weights; "
        f"x = read_weights(Path({source!r})); p = {prefix!r}; "
        "s.save_file({k[len(p):]: v.clone() for k, v in x.items() if k.startswith(p)}, 'weights.safetensors')"
    )
    return _python(code)
