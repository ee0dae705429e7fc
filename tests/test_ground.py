"""Ground-floor modules: atomic files, checksums, process groups, seeded draws."""

import ast
import hashlib
import importlib.util
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.table import Table

from vlprompt import _dist, _memory, _random, _terminal
from vlprompt._files import (
    LEFTOVER,
    canonical_json,
    file_checksum,
    home_path,
    leftovers,
    lock,
    replacing,
    sha256_bytes,
    sha256_json,
    sha256_lines,
    sha256_tensors,
    sha256_text,
    write_bytes,
    write_json,
    write_text,
)
from vlprompt.errors import ConfigError

VLPROMPT = Path(_dist.__file__).parent


def fail(*_: Any) -> None:
    raise OSError("disk full")


# -- files ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("step", ["replace", "fsync"])
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = tmp_path / "new" / "a.json"
    write_text(path, "one")
    write_text(path, "two ä\n")
    assert path.read_bytes() == "two ä\n".encode()
    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="disk full"):
        write_text(path, "three")
    assert path.read_bytes() == "two ä\n".encode()
    assert [entry.name for entry in path.parent.iterdir()] == ["a.json"]


def test_a_body_that_raises_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_the_temporary_file_lies_beside_its_target_and_is_known_as_a_leftover(tmp_path: Path) -> None:
    with replacing(tmp_path / "some-name.json") as temporary:
        temporary.write_bytes(b"")
        assert temporary.parent == tmp_path
        assert list(leftovers(tmp_path, "some-name")) == list(leftovers(tmp_path)) == [temporary]
        assert not list(leftovers(tmp_path, "other"))
        found = LEFTOVER.fullmatch(temporary.name)
        assert found is not None and found[1] == "some-name"
    assert not list(leftovers(tmp_path))


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_bytes(tmp_path / "a", b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_an_unknown_home_folder_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    assert home_path("~/a") == Path.home() / "a" and home_path("a/~") == Path("a/~")
    with pytest.raises(ConfigError, match="'~nobody-here/a' is not known. .*export HOME=FOLDER"):
        home_path("~nobody-here/a")


def test_json_is_written_indented_with_a_final_newline(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": [1], "a": "ä"})
    assert (tmp_path / "a.json").read_text() == json.dumps({"b": [1], "a": "ä"}, indent=1) + "\n"


def test_checksums_are_sha256_of_what_their_names_say(tmp_path: Path) -> None:
    def plain(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()

    assert sha256_bytes(b"ab") == sha256_text("ab") == plain("ab")
    assert sha256_lines([]) == plain("") and sha256_lines(["", ""]) == plain("\n")
    assert sha256_lines(word for word in ("a", "ä")) == plain("a\nä")
    assert sha256_json({"b": (1, 2), "a": {3}}) == plain('{"a": [3], "b": [1, 2]}')
    assert canonical_json({"b": 1, "a": "ä"}) == '{"a":"\\u00e4","b":1}'
    with pytest.raises(ValueError):
        canonical_json(float("nan"))
    (tmp_path / "a").write_bytes(b"ab")
    assert file_checksum(tmp_path / "a") == plain("ab")
    assert file_checksum(tmp_path / "a", "md5") == hashlib.md5(b"ab").hexdigest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64, torch.bool, torch.uint8])
def test_tensors_are_hashed_by_name_with_their_header(dtype: torch.dtype) -> None:
    tensors = {"b": torch.arange(6).reshape(2, 3).t().to(dtype), "a": torch.ones((), dtype=dtype), "c": torch.zeros(0)}
    expected = hashlib.sha256(b"start")
    for name, tensor in sorted(tensors.items()):
        expected.update(f"{name}|".encode() + tensor.contiguous().numpy().tobytes())
    assert sha256_tensors(tensors, lambda name, _: f"{name}|", start="start") == expected.hexdigest()


def test_bfloat16_is_hashed_by_its_bytes() -> None:
    numbers = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
    assert sha256_tensors({"": numbers}, lambda *_: "") == sha256_bytes(numbers.view(torch.int16).numpy().tobytes())


# -- locks and memory, also on other systems ---------------------------------------------------------------------------
HOLD = """
import sys
from vlprompt._files import lock
with open(sys.argv[1], "w") as file:
    lock(file.fileno())
    print("held", flush=True)
    sys.stdin.read()
"""


def test_another_process_cannot_take_a_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "held\n"
        with path.open("w") as file, pytest.raises(OSError):
            lock(file.fileno())
        child.kill()
    with path.open("w") as file:
        lock(file.fileno())


def test_locks_on_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    msvcrt = SimpleNamespace(LK_NBLCK=2, locking=lambda *words: calls.append(words))
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "msvcrt", msvcrt)
    monkeypatch.setitem(sys.modules, "fcntl", None)  # importing it fails
    spec = importlib.util.spec_from_file_location("files_on_windows", VLPROMPT / "_files.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with (tmp_path / "lock").open("w") as file:
        module.lock(file.fileno())
        assert calls == [(file.fileno(), 2, 1)]


POSIX_ONLY = {"fcntl", "grp", "posix", "pwd", "resource", "termios"}


def test_modules_of_posix_are_imported_behind_a_check_of_the_platform() -> None:
    for path in VLPROMPT.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & POSIX_ONLY, f"{path}:{node.lineno}"


def test_memory_is_plausible(monkeypatch: pytest.MonkeyPatch) -> None:
    for lacking in ("nothing", "/proc/meminfo", "sysconf"):
        if lacking == "/proc/meminfo":
            monkeypatch.setattr(_memory, "_TABLE", Path("/nothing"))
        if lacking == "sysconf":
            monkeypatch.delattr(os, "sysconf")
        assert 2**20 < _memory.free_memory() <= _memory.total_memory() < 2**50
    assert _memory.total_memory() == _memory.ASSUMED


# -- process groups ---------------------------------------------------------------------------------------------------
def test_one_process_alone() -> None:
    numbers = torch.tensor([1.0, 2.0])
    assert not _dist.in_group() and _dist.rank_and_size() == (0, 1)
    assert _dist.sum_over_processes(numbers) is numbers and numbers.tolist() == [1.0, 2.0]
    assert _dist.gathered("a") == ["a"] and _dist.first_process_says(True) and not _dist.first_process_says(False)


@pytest.mark.parametrize(
    ("local", "node", "main"), [("", "", True), ("0", "0", True), ("1", "0", False), ("0", "1", False)]
)
def test_the_main_process_is_the_first_of_the_first_machine(
    monkeypatch: pytest.MonkeyPatch, local: str, node: str, main: bool
) -> None:
    for name, value in (("LOCAL_RANK", local), ("NODE_RANK", node)):
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    assert _dist.is_main_process() is main


GROUP = """
import sys
import torch
import torch.distributed as dist
from vlprompt import _dist

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
assert _dist.in_group() and _dist.rank_and_size() == (rank, 2)
assert _dist.sum_over_processes(torch.tensor([rank + 1.0])).item() == 3
assert _dist.gathered(("rank", rank)) == [("rank", 0), ("rank", 1)]
assert [_dist.first_process_says(flag == rank) for flag in (0, 1)] == [True, False]
dist.destroy_process_group()
"""


def test_two_processes(tmp_path: Path) -> None:
    children = [
        subprocess.Popen([sys.executable, "-c", GROUP, str(rank), str(tmp_path / "rendezvous")]) for rank in range(2)
    ]
    assert [child.wait(timeout=120) for child in children] == [0, 0]


# -- seeds ------------------------------------------------------------------------------------------------------------
def test_derived_seeds_are_what_they_always_were() -> None:
    assert _random.derived_seed(1, 2, 3) == 8899725253796173630
    assert _random.hashed_number("1:2:3") >> 1 == 8899725253796173630


def test_draws_inside_leave_the_generator_as_it_was() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with _random.restored_random():
        torch.rand(7)
    with pytest.raises(KeyError), _random.seeded_random(5, torch.device("cpu")):
        drawn = torch.rand(4)
        raise KeyError
    assert torch.equal(torch.rand(4), expected)
    assert torch.equal(drawn, torch.rand(4, generator=torch.Generator().manual_seed(5)))


# -- nobody else does it ----------------------------------------------------------------------------------------------
ELSEWHERE = {
    "os.replace(": {"_files.py", "io/head.py", "datasets/acquire/download.py"},  # whole folders; a finished download
    "mkstemp(": set(),
    "NamedTemporaryFile(": set(),
    "os.fsync(": {"_files.py"},
    "hashlib.": {"_files.py", "_random.py"},
    "is_initialized(": {"_dist.py"},
    '"LOCAL_RANK"': {"_dist.py"},
    "fork_rng(": set(),
    "get_state(": {"_random.py"},
    "get_rng_state(": {"_random.py"},
    "fcntl.": {"_files.py"},
    "sysconf(": {"_memory.py"},
    'replace("_", " ")': {"prompts/words.py"},
    "FileLock": set(),
    "expanduser(": {"_files.py"},
    "lockf(": {"_files.py"},
    "flock(": {"_files.py"},
    "open_lock(": {"_files.py", "runs/folder.py"},
    "locked(": {
        "_files.py",
        "data/features.py",
        "data/eviction.py",
        "generation/bank.py",
        "datasets/acquire/download.py",
    },
}


@pytest.mark.parametrize("call", ELSEWHERE)
def test_nothing_is_written_twice(call: str) -> None:
    sources = [path for path in VLPROMPT.rglob("*.py") if call in path.read_text(encoding="utf-8")]
    assert {path.relative_to(VLPROMPT).as_posix() for path in sources} == ELSEWHERE[call]


#: Calls that untrusted texts must not reach otherwise, with the modules that make them: reading without a bound, JSON
#: with repeated keys, writing in place, and output with control characters. Packaged files and /proc are trusted.
CALLS = {
    "print": set(),
    "input": set(),
    "Console": {"_terminal.py", "cli/bank.py", "datasets/acquire/transfer.py"},  # progress bars
    "json.load": set(),
    "json.loads": {"_files.py"},
    "sys.stdout.write": set(),
    "sys.stderr.write": set(),
    "open": {"_files.py", "_lazy.py", "datasets/acquire/transfer.py", "datasets/acquire/unpack.py"},
    ".read_text": {"_memory.py", "engine/memory.py", "datasets/card.py", "meta/inspection.py"},
    ".read_bytes": set(),
    ".write_text": {"engine/memory.py", "generation/tiny.py", "io/head.py"},  # into a folder that is renamed
    ".write_bytes": {"_files.py", "engine/callbacks.py"},
    "torch.load": {"backbone/weights.py", "engine/callbacks.py", "io/statistics.py"},
    "torch.jit.load": {"backbone/weights.py"},
    "pickle.load": set(),
    "eval": set(),
    "exec": set(),
}


def _calls(path: Path) -> set[str]:
    """The names in :data:`CALLS` that a module calls."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            found |= {call for call in CALLS if name == call or (call[0] == "." and name.endswith(call))}
    return found


def test_untrusted_texts_and_files_pass_through_the_ground_modules() -> None:
    callers: dict[str, set[str]] = {call: set() for call in CALLS}
    for path in VLPROMPT.rglob("*.py"):
        for call in _calls(path):
            callers[call].add(path.relative_to(VLPROMPT).as_posix())
    assert callers == CALLS


def test_torch_files_are_read_as_tensors_only() -> None:
    for name in CALLS["torch.load"]:
        for node in ast.walk(ast.parse((VLPROMPT / name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert "weights_only=True" in ast.unparse(node)


# -- what is shown ----------------------------------------------------------------------------------------------------
HIDDEN = "".join(map(chr, (*range(9), *range(11, 32), *range(127, 160), 0x200E, 0x2028, 0x202E, 0x2066, 0xDC80)))


def test_nothing_shown_controls_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("name [/b]")
    table.add_row(f"[/b] :smile: {HIDDEN}")
    _terminal.show(f"a\tb\n{HIDDEN}")
    _terminal.show(HIDDEN, error=True)
    _terminal.show_json({HIDDEN: [HIDDEN, "a\tb"]})
    _terminal.show(_terminal.text_of(table))
    shown = capsys.readouterr()
    assert not set(shown.out + shown.err) & set(HIDDEN)
    assert "[/b] :smile:" in shown.out and "name [/b]" in shown.out
    assert json.loads("[" + shown.out.split("[", 1)[1].split("]", 1)[0] + "]") == [HIDDEN, "a\tb"]


@pytest.mark.parametrize(
    "lines", [["x" * 100_000], [f"line {n}" for n in range(1000)], ["y" * 3000] * 50, ["first", "z" * 99_999, "last"]]
)
def test_errors_fit_one_screen(lines: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    _terminal.show_problem("\n".join(lines))
    shown = capsys.readouterr().err.splitlines()
    assert sum(max(1, -(-len(line) // 200)) for line in shown) <= 24
    assert shown[0][:300] == lines[0][:300] and shown[-1][-100:] == lines[-1][-100:]
    assert len(lines) <= len(shown) or any("lines are left out" in line for line in shown)


def test_errors_of_one_screen_are_shown_whole(capsys: pytest.CaptureFixture[str]) -> None:
    text = "\n".join(f"  - problem {number}" for number in range(22))
    _terminal.show_problem(text)
    assert capsys.readouterr().err == text + "\n"
