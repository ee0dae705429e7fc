"""Weight files: supported kinds, damaged or foreign files, and files with code, which never runs."""

from __future__ import annotations

import argparse
import fractions
import os
import pathlib
import pickle  # noqa: TID251 - to build the files that must be refused
import shlex
import zipfile

import pytest
import torch
from open_clip import CLIP, trace_model
from safetensors.torch import save, save_file

from vlprompt.backbone import load_backbone, weights
from vlprompt.backbone.weights import read_weights
from vlprompt.errors import BackboneError

SMALL = {"text_width": 64, "vision_width": 64, "text_layers": 1, "vision_layers": 1}


@pytest.fixture(scope="module")
def state(tiny_state_dict):
    return tiny_state_dict(**SMALL)


def refusal(path):
    with pytest.raises(BackboneError) as caught:
        read_weights(path)
    text = str(caught.value)
    assert str(path) in text and len(text.splitlines()) < 10
    return text


# -- supported kinds ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("file", "wrap"),
    [
        ("a.pt", lambda s: s),
        ("a.bin", lambda s: {"state_dict": s, "epoch": 3, "optimizer": {"lr": 0.1}}),
        ("a.pth", lambda s: {"model": {f"module.{name}": value for name, value in s.items()}}),
    ],
)
def test_torch_files_are_read_and_unwrapped(tmp_path, state, file, wrap):
    torch.save(wrap(state), tmp_path / file)
    tensors = read_weights(tmp_path / file)
    assert tensors.keys() == state.keys() and all(torch.equal(tensors[name], state[name]) for name in state)


def test_old_torch_files_and_safetensors_under_any_ending_are_read(tmp_path, state):
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "named.safetensors")
    save_file(state, tmp_path / "unnamed.weights")
    for file in ("old.pt", "named.safetensors", "unnamed.weights"):
        assert torch.equal(read_weights(tmp_path / file)["visual.proj"], state["visual.proj"])


def test_half_precision_files_load_into_float32_networks(tmp_path, state):
    save_file(
        {name: value.half() if value.ndim else value for name, value in state.items()}, tmp_path / "half.safetensors"
    )
    backbone = load_backbone("from-file", tmp_path / "half.safetensors")
    assert backbone.model.visual.proj.dtype == torch.float32
    # The values of the tiny weights are exact in half precision.
    assert torch.equal(backbone.model.visual.proj, state["visual.proj"])


# -- refused files -----------------------------------------------------------------------------------------------------
def test_missing_files_and_folders_are_refused(tmp_path):
    assert "there is no weight file" in refusal(tmp_path / "none.pt")
    assert f"local-dir:{tmp_path}" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes"),
        (b"hello, this is a readme", "neither a safetensors nor a torch file"),
        (b"<!DOCTYPE html><html>Sign in</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        (b"PK\x03\x04 and then nothing", "cut short"),
        (b"\x80\x02 not really", "cut short"),
    ],
)
def test_foreign_files_are_refused(tmp_path, content, message):
    (tmp_path / "w.pt").write_bytes(content)
    assert message in refusal(tmp_path / "w.pt")


@pytest.mark.parametrize("fraction", [0.3, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["safetensors", "pt", "old.pt"])
def test_files_cut_short_are_refused(tmp_path, state, kind, fraction):
    whole = tmp_path / f"whole.{kind}"
    if kind == "safetensors":
        save_file(state, whole)
    else:
        torch.save(state, whole, _use_new_zipfile_serialization=kind == "pt")
    content = whole.read_bytes()
    cut = tmp_path / f"cut.{kind}"
    cut.write_bytes(content[: int(fraction * len(content))])
    text = refusal(cut)
    assert "cut short or damaged" in text and f"{int(fraction * len(content))} bytes" in text


def test_archive_of_other_files_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        archive.writestr("photo.jpg", b"...")
    assert "photo.jpg" in refusal(tmp_path / "w.pt")


class Trap:
    """Creates a folder when it is unpickled."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("kind", ["torch", "plain"])
def test_files_with_code_are_refused_and_not_run(tmp_path, state, kind):
    path, mark = tmp_path / "w.pt", tmp_path / "was-run"
    if kind == "torch":
        torch.save({"state_dict": state, "hook": Trap(mark)}, path)
    else:
        path.write_bytes(pickle.dumps({"state_dict": Trap(mark)}))
    text = refusal(path)
    assert "could run code" in text and "save_file" in text and not mark.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2, 3], "a list, not a state dict"),
        ({}, "no tensors"),
        ({"a": torch.ones(1), "note": "text", "epoch": 3}, "note, epoch"),
        ({"a": torch.ones(1), "b": torch.tensor([1.0, float("nan")])}, "not finite (NaN or infinity), first in 'b'"),
        (torch.ones(3), "a Tensor, not a state dict"),
    ],
)
def test_contents_other_than_a_state_dict_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "w.pt")
    assert message in refusal(tmp_path / "w.pt")


# -- checkpoints of training scripts -----------------------------------------------------------------------------------
def prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize("prefix", ["_orig_mod.", "model.", "clip.", "module._orig_mod.", "model.clip."])
@pytest.mark.parametrize("wrapper", ["", "state_dict", "model", "ema", "net.weights"])
def test_wrappers_and_prefixes_of_training_scripts_are_removed(tmp_path, state, wrapper, prefix):
    content = prefixed(state, prefix)
    for name in reversed(wrapper.split(".") if wrapper else []):
        content = {
            name: content,
            "epoch": 3,
            "optimizer": {"state": {0: {"step": torch.ones(())}}, "a": {"b.c": torch.ones(1)}},
        }
        content["args"] = argparse.Namespace(lr=0.1, output=pathlib.PosixPath("x"))
    torch.save(content, tmp_path / "w.pt")
    found = read_weights(tmp_path / "w.pt")
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


def test_of_several_state_dicts_one_is_named(tmp_path, state):
    path = tmp_path / "w.pt"
    torch.save({"model": state, "ema": {name: value + 1 for name, value in state.items()}}, path)
    text = refusal(path)
    assert "several state dicts" in text and f"--backbone.pretrained {path}::model" in text
    found = read_weights(path.with_name("w.pt::ema"))
    assert torch.equal(found["visual.proj"], state["visual.proj"] + 1)
    assert load_backbone("from-file", f"{path}::model").pretrained == f"{path}::model"
    with pytest.raises(BackboneError, match="no state dict 'emma'; it has: model, ema.*'ema'"):
        read_weights(path.with_name("w.pt::emma"))


def run_line(line):
    """Run ``python -c "..."`` in this process."""
    python, option, code = shlex.split(line)
    assert (python, option) == ("python", "-c")
    exec(code, {})


@pytest.mark.parametrize("kind", ["module", "wrapped module", "object"])
def test_the_conversion_that_is_advised_works(tmp_path, monkeypatch, state, kind):
    model = load_backbone("demo").model
    hook = {"model": model.state_dict(), "hook": fractions.Fraction(1, 3)}
    torch.save(
        {"module": model, "wrapped module": {"epoch": 1, "model": model}, "object": hook}[kind], tmp_path / "w.pt"
    )
    line = next(line for line in refusal(tmp_path / "w.pt").splitlines() if "python -c " in line)
    monkeypatch.chdir(tmp_path)
    run_line(line.partition("convert it once: ")[2])
    found = read_weights(tmp_path / "weights.safetensors")
    assert found.keys() == model.state_dict().keys()


def test_a_clip_among_other_tensors_is_named_with_the_command_that_keeps_it(tmp_path, monkeypatch, state):
    path = tmp_path / "w.safetensors"
    save_file({**prefixed(state, "encoder."), "classifier.weight": torch.ones(2, 2)}, path)
    said = "begin with 'encoder.', and others do not .first 'classifier.weight'"
    with pytest.raises(BackboneError, match=said) as caught:
        load_backbone("from-file", path)
    with pytest.raises(BackboneError, match=said):
        load_backbone("ViT-B-32", f"openai={path}")
    monkeypatch.chdir(tmp_path)
    run_line(str(caught.value).splitlines()[-1])
    assert read_weights(tmp_path / "weights.safetensors").keys() == state.keys()


# -- OpenAI's archives -------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """A TorchScript archive like OpenAI's releases: a traced network with its weights."""
    vision = {"layers": 1, "width": 64, "patch_size": 16, "image_size": 32}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
    model = CLIP(64, vision, text, quick_gelu=True).eval()
    model.visual.image_size = 32
    model._buffers["attn_mask"] = None  # OpenAI's archives hold no mask
    path = tmp_path_factory.mktemp("archive") / "ViT-T.pt"
    torch.jit.save(trace_model(model, batch_size=1), path)
    return path, model


@pytest.mark.filterwarnings("ignore")
def test_torchscript_of_unknown_origin_is_refused_with_the_conversion(archive):
    text = refusal(archive[0])
    assert "TorchScript" in text and "--backbone.pretrained openai" in text and "torch.jit.load" in text


@pytest.mark.filterwarnings("ignore")
def test_torchscript_of_openai_is_accepted_by_its_checksum(archive, monkeypatch):
    import hashlib

    path, model = archive
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(weights, "openai_archives", lambda: {digest: "ViT-T.pt"})
    backbone = load_backbone("from-file", path)
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(backbone.encode_image(x), model.visual(x))
    with pytest.raises(BackboneError, match="QuickGELU"):
        load_backbone("from-file", path, quick_gelu=False)


def test_checksums_of_openais_releases_come_from_open_clip():
    known = weights.openai_archives()
    assert known["5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"] == "ViT-B-16.pt"
    assert len(known) >= 9 and all(len(digest) == 64 for digest in known)


def test_a_safetensors_file_that_begins_like_an_archive_is_read(tmp_path):
    """The first 8 bytes are the length of the header; 19,280 starts with "PK"."""
    weights = {"a": torch.arange(3.0)}
    bare = int.from_bytes(save(weights, {"pad": ""})[:8], "little")
    for length in range(19_280 - bare - 8, 19_280 - bare + 8):
        data = save(weights, {"pad": "x" * length})
        if data.startswith(b"PK"):
            break
    assert data.startswith(b"PK\0\0")
    (tmp_path / "odd.safetensors").write_bytes(data)
    assert torch.equal(read_weights(tmp_path / "odd.safetensors")["a"], weights["a"])
