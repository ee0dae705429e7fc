"""Published weights: local files, downloads without retry loops, and the error if both fail."""

from __future__ import annotations

from types import SimpleNamespace

import huggingface_hub
import pytest

from vlprompt.backbone import fetch
from vlprompt.errors import BackboneError

ENTRY = {"hf_hub": "acme/tiny.openai/", "url": "https://openaipublic.example/clip/models/abc/Tiny.pt"}


@pytest.fixture(autouse=True)
def empty_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("VLPROMPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, file: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


def hub(monkeypatch, statuses, downloaded=None):
    """Replace the hub by one with ``statuses[file]``; return the log of probes and downloads."""
    log = []

    def head(url, timeout):
        log.append(("head", url, timeout))
        answer = statuses[url.rpartition("/")[2]]
        if isinstance(answer, Exception):
            raise answer
        return SimpleNamespace(status_code=answer)

    def download(repo, file):
        log.append(("get", repo, file))
        if isinstance(downloaded, Exception):
            raise downloaded
        return f"/hub/{repo}/{file}"

    monkeypatch.setattr(huggingface_hub, "get_session", lambda: SimpleNamespace(head=head))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return log


def test_published_reads_open_clips_entries():
    usual = fetch.published("Tiny", "openai", ENTRY)
    assert (usual.repo, usual.files) == ("acme/tiny.openai", fetch.WEIGHT_FILES)
    named = fetch.published("Tiny", "x", {"hf_hub": "acme/tiny/pytorch_model.bin"})
    assert (named.repo, named.files) == ("acme/tiny", ("pytorch_model.safetensors", "pytorch_model.bin"))
    bare = fetch.published("Tiny", "x", {"url": "https://acme.example/w/tiny.pt"})
    assert (bare.repo, bare.files) == ("", ("tiny.pt",))


def test_vlprompts_cache_comes_first_and_needs_no_hub(tmp_path):
    source = fetch.published("Tiny", "openai", ENTRY)
    path = tmp_path / "cache" / "weights" / "Tiny" / "openai" / "open_clip_model.safetensors"
    path.parent.mkdir(parents=True)
    path.touch()
    assert fetch.find_or_fetch(source) == path


def test_hub_cache_and_openais_cache_are_searched(tmp_path, monkeypatch):
    source = fetch.published("Tiny", "openai", ENTRY)
    old = tmp_path / "home" / ".cache" / "clip" / "Tiny.pt"
    old.parent.mkdir(parents=True)
    old.touch()
    assert fetch.find_or_fetch(source) == old
    cached = tmp_path / "blob"
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, file: str(cached))
    assert fetch.find_or_fetch(source) == cached


def test_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    assert fetch.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("VLPROMPT_CACHE")
    assert fetch.cache_folder() == tmp_path / "home" / ".cache" / "vlprompt"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert fetch.cache_folder() == tmp_path / "xdg" / "vlprompt"


def test_hub_prefers_the_safetensors_file(monkeypatch):
    log = hub(monkeypatch, {"open_clip_model.safetensors": 302})
    assert str(fetch.find_or_fetch(fetch.published("Tiny", "openai", ENTRY))).endswith("open_clip_model.safetensors")
    assert [entry[0] for entry in log] == ["head", "get"] and log[0][2] <= 10


def test_hub_without_a_safetensors_file_returns_the_other(monkeypatch):
    hub(monkeypatch, {"open_clip_model.safetensors": 404, "open_clip_pytorch_model.bin": 200})
    assert str(fetch.find_or_fetch(fetch.published("Tiny", "openai", ENTRY))).endswith("open_clip_pytorch_model.bin")


@pytest.mark.parametrize(
    ("statuses", "downloaded", "reason"),
    [
        ({"open_clip_model.safetensors": OSError("Name or service not known")}, None, "no connection to https://"),
        ({"open_clip_model.safetensors": 401, "open_clip_pytorch_model.bin": 401}, None, "answered 401"),
        ({"open_clip_model.safetensors": 200}, OSError("disk full"), "disk full"),
    ],
)
def test_failure_names_file_address_and_target(tmp_path, monkeypatch, statuses, downloaded, reason):
    hub(monkeypatch, statuses, downloaded)
    with pytest.raises(BackboneError) as caught:
        fetch.find_or_fetch(fetch.published("Tiny", "openai", ENTRY))
    text = str(caught.value)
    assert reason in text and len(text.splitlines()) < 12
    assert "https://huggingface.co/acme/tiny.openai/resolve/main/open_clip_model.safetensors" in text
    assert str(tmp_path / "cache/weights/Tiny/openai/open_clip_model.safetensors") in text
    assert "--backbone.pretrained openai=/path/to/open_clip_model.safetensors" in text
    assert "--backbone.name demo" in text


def test_file_saved_at_the_target_of_the_message_is_used(monkeypatch):
    source = fetch.published("Tiny", "openai", ENTRY)
    hub(monkeypatch, {"open_clip_model.safetensors": OSError("no network")})
    with pytest.raises(BackboneError) as caught:
        fetch.find_or_fetch(source)
    line = str(caught.value).splitlines()[4].strip()
    source.folder.mkdir(parents=True)
    open(line, "w").close()
    assert str(fetch.find_or_fetch(source)) == line


def test_error_names_the_url_of_weights_without_a_repository():
    with pytest.raises(BackboneError, match=r"https://acme\.example/w/tiny\.pt"):
        fetch.find_or_fetch(fetch.published("Tiny", "x", {"url": "https://acme.example/w/tiny.pt"}))


def test_offline_mode_of_the_hub_is_respected(monkeypatch):
    log = hub(monkeypatch, {})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BackboneError, match="HF_HUB_OFFLINE is set"):
        fetch.find_or_fetch(fetch.published("Tiny", "openai", ENTRY))
    assert log == []


def test_repository_needs_its_configuration_and_its_weights(monkeypatch):
    hub(monkeypatch, {"open_clip_config.json": 200, "open_clip_model.safetensors": 200})
    config, weights = fetch.find_or_fetch_repo("acme/own")
    assert (config.name, weights.name) == ("open_clip_config.json", "open_clip_model.safetensors")
    hub(monkeypatch, {"open_clip_config.json": OSError("no network")})
    with pytest.raises(BackboneError) as caught:
        fetch.find_or_fetch_repo("acme/own")
    assert "https://huggingface.co/acme/own" in str(caught.value) and "local-dir:FOLDER" in str(caught.value)


def test_an_unreachable_hub_is_named(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(BackboneError, match="no connection"):
        fetch.find_or_fetch(fetch.published("Tiny", "openai", ENTRY))
