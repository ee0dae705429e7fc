"""``vlprompt meta-train``: learn a prompt initialisation and a gradient regulator across tasks from captions."""

from __future__ import annotations

from pathlib import Path

from vlprompt._terminal import show
from vlprompt.cli.parse import COMMAND_LINE, CommandLine, check_config, key_table, read_command_line, refuse
from vlprompt.cli.protocols import metrics_of, numbers, print_run, say, sources_of
from vlprompt.config.keys import to_yaml

FLAGS = ("print-config", "inspect", "force")
META_HELP = """\
vlprompt meta-train --config FILE [--a.b VALUE ...] [--inspect] [--print-config] [--force]

GRAM-R, a reconstruction of GRAM (arXiv 2303.06571): image-caption pairs are clustered into topics and visual domains,
and a method's initialisation is learned over tasks drawn from them, together with a function that regulates its
gradients. The same command resumes an unfinished training. Any training can use the result:
  vlprompt train ... --init_from gram:FOLDER    the initialisation and the regulator of prompt gradients
  vlprompt train ... --init_from FOLDER         only the initialisation

  --config FILE     a path, or a file of vlprompt such as gram/coop-demo; several: later files win
  --a.b VALUE       overrides a key of the files, in any position
  --inspect         write an HTML page of topics, domains and tasks with thumbnails, print its path and stop
  --print-config    print the resolved configuration and stop
  --force           train again even if the run is finished; the earlier run is moved to FOLDER.old-1

Example: vlprompt meta-train --config gram/coop-demo
"""
META_EVAL_HELP = """\
vlprompt meta-eval RUN [RUN2 ...] --config FILE [--config FILE2 ...] [--shots 1,2,4] [--seeds 1,2,3,4,5]
                   [--metrics A,B] [--a.b VALUE ...] [--force]

Compares initialisations: trains each configuration on a few images of the base classes from its default initialisation,
from that of its RUN, and from that of its RUN with the regulator, and prints base and new accuracy and their harmonic
mean, together with zero-shot and with standard errors over the seeds.

  RUN               the folder of a meta-training, one for each --config, in the same order
  --config FILE     a training of the same method and settings, such as coop/demo
  --shots, --seeds  numbers of training images per class (default 1,2,4) and seeds (default 1,2,3,4,5)
  --metrics A,B     show these metrics, a table each: accuracy, mean_per_class, top5, ece, precision, recall, f1; with
                    several labels per image: map, map_11point, cp, cr, cf1, of1
  --a.b VALUE       overrides a key in all configurations
  --force           train finished runs again; the earlier ones are moved to FOLDER.old-1

Example: vlprompt meta-eval runs/gram/coop-demo-pairs-unseen --config coop/demo --shots 1 --seeds 1,2
"""


def meta_keys_help(words: list[str]) -> str:
    """Return every key with its default."""
    from vlprompt.config.meta import MetaRunConfig

    return f"\nKeys, defaults and what they accept:\n{key_table(root=MetaRunConfig)}\n"


def meta_train_command(words: list[str]) -> int:
    """Run ``vlprompt meta-train`` and return its exit status."""
    from vlprompt.config.meta import MetaRunConfig

    line = read_command_line(words, "meta-train", flags=FLAGS)
    _need_config(line)
    config, problems = check_config(line, MetaRunConfig)
    if config is None or problems:
        refuse(problems, "meta-train")
    if "print-config" in line.flags:
        show(to_yaml(config), end="")
        return 0
    from vlprompt.runs.meta_run import inspect, meta_train

    if "inspect" in line.flags:
        show(str(inspect(config)))
        return 0
    folder, results = meta_train(config, force="force" in line.flags)
    last, train = results["last"], results["train"]
    say(
        f"{config.method} meta-trained on {results['pairs']:,} pairs, {results['tasks']}\n"
        f"last losses: support {last['train/support']:.3f}, query {last['train/query']:.3f}; {train['seconds']:.0f} s\n"
        f"train with:  --init_from gram:{folder}   (initialisation and regulator)\n"
        f"        or:  --init_from {folder}        (the initialisation alone)"
    )
    return 0


def meta_eval_command(words: list[str]) -> int:
    """Run ``vlprompt meta-eval`` and return its exit status."""
    line = read_command_line(words, "meta-eval", flags=("force",), options=("shots", "seeds", "metrics"), operands=True)
    shots, seeds = numbers(line, "shots") or [1, 2, 4], numbers(line, "seeds") or [1, 2, 3, 4, 5]
    if len(line.operands) != len(line.configs):
        line.problems.append(
            f"{COMMAND_LINE}: meta-eval takes one RUN for each --config; got {len(line.operands)} and "
            f"{len(line.configs)}"
        )
    init_reason = "meta-eval says which"
    fixed = {
        "seed": "--seeds says which",
        "data.shots": "--shots says how many",
        "data.classes": "base and new are tested",
    }
    configs = sources_of(line, fixed | {"init_from": init_reason})
    from vlprompt.protocols.meta_compare import compare_starts

    runs = list(zip(configs, map(Path, line.operands), strict=True))
    _, table = compare_starts(
        runs, shots, seeds, metrics=metrics_of(line), force="force" in line.flags, report=print_run
    )
    say(table)
    return 0


def _need_config(line: CommandLine) -> None:
    if not line.configs and "method" not in line.overrides:
        line.problems.append(f"{COMMAND_LINE}: no --config FILE; for a first run: --config gram/coop-demo")
