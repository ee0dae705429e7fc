"""``vlprompt data get``: downloads with resume and checksums from a local server."""

from __future__ import annotations

import gzip
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.datasets.archives import Files, tar_of, tree, zip_of
from tests.datasets.layouts import encoded
from vlprompt.datasets.acquire import transfer
from vlprompt.datasets.acquire.download import get, steps
from vlprompt.datasets.acquire.transfer import Network
from vlprompt.datasets.card import Card, Classes, Licence, Source, Split, Templates
from vlprompt.datasets.catalogue import find_card, list_datasets
from vlprompt.datasets.options import FolderOptions, SplitJsonOptions
from vlprompt.errors import DataError

LOCAL = Network(schemes=("http",), timeout=5.0, pause=0.01)


@dataclass
class Server:
    """A server with responses chosen by a test."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    #: Bytes that each next response sends before the connection closes.
    breaks: list[int] = field(default_factory=list)
    ranges: bool = True
    status: dict[str, int] = field(default_factory=dict)
    moved: dict[str, str] = field(default_factory=dict)
    tag: str = '"1"'


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *words: Any) -> None:
            pass

        def do_GET(self) -> None:
            name = self.path.lstrip("/").partition("?")[0]
            wanted = self.headers.get("Range")
            state.asked.append((name, wanted))
            if name in state.moved:
                self.send_response(302)
                self.send_header("Location", state.moved[name])
                self.end_headers()
                return
            if name in state.status or name not in state.files:
                self.send_error(state.status.get(name, 404))
                return
            data, start = state.files[name], 0
            condition = self.headers.get("If-Range")
            if wanted and state.ranges and condition in (None, state.tag):
                start = int(wanted.removeprefix("bytes=").rstrip("-"))
                if start >= len(data):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(data)}")
                    self.end_headers()
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(len(data) - start))
            self.send_header("ETag", state.tag)
            self.end_headers()
            body = data[start:]
            if state.breaks:
                body = body[: state.breaks.pop(0)]
                self.close_connection = True
            self.wfile.write(body)

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listener.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{listener.server_port}"
    yield state
    listener.shutdown()
    listener.server_close()


def md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def a_card(*sources: Source, **fields: Any) -> Card:
    options = fields.pop("options", FolderOptions(splits={"test": ("images",)}))
    return Card(
        "toy", fields.pop("reader", "folder"), options, Classes(), Templates("{}"), folders=("toy",), sources=sources,
        licence=Licence("be kind", "https://toy.example/licence"), notes="Put it there.", **fields,
    )  # fmt: skip


IMAGES: Files = {f"images/{name}/0.png": encoded(".png", number) for number, name in enumerate(("cat", "dog"))}


def run(card: Card, root: Path, **options: Any) -> tuple[list[str], str]:
    lines: list[str] = []
    return get(card, root, report=lines.append, **{"network": LOCAL, **options}), "\n".join(lines)


def refused(card: Card, root: Path, *matches: str, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        run(card, root, **options)
    assert all(match in str(caught.value) for match in matches), str(caught.value)
    return str(caught.value)


# -- fetching ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "pack", [tar_of, zip_of, lambda files: tar_of(files, "w"), lambda files: tar_of(files, "w:xz")]
)
def test_fetch_and_unpack(pack: Callable[[Files], bytes], tmp_path: Path, server: Server) -> None:
    data = pack(IMAGES)
    server.files["toy.archive"] = data
    source = Source(
        "images", "https://toy.example", f"{server.url}/toy.archive?download=1", md5(data), sha256(data), unpack="."
    )
    left, printed = run(a_card(source), tmp_path)
    assert left == [] and tree(tmp_path / "toy") == IMAGES  # and the archive is removed
    assert printed.startswith("page:     https://toy.example\nlicence:  be kind (https://toy.example/licence)\nfolder:")
    assert "images: 2 files unpacked" in printed
    # A second run requests nothing.
    again = run(a_card(source), tmp_path)
    assert again[0] == [] and "can be read" in again[1] and len(server.asked) == 1


def test_unpacked_archives_are_not_fetched_again(tmp_path: Path, server: Server) -> None:
    first, second = tar_of({"a.txt": b"a"}), tar_of({"b.txt": b"b"})
    server.files |= {"1.tgz": first, "2.tgz": second}
    sources = [
        Source(str(n), "", f"{server.url}/{n}.tgz", md5(data), unpack=".") for n, data in ((1, first), (2, second))
    ]
    run(a_card(*sources), tmp_path)
    _, printed = run(a_card(*sources), tmp_path)  # the card's images are still missing, so the data set is incomplete
    assert printed.count("already present") == 2 and len(server.asked) == 2
    (tmp_path / "toy" / "b.txt").unlink()
    run(a_card(*sources), tmp_path)
    assert [name for name, _ in server.asked] == ["1.tgz", "2.tgz", "2.tgz"] and (tmp_path / "toy" / "b.txt").exists()


def test_parts_of_an_archive(tmp_path: Path, server: Server) -> None:
    """``strip`` drops leading folders and other members; ``inner`` is an archive in the archive."""
    inner = tar_of(IMAGES)
    data = zip_of({"toy/inner.tar.gz": inner, "toy/read.me": b"hello", "__MACOSX/._inner.tar.gz": b"junk"})
    server.files["toy.zip"] = data
    source = Source("images", "", f"{server.url}/toy.zip", md5(data), unpack=".", strip="toy", inner="inner.tar.gz")
    assert run(a_card(source), tmp_path)[0] == []
    assert tree(tmp_path / "toy") == {**IMAGES, "read.me": b"hello"}


def test_files_are_kept_or_decompressed(tmp_path: Path, server: Server) -> None:
    packed = gzip.compress(b"idx")
    server.files |= {"train.gz": packed, "labels.mat": b"labels"}
    sources = (
        Source("train", "", f"{server.url}/train.gz", md5(packed), to="raw/train"),
        Source("train", "", f"{server.url}/train.gz", md5(packed), to="raw/kept.gz"),
        Source("labels", "", f"{server.url}/labels.mat", sha256=sha256(b"labels")),
    )
    run(a_card(*sources), tmp_path)
    assert tree(tmp_path / "toy") == {"raw/train": b"idx", "raw/kept.gz": packed, "labels.mat": b"labels"}


def test_interrupted_transfers_are_resumed(tmp_path: Path, server: Server) -> None:
    data = os.urandom(100_000)
    server.files["big.bin"], server.breaks = data, [30_000, 50_000]
    source = Source("big", "", f"{server.url}/big.bin", md5(data))
    run(a_card(source), tmp_path)
    assert (tmp_path / "toy" / "big.bin").read_bytes() == data
    assert [wanted for _, wanted in server.asked] == [None, "bytes=30000-", "bytes=80000-"]


def test_a_file_that_changes_meanwhile_is_restarted(tmp_path: Path, server: Server) -> None:
    data = os.urandom(50_000)
    server.files["big.bin"], server.breaks = data, [20_000]
    source = Source("big", "", f"{server.url}/big.bin")

    class Changing(list[tuple[str, str | None]]):
        def append(self, entry: tuple[str, str | None]) -> None:
            super().append(entry)
            if len(self) == 2:
                server.tag, server.files["big.bin"] = '"2"', data[::-1]

    server.asked = Changing()
    run(a_card(source), tmp_path)
    assert server.asked[1][1] == "bytes=20000-"
    assert (tmp_path / "toy" / "big.bin").read_bytes() == data[::-1]


def test_a_server_without_ranges_restarts(tmp_path: Path, server: Server) -> None:
    data = os.urandom(10_000)
    server.files["big.bin"], server.ranges, server.breaks = data, False, [4_000]
    run(a_card(Source("big", "", f"{server.url}/big.bin", md5(data))), tmp_path)
    assert (tmp_path / "toy" / "big.bin").read_bytes() == data and server.asked[-1][1] == "bytes=4000-"


def test_the_next_run_resumes(tmp_path: Path, server: Server) -> None:
    data = os.urandom(10_000)
    server.files["big.bin"], server.breaks = data, [4_000, 0, 0, 0, 0]
    card = a_card(Source("big", "", f"{server.url}/big.bin", md5(data)))
    refused(card, tmp_path, "cannot be fetched", "4,000 bytes are kept")
    assert not (tmp_path / "toy" / "big.bin").exists()
    run(card, tmp_path)
    assert (tmp_path / "toy" / "big.bin").read_bytes() == data and server.asked[-1][1] == "bytes=4000-"


def test_without_a_checksum_the_next_run_restarts(tmp_path: Path, server: Server) -> None:
    server.files["big.bin"] = b"new"
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "big.bin.part").write_bytes(b"an older part")
    run(a_card(Source("big", "", f"{server.url}/big.bin")), tmp_path)
    assert (tmp_path / "toy" / "big.bin").read_bytes() == b"new"


@pytest.mark.parametrize("partial", [b"whole", b"whole and more"])
def test_a_complete_partial_file(partial: bytes, tmp_path: Path, server: Server) -> None:
    server.files["big.bin"] = b"whole"
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "big.bin.part").write_bytes(partial)
    run(a_card(Source("big", "", f"{server.url}/big.bin", md5(b"whole"))), tmp_path)
    assert (tmp_path / "toy" / "big.bin").read_bytes() == b"whole"


def test_a_wrong_checksum(tmp_path: Path, server: Server) -> None:
    server.files["toy.zip"] = data = zip_of(IMAGES)
    for sums in ({"md5": "0" * 32}, {"md5": md5(data), "sha256": "1" * 64}):
        card = a_card(Source("images", "", f"{server.url}/toy.zip", unpack=".", **sums))
        actual, expected = (md5(data), "0" * 32) if len(sums) == 1 else (sha256(data), "1" * 64)
        refused(card, tmp_path, f"is {actual}, expected {expected}. It was removed.", server.url)
        assert tree(tmp_path / "toy") == {}


@pytest.mark.parametrize("status", [403, 404, 410, 500, 503])
def test_a_server_that_refuses(status: int, tmp_path: Path, server: Server) -> None:
    server.status["toy.zip"] = status
    card = a_card(Source("images", "", f"{server.url}/toy.zip", unpack="."))
    refused(card, tmp_path, f"{server.url}/toy.zip cannot be fetched: the server returns {status}",
            f"vlprompt data get toy --root {tmp_path} --from FILE", f"goes to {tmp_path / 'toy'}")  # fmt: skip
    assert len(server.asked) == 1


def test_no_network_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer.time, "sleep", lambda _: pytest.fail("waits before another try"))
    network = Network(schemes=("http",), timeout=3.0)
    card = a_card(Source("images", "", "http://127.0.0.1:9/toy.zip", unpack="."))
    text = refused(card, tmp_path, "http://127.0.0.1:9/toy.zip cannot be fetched", "Fetch it by hand", network=network)
    assert "--from FILE" in text
    card = a_card(Source("images", "", "http://no-such-host.invalid/toy.zip", unpack="."))
    refused(card, tmp_path, "no-such-host.invalid/toy.zip cannot be fetched", network=network)


def test_only_https(tmp_path: Path, server: Server) -> None:
    server.files["toy.zip"] = b"zip"
    plain = Source("images", "", f"{server.url}/toy.zip", unpack=".")
    left, _ = run(a_card(plain), tmp_path, network=Network())  # the user has to fetch what is not https
    assert server.asked == [] and f"by hand:  images, from {server.url}/toy.zip" in left
    (tmp_path / "secret").write_text("secret")
    for place in (f"file://{tmp_path}/secret", "ftp://127.0.0.1/toy.zip", "https://127.0.0.1:9/toy.zip"):
        server.moved["toy.zip"] = place
        refused(a_card(plain), tmp_path, "toy.zip cannot be fetched", place)
    source = Source("images", "", f"file://{tmp_path}/secret", to="copy")
    assert run(a_card(source), tmp_path, network=Network())[0] and tree(tmp_path / "toy") == {}


def test_every_address_of_the_cards_is_https() -> None:
    urls = [source.url for name in list_datasets() for source in find_card(name).sources if source.url]
    assert len(urls) >= 15 and [url for url in urls if not url.startswith("https://")] == []


def test_the_users_files_are_never_replaced(tmp_path: Path, server: Server) -> None:
    data = tar_of({**IMAGES, "new.txt": b"new"})
    server.files |= {"toy.tgz": data, "labels.mat": b"published"}
    mine = tmp_path / "toy" / "images" / "cat" / "0.png"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    source = Source("images", "", f"{server.url}/toy.tgz", md5(data), unpack=".")
    sizes: dict[str, Any] = {
        "splits": {"all": Split(test=99)},
        "split": "all",
    }  # more than there are, so the data set is incomplete
    _, printed = run(a_card(source, **sizes), tmp_path)
    assert mine.read_bytes() == b"mine" and f"existing files that are not replaced: 1, the first {mine};" in printed
    assert (tmp_path / "toy" / "new.txt").exists() and (tmp_path / "toy" / "images" / "dog" / "0.png").exists()
    (tmp_path / "toy" / "lists").mkdir()
    (tmp_path / "toy" / "lists" / "labels.mat").write_bytes(b"mine")
    card = a_card(Source("labels", "", f"{server.url}/labels.mat", md5(b"published"), to="lists/labels.mat"))
    (tmp_path / "labels.mat").write_bytes(b"published")
    refused(card, tmp_path, "lists/labels.mat exists and is never replaced", source_file=tmp_path / "labels.mat")
    # An archive that the user put there is used if its checksum is right, and kept.
    (tmp_path / "toy" / "toy.tgz").write_bytes(b"mine")
    card = a_card(Source("images", "", f"{server.url}/toy.tgz", md5(data), unpack="again"), **sizes)
    refused(card, tmp_path, "toy.tgz is not the published file; move it away")
    (tmp_path / "toy" / "toy.tgz").write_bytes(data)
    asked = len(server.asked)
    run(card, tmp_path)
    assert (tmp_path / "toy" / "toy.tgz").exists() and (tmp_path / "toy" / "again" / "new.txt").exists()
    assert len(server.asked) == asked


def test_two_at_once_are_refused(tmp_path: Path, server: Server) -> None:
    (tmp_path / "toy").mkdir()
    with FileLock(tmp_path / "toy" / ".vlprompt-get.lock"):
        refused(a_card(Source("a", "", f"{server.url}/a.txt")), tmp_path, "Another `vlprompt data get toy` is running")
    assert server.asked == []


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, server: Server) -> None:
    (tmp_path / "toy").write_text("a file")
    refused(a_card(Source("a", "", f"{server.url}/a.txt")), tmp_path, "toy cannot be written to", "--root DIR")


# -- by hand ----------------------------------------------------------------------------------------------------------
def test_steps_to_do_by_hand(tmp_path: Path) -> None:
    card = a_card(
        Source("toy.rar", "https://toy.example/images"),
        Source("split_toy.json", "https://toy.example/split", sha256="a" * 64),
        reader="split_json", options=SplitJsonOptions("split_toy.json"),
    )  # fmt: skip
    assert run(card, tmp_path)[0] == steps(card, tmp_path) == [
        "by hand:  toy.rar, from https://toy.example/images",
        "by hand:  split_toy.json, from https://toy.example/split",
        f"          expected sha256 {'a' * 64}",
        f"          goes to {tmp_path}/toy/split_toy.json",
        f"          or: vlprompt data get toy --root {tmp_path} --from FILE",
        "how:      Put it there.",
        f"check it: vlprompt data check toy --root {tmp_path}",
    ]  # fmt: skip
    assert not (tmp_path / "toy").exists()  # no folder is created


def test_packaged_data_sets_need_no_steps(tmp_path: Path) -> None:
    assert run(find_card("demo"), tmp_path) == ([], "demo is part of vlprompt; there is nothing to fetch.")


@pytest.mark.parametrize("name", [name for name in list_datasets() if not find_card(name).packaged])
def test_every_source_of_a_card_is_fetched_or_listed(name: str, tmp_path: Path) -> None:
    card = find_card(name)
    fetched = [source for source in card.sources if source.url]
    by_hand = "\n".join(steps(card, tmp_path))
    assert bool(by_hand) == (len(fetched) < len(card.sources))
    for source in card.sources:
        assert (f"by hand:  {source.what}, from" in by_hand) == (source.url is None)
        if source.url:  # the card states its target
            assert source.unpack is not None or source.to or not source.url.endswith((".zip", ".tar", "gz"))


def test_a_file_that_the_user_fetched(tmp_path: Path) -> None:
    data, split = tar_of(IMAGES), b'{"train": []}'
    card = a_card(
        Source("images", "", "https://toy.example/toy.tgz", md5(data), unpack="."),
        Source("names.txt"), Source("whole.rar"), Source("lists", sha256=sha256(b"list"), to="lists/1.txt"),
        reader="split_json", options=SplitJsonOptions("split_toy.json"),
    )  # fmt: skip
    hands = tmp_path / "downloads"
    hands.mkdir()
    for name, content in {
        "renamed by the browser": data, "names.txt": b"names", "whole.rar": b"rar", "toy.tgz": b"cut", "other": b"?",
        "split_toy.json": split, "list (1)": b"list",
    }.items():  # fmt: skip
        (hands / name).write_bytes(content)

    def take(name: str) -> str:
        return run(card, tmp_path, source_file=hands / name, network=Network())[1]

    assert "images: 2 files unpacked" in take("renamed by the browser")  # found by its checksum
    assert "is identified as names.txt by its name; its checksum is not known" in take("names.txt")
    assert take("list (1)").endswith("lists/1.txt") and "already present" in take("list (1)")
    assert "split_toy.json" in take("split_toy.json")
    expected = {**IMAGES, "names.txt": b"names", "lists/1.txt": b"list", "split_toy.json": split}
    assert tree(tmp_path / "toy") == expected and len(tree(hands)) == 7  # the user's files are kept
    for name, *matches in (
        ("toy.tgz", f"is not the published images: its md5 is {md5(b'cut')}, expected {md5(data)}"),
        ("other", "is not a file of toy", sha256(b"?"), "toy.tgz", md5(data)),
        ("whole.rar", "does not state where whole.rar goes", "Put it there."),
        ("none", "which is not a file"),
    ):
        refused(card, tmp_path, *matches, source_file=hands / name)
