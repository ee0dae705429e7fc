"""The command line: what each command calls and prints, exit codes, and one-screen errors without tracebacks."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import vlprompt
from tests.fixtures.stubs import Calls, stub
from vlprompt.cli.main import COMMANDS, main
from vlprompt.cli.parse import parse_run
from vlprompt.cli.run import eval_command, head_folder
from vlprompt.config.keys import to_yaml
from vlprompt.errors import DataError, HeadError
from vlprompt.methods import list_methods

ROOT = Path(__file__).parents[2]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Calls:
    """Stands in for what the commands call: notes name and arguments, returns small results."""
    noted: Calls = []
    folder = Path("runs/toy")
    run = types.SimpleNamespace(
        folder=folder,
        head_dir=folder / "head",
        table=lambda metrics: "the table",
        validation=dict,
        class_tables=[folder / "per_class.csv"],
    )
    predictions = [
        {
            "path": "a [b] :cat:.png",
            "classes": [{"name": "fox", "probability": 0.75}, {"name": "owl", "probability": 0.2}],
        }
    ]
    for module, name, result in (
        ("runs.run", "run", run),
        ("runs.run", "evaluate_head", {"accuracy": 87.5, "correct": 7, "total": 8}),
        ("runs.dry_run", "dry_run", "the shapes"),
        ("protocols.protocols", "run_plan", ({}, "the table")),
        ("runs.predict", "predict", predictions),
    ):
        stub(monkeypatch, f"vlprompt.{module}", name, result, noted)
    monkeypatch.chdir(tmp_path)
    return noted


def make_run(folder: Path, *, head: bool = True, **data: str) -> Path:
    """A run folder as training leaves it: config.yaml and, if finished, head/config.json."""
    config = parse_run(["--config", "mocoop/demo", *(f"--data.{key}={value}" for key, value in data.items())])
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    if head:
        (folder / "head").mkdir()
        (folder / "head" / "config.json").write_text("{}")
    return folder


# -- train ----------------------------------------------------------------------------------------------------------
def test_train_runs_the_configuration_and_says_where_things_are(
    calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--data.shots", "4", "--config", "mocoop/demo"]) == 0
    expected = parse_run(["--config", "mocoop/demo", "--data.shots", "4"])
    assert calls == [("run", (expected, {"force": False}))]
    assert capsys.readouterr().out == (
        "the table\nhead:       runs/toy/head\nby class:   runs/toy/per_class.csv\nrun folder: runs/toy\n"
    )


def test_train_force_is_handed_on(calls: Calls) -> None:
    assert main(["train", "--force", "--config", "mocoop/demo"]) == 0
    assert calls[0][1][-1] == {"force": True}


def test_train_print_config_prints_a_file_that_gives_the_same_run(
    calls: Calls, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["--config", "coop/demo", "--settings.context_length", "4", "--seed", "3"]
    assert main(["train", *words, "--print-config"]) == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert parse_run(["--config", "printed.yaml"]) == parse_run(words)
    assert not calls


def test_train_dry_run_prints_its_text_and_trains_nothing(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--config", "coop/demo", "--dry-run"]) == 0
    assert [name for name, _ in calls] == ["dry_run"] and capsys.readouterr().out == "the shapes\n"


def test_only_the_first_process_prints(
    calls: Calls, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("LOCAL_RANK", "1"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    assert main(["train", "--config", "coop/demo"]) == 0
    assert capsys.readouterr().out == "" and len(calls) == 1


def test_an_interrupted_training_ends_with_130_and_says_how_to_go_on(
    calls: Calls, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stub(monkeypatch, "vlprompt.runs.run", "run", KeyboardInterrupt())
    assert main(["train", "--config", "coop/demo"]) == 130
    assert capsys.readouterr().err == "vlprompt: stopped; the same command resumes it\n"


def test_a_terminated_training_ends_with_143(
    calls: Calls, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("vlprompt.cli.run.train_command", lambda words: os.kill(os.getpid(), signal.SIGTERM) or 0)
    assert main(["train", "--config", "coop/demo"]) == 143
    assert capsys.readouterr().err == "vlprompt: terminated; the same command resumes it\n"
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"LOCAL_RANK": "1"}, "has LOCAL_RANK=1, .*unset LOCAL_RANK$"),
        ({"RANK": "3", "NODE_RANK": "1"}, "has RANK=3, NODE_RANK=1, .*unset RANK NODE_RANK$"),
        ({"LOCAL_RANK": "abc"}, "LOCAL_RANK is 'abc' in the environment"),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "4"}, "Slurm started this command 4 times"),
    ],
)
def test_what_a_launcher_left_behind_is_named(
    given: dict[str, str], text: str, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert re.search(text, fails("train", "--config", "coop/demo").strip())


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "here"), "here: No space left on device. Free some space"),
        (PermissionError(errno.EACCES, "Permission denied", "here"), "here: Permission denied. Change the permissions"),
        (OSError(errno.EFBIG, "File too large", "here"), "ulimit -f"),
        (MemoryError(), "out of memory (an allocation failed). Use smaller batches"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "out of memory ("),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "--data.workers 0"),
        (RuntimeError("gloo/transport/tcp/pair.cc:545] Connection closed by peer [::1]:1"), "another process of this"),
    ],
)
def test_problems_of_the_machine_end_in_one_screen(
    error: Exception, text: str, calls: Calls, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stub(monkeypatch, "vlprompt.runs.run", "run", error)
    assert main(["train", "--config", "coop/demo"]) == 2
    printed = capsys.readouterr().err
    assert text in printed and "The same command resumes" in printed and len(printed.splitlines()) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="there is no such limit")
def test_a_small_address_space_is_named(
    calls: Calls, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda kind: (3 * 2**30, 3 * 2**30))
    assert main(["train", "--config", "coop/demo"]) == 0
    assert "note: `ulimit -v` limits the addresses of this process to 3.0 GiB" in capsys.readouterr().err
    stub(monkeypatch, "vlprompt.runs.run", "run", SystemError("error return without exception set"))
    assert main(["train", "--config", "coop/demo"]) == 2
    assert "error: out of memory (error return without exception set)" in capsys.readouterr().err


def test_an_error_on_purpose_is_printed_as_it_is_and_a_bug_shows_itself(
    calls: Calls, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stub(monkeypatch, "vlprompt.runs.run", "run", DataError("no images in 'here'"))
    assert main(["train", "--config", "coop/demo"]) == 2
    assert capsys.readouterr().err == "vlprompt: error: no images in 'here'\n"
    stub(monkeypatch, "vlprompt.runs.run", "run", ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        main(["train", "--config", "coop/demo"])


# -- base-to-new ----------------------------------------------------------------------------------------------------
def test_base_to_new_takes_several_configurations_and_seeds(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", "coop/demo", "--seeds", "4, 5", "--config", "mocoop/demo", "--recipe.epochs", "2"]
    assert main(["base-to-new", *words]) == 0
    ((name, (plan, options)),) = calls
    assert name == "run_plan" and (plan.name, plan.seeds) == ("base-to-new", (4, 5)) and options["force"] is False
    assert [(config.method, config.recipe.epochs) for config in plan.configs] == [("coop", 2), ("mocoop", 2)]
    assert {config.data.classes for config in plan.configs} == {"base"} and plan.datasets is None
    assert capsys.readouterr().out == "the table\n"
    options["report"](types.SimpleNamespace(folder="runs/one", selected=None))
    assert capsys.readouterr().out == "run folder: runs/one\n"
    options["report"](types.SimpleNamespace(folder="runs/one", selected={"epoch": 3}))
    assert capsys.readouterr().out.splitlines()[1:] == ["            kept is epoch 3 (recipe.select best_val)"]


def test_base_to_new_runs_three_seeds_by_default_and_without_a_file(calls: Calls) -> None:
    assert main(["base-to-new", "--method", "coop", "--force"]) == 0
    plan, options = calls[0][1]
    assert [config.method for config in plan.configs] == ["coop"] and plan.seeds == (1, 2, 3)
    assert options["force"] is True


def test_base_to_new_print_config_prints_every_configuration(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["base-to-new", "--config", "coop/demo", "--config", "zeroshot/demo", "--print-config"]) == 0
    first, second = capsys.readouterr().out.split("---\n")
    assert first.startswith("method: coop\n") and second.startswith("method: zeroshot\n") and not calls


def test_base_to_new_takes_data_sets(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["base-to-new", "--config", "coop/demo", "--config", "zeroshot/demo", "--datasets", "demo, dtd,Food-101"]
    assert main(words) == 0
    plan, _ = calls.pop()[1]
    on_each = [(method, name) for method in ("coop", "zeroshot") for name in ("demo", "dtd", "food101")]
    assert [(config.method, config.data.name) for config in plan.configs] == on_each
    capsys.readouterr()
    assert main([*words, "--print-config"]) == 0
    printed = [yaml.safe_load(text) for text in capsys.readouterr().out.split("---\n")]
    assert [(one["method"], one["data"]["name"]) for one in printed] == on_each


# -- domains --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("protocol", ["leave-one-out", "single-source"])
def test_domains_takes_a_protocol_configurations_and_seeds(
    protocol: str, calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--config", "coop/demo-styles", "--protocol", protocol, "--config", "mocoop/demo-styles"]
    assert main(["domains", *words, "--data.shots", "2", "--seeds", "4,5", "--force"]) == 0
    ((name, (plan, options)),) = calls
    assert (name, plan.name, plan.domains, plan.seeds) == ("run_plan", protocol, protocol, (4, 5)) and options["force"]
    assert [(one.config.method, one.config.data.shots) for group in plan.groups for one in group[:1]] == [
        *(("coop", 2), ("mocoop", 2))
    ]
    assert capsys.readouterr().out == "the table\n"
    options["report"](types.SimpleNamespace(folder="runs/one", selected=None))
    assert capsys.readouterr().out == "run folder: runs/one\n"
    options["report"](types.SimpleNamespace(folder="runs/one", selected={"epoch": 3}))
    assert capsys.readouterr().out.splitlines()[1:] == ["            kept is epoch 3 (recipe.select best_val)"]
    assert main(["domains", *words, "--print-config"]) == 0 and len(calls) == 1
    assert len(capsys.readouterr().out.split("---\n")) == 2 * 6


def test_domains_of_one_run_are_keys(calls: Calls) -> None:
    assert main(["train", "--config", "coop/demo", "--data.source", "[a, b]", "--data.target", '["c", c+noise]']) == 0
    data = calls[0][1][0].data
    assert (data.source, data.target) == (("a", "b"), ("c", "c+noise"))


# -- saved heads ----------------------------------------------------------------------------------------------------
def test_eval_uses_the_runs_own_data_with_overrides(
    calls: Calls, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    make_run(tmp_path / "run", shots="2")
    for place in ("run", "run/head"):
        words = ["eval", place, "--data.classes", "new", "--seed", "3", "--device", "cpu", "--workers", "2"]
        assert main([*words, "--backbone.precision", "bf16"]) == 0
        name, (head, data, seed, options) = calls.pop()
        assert options["trainer"].accelerator == "cpu" and options["backbone"] == {"precision": "bf16"}
        assert data.workers == 2
        assert name == "evaluate_head" and head == Path("run/head") and seed == 3
        assert (data.name, data.shots, data.classes) == ("demo", 2, "new")
        assert capsys.readouterr().out == "demo, new classes: 87.50 % (7/8 images)\n"


def test_eval_refuses_keys_of_the_training_and_names_a_seed_without_effect(
    calls: Calls, fails: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "run", shots="2")
    for key, value in (("data.shots", "4"), ("data.transform", "center"), ("data.sampler", "elevater-v1")):
        assert f"--{key} has no meaning for `vlprompt eval`" in fails("eval", "run", f"--{key}", value)
    scores = {"correct": 1, "total": 2, "accuracy": 50.0, "seed_draws": []}
    monkeypatch.setattr("vlprompt.runs.run.evaluate_head", lambda *_, **__: scores)
    with pytest.warns(UserWarning, match="seed 3: nothing is drawn at random"):
        eval_command(["run", "--seed", "3"])


def test_eval_of_a_head_alone_needs_the_name_of_the_data(
    calls: Calls, fails: Callable[..., str], tmp_path: Path
) -> None:
    make_run(tmp_path / "run")
    (tmp_path / "run" / "head").rename(tmp_path / "mine")
    assert "'mine' is a head without its run; say --data.name NAME" in fails("eval", "mine")
    assert main(["eval", "mine", "--data.name", "folder", "--data.root", "here"]) == 0
    data = calls[0][1][1]
    assert (data.name, data.root) == ("folder", "here")


def test_predict_prints_a_table_that_keeps_brackets_and_colons(
    calls: Calls, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    make_run(tmp_path / "run")
    words = ["predict", "run", "--top", "2", "a.png", "folder", "--device", "cpu", "--workers", "3"]
    assert main([*words, "--backbone.name", "local-dir:/models/mine"]) == 0
    options = {"device": "cpu", "workers": 3, "backbone": {"name": "local-dir:/models/mine"}}
    options |= {"orientation": None, "background": None, "scores": "probability", "unknown": None}
    assert calls == [("predict", (Path("run/head"), [Path("a.png"), Path("folder")], 2, options))]
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[1:] == [["a", "[b]", ":cat:.png", "fox", "75.0", "%"], ["owl", "20.0", "%"]]


def test_predict_json_is_json(calls: Calls, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    assert main(["predict", "run/head", "a.png", "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert entry["classes"][0] == {"name": "fox", "probability": 0.75} and calls[0][1][2] == 5


def test_an_unfinished_run_says_how_to_finish_it(fails: Callable[..., str], tmp_path: Path) -> None:
    make_run(tmp_path / "run", head=False)
    assert "Resume it with: vlprompt train --config run/config.yaml" in fails("predict", "run", "a.png")


def test_head_folder_takes_a_run_or_a_head(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert head_folder(str(run)) == head_folder(str(run / "head")) == run / "head"
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name, words in (
        ("file", "is a file"),
        ("empty", "holds neither"),
        ("none", "no such folder"),
        ("x" * 999, "no such"),
    ):
        with pytest.raises(HeadError, match=words):
            head_folder(str(tmp_path / name))


# -- lists and help -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["methods", "--names"], list_methods()),
        (["methods", "zeros*", "--names"], ["zeroshot"]),
        (["objectives", "know*", "--names"], ["knowledge"]),
        (["decompositions", "--names"], ["dept_lowrank", "ept"]),
        (["protocols", "*shot"], ["few-shot"]),
        (["datasets", "caltech*"], ["caltech101"]),
        (["backbones", "demo"], ["demo"]),
    ],
)
def test_list_prints_names_one_per_line(
    words: list[str], expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["list", *words]) == 0
    assert capsys.readouterr().out.splitlines() == expected


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_that_begins_with_its_use(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    for word in ("--help", "-h"):
        assert main([command, word]) == 0
        out = capsys.readouterr().out
        assert out.startswith(f"vlprompt {command} ") and max(map(len, out.splitlines())) <= 140


def test_the_help_of_train_lists_keys_and_the_settings_of_the_named_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    assert "--data.shots " in out and "--settings.*" in out and "--settings.context_length" not in out
    assert main(["train", "--method", "coop", "--help"]) == 0
    assert "--settings.context_length " in capsys.readouterr().out


def test_overview_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {command} " in out for command in COMMANDS)
    assert main([]) == 2 and capsys.readouterr().out == out
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"vlprompt {vlprompt.__version__}\n"


# -- malformed command lines ----------------------------------------------------------------------------------------
BAD_COMMANDS = {
    "unknown command": ("trian", ["there is no command 'trian'. Did you mean 'train'"]),
    "option before the command": ("--config coop/demo train", ["a command comes first, not '--config'"]),
    "train without anything": ("train", ["no --config FILE; for a first run: --config mocoop/demo"]),
    "train with a bad option": ("train --config coop/demo --forse", ["no key '--forse'. Did you mean '--force'"]),
    "train with a value for a flag": ("train --config coop/demo --dry-run=no", ["--dry-run takes no value", "'no'"]),
    "train with an unknown file": ("train --config coop/dmo", ["--config 'coop/dmo'", "Did you mean coop/demo"]),
    "train with another method's setting": (
        "train --config mocoop/demo --method coop",
        ["there is no key 'settings.templates'"],
    ),
    "train with a bad setting": ("train --config mocoop/demo --settings.top_k 9", ["settings.top_k is 9", "1 to 5"]),
    "train with groups that do not add up": (
        "train --config mocoop/demo --settings.groups [1,2]",
        ["command line", "[1, 2] adds up to 3"],
    ),
    "seeds that are words": ("base-to-new --config coop/demo --seeds one", ["--seeds is 'one'", "such as 1,2,3"]),
    "an empty seed": ("base-to-new --config coop/demo --seeds 1,,3", ["--seeds is '1,,3'"]),
    "a negative seed": ("base-to-new --config coop/demo --seeds=-1", ["--seeds is '-1'"]),
    "a seed too large": ("base-to-new --config coop/demo --seeds 4294967296", ["--seeds is '4294967296'"]),
    "a seed twice": ("base-to-new --config coop/demo --seeds 1,1", ["names a seed twice"]),
    "seeds without a value": ("base-to-new --config coop/demo --seeds", ["--seeds has no value"]),
    "seed beside seeds": ("base-to-new --config coop/demo --seed 2", ["--seed has no meaning", "--seeds says which"]),
    "classes for both": ("base-to-new --config coop/demo --data.classes new", ["--data.classes has no meaning"]),
    "one of two files unknown": ("base-to-new --config coop/demo --config coop/dmo", ["--config 'coop/dmo'"]),
    "an unknown data set": (
        "base-to-new --config coop/demo --datasets demo,dtt",
        ["command line: --datasets: 'dtt' is no data set. Did you mean 'dtd'"],
    ),
    "a data set twice": ("base-to-new --config coop/demo --datasets dtd,demo,dtd", ["datasets: 'dtd' is named twice"]),
    "an empty data set": ("base-to-new --config coop/demo --datasets demo,", ["datasets: '' is no data set. Accept"]),
    "data sets and a data set": (
        "base-to-new --config coop/demo --datasets demo --data.name dtd",
        ["--data.name has no meaning", "--datasets says which"],
    ),
    "data sets without a value": ("base-to-new --config coop/demo --datasets", ["--datasets has no value"]),
    "domains without a protocol": (
        "domains --config coop/demo",
        ["command line: --protocol is ''; accepted: leave-one-out or single-source"],
    ),
    "domains with a misspelled protocol": (
        "domains --config coop/demo --protocol leave-out",
        ["--protocol is 'leave-out'; accepted: leave-one-out or", "Did you mean 'leave-one-out'"],
    ),
    "domains without anything": ("domains", ["no --config FILE", "--protocol is ''"]),
    "domains with data sets": ("domains --config coop/demo --datasets demo", ["no key '--datasets'"]),
    "what the protocol sets": (
        "domains --config coop/demo --protocol single-source --data.source [a] --data.target [b] --seed 1",
        ["--data.source has no meaning for `vlprompt domains`: the protocol", "--data.target has no", "--seed has no"],
    ),
    "domains of base classes": (
        "domains --config coop/demo --protocol single-source --data.classes base",
        ["--data.classes has no meaning", "all classes are run"],
    ),
    "domains that are no list": ("train --config coop/demo --data.source a", ["--data.source is 'a'", "a list, each"]),
    "eval of nothing": ("eval", ["eval takes one RUN folder, got 0"]),
    "eval of two": ("eval a b", ["eval takes one RUN folder, got 2"]),
    "eval of a folder that is not there": ("eval nowhere", ["RUN 'nowhere': there is no such folder"]),
    "eval with a configuration": ("eval nowhere --config coop/demo", ["--config has no meaning"]),
    "eval with a recipe": ("eval nowhere --recipe.lr 1", ["'--recipe.lr' is not an option of `vlprompt eval`"]),
    "eval with bad classes": ("eval nowhere --data.classes old", ["--data.classes is 'old'", "'all', 'base' or 'new'"]),
    "predict nothing": ("predict", ["missing RUN and IMAGE"]),
    "predict without images": ("predict .", ["missing IMAGE", "RUN '.' holds neither"]),
    "top zero": ("predict . a.png --top 0", ["--top is '0'; accepted: a whole number of classes, 1 or more"]),
    "top text": ("predict . a.png --top many", ["--top is 'many'"]),
    "top without a value": ("predict . a.png --top", ["--top has no value"]),
    "predict with an override": ("predict . a.png --tap 3", ["'--tap' is not an option", "Did you mean '--top'"]),
    "predict with a configuration": ("predict . a.png --config x", ["'--config' is not an option"]),
    "list nothing": ("list", ["list what? Accepted: methods, objectives, decompositions, datasets"]),
    "list something else": ("list metods", ["there is no list 'metods'. Did you mean 'methods'"]),
    "list without a match": ("list methods *mocop*", ["none of the methods matches '*mocop*'. Did you mean 'mocoop'"]),
    "list with words expanded by the shell": ("list methods coop.py data", ["'data' is one word too many"]),
    "list with an option": ("list methods --all", ["'--all' is not an option of `vlprompt list`."]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_COMMANDS)
def test_a_malformed_command_names_the_culprit(case: str, fails: Callable[..., str], tmp_path: Path) -> None:
    command, culprits = BAD_COMMANDS[case]
    err = fails(*command.split())
    assert all(culprit in err for culprit in culprits), err
    assert not list(tmp_path.iterdir())


def test_problems_of_the_form_and_of_the_values_come_together(fails: Callable[..., str]) -> None:
    err = fails(
        "base-to-new", "--config", "coop/demo", "--seeds", "x", "--data.shots", "y", "word", "--recipe.lr", "-1"
    )
    assert err.startswith("vlprompt: error: 4 problems:\n")
    for culprit in ("--seeds is 'x'", "--data.shots is 'y'", "'word' has no key", "--recipe.lr is '-1'"):
        assert err.count(culprit) == 1


# -- as a user types it ---------------------------------------------------------------------------------------------
def as_typed(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run Python on ``words`` elsewhere, without an installed vlprompt on its path."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )


def test_the_door_of_training_works_from_any_folder_without_a_traceback(tmp_path: Path) -> None:
    words = ("--config", "configs/mocoop/demo.yaml", "--data.shot", "4", "--recipe.lr", "fast")
    done = as_typed(str(ROOT / "tools" / "train.py"), *words, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("vlprompt: error: 2 problems:\n") and "Traceback" not in done.stderr
    assert "'--data.shots'" in done.stderr and "--recipe.lr is 'fast'" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("file", "name"), [("base_to_new.py", "base-to-new"), ("domains.py", "domains")])
def test_the_door_of_a_protocol_and_the_module_give_the_same_command(file: str, name: str, tmp_path: Path) -> None:
    door = as_typed(str(ROOT / "tools" / file), "--help", cwd=tmp_path)
    module = as_typed("-m", "vlprompt", name, "--help", cwd=ROOT)
    assert door.returncode == module.returncode == 0 and door.stderr == module.stderr == ""
    assert door.stdout == module.stdout and door.stdout.startswith(f"vlprompt {name} ")


def test_help_loads_no_heavy_package(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from vlprompt.cli.main import main; "
        "main(['train', '--help']); "
        "print({'torch', 'pytorch_lightning', 'open_clip', 'rich'} & set(sys.modules))"
    )
    done = as_typed("-c", code, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    *text, loaded = done.stdout.splitlines()
    assert loaded == "set()" and len(text) > 30
