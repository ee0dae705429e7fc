"""Execution of the trainings of a plan, and the check of its data sets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from vlprompt._dist import is_main_process
from vlprompt.config.run import DataConfig, RunConfig
from vlprompt.datasets import FewShotTask
from vlprompt.errors import ConfigError, DataError
from vlprompt.methods.registry import resolved_templates
from vlprompt.protocols.plan import Plan
from vlprompt.runs.run import Run, run_session
from vlprompt.runs.session import Session, load_task


class Runner:
    """Runs the trainings of a plan in sequence; finished runs and an unchanged backbone are reused.

    Args:
        seeds: The seeds of every training.
        force: Run everything again.
        report: Called after every run, in the first process.
    """

    def __init__(
        self, seeds: Sequence[int], *, force: bool = False, report: Callable[[Run], None] | None = None
    ) -> None:
        self.seeds, self.force, self.report = seeds, force, report
        self.last: Session | None = None

    def session(self, config: RunConfig) -> Session:
        """Return the session of ``config``, which reuses loaded objects of the previous session."""
        self.last = Session(config, after=self.last)
        return self.last

    def runs(self, config: RunConfig) -> list[Run]:
        """Run ``config`` with each seed."""
        return [self.run(replace(config, seed=seed)) for seed in self.seeds]

    def run(self, config: RunConfig) -> Run:
        """Run ``config``."""
        done = run_session(self.session(config), force=self.force)
        if self.report is not None and is_main_process():
            self.report(done)
        return done


Place = tuple[str, str | None]


def place(data: DataConfig) -> Place:
    """Return the name and root of a data set, which identify it in a plan."""
    return data.name, data.root


def check_data(plan: Plan) -> dict[Place, FewShotTask]:
    """Load every data set of ``plan`` once, before anything is trained, and return their tasks.

    Raises:
        DataError: Data sets are missing or cannot be used; the text lists all.
        ConfigError: Values are not accepted, or files of texts lack classes; the text lists all.
    """
    wanted: dict[Place, DataConfig] = {}
    for training in plan.trainings:
        for run in (training, *training.targets):
            wanted.setdefault(place(run.config.data), run.config.data)
    tasks, missing = {}, []
    for data in wanted.values():
        try:
            tasks[place(data)] = load_task(data, plan.seeds[0])
        except DataError as error:
            missing.append(f"{data.name}: {error}")
    if len(missing) == 1:
        raise DataError(f"nothing was run, because a data set cannot be used.\n{missing[0]}")
    if missing:
        # For several data sets: the problem and the searched folders; `data check` prints the full text.
        short = [" ".join(" ".join(text.splitlines()[:2]).split()) for text in missing]
        names = ", ".join(text.partition(":")[0] for text in missing)
        raise DataError(
            f"nothing was run, because {len(missing)} of {len(wanted)} data sets cannot be used ({names}):\n"
            + "\n".join(f"  {number}. {text}" for number, text in enumerate(short, 1))
            + "\n`vlprompt data check NAME` tells what to fetch and where to put it. Others: --datasets, --targets."
        )
    _check_texts([run.config for training in plan.trainings for run in (training, *training.targets)], tasks)
    return tasks


def _check_texts(configs: Iterable[RunConfig], tasks: Mapping[Place, FewShotTask]) -> None:
    """Raise ConfigError if templates or sentences of a configuration do not fit its data set."""
    problems: dict[str, str] = {}
    for config in configs:
        task = tasks[place(config.data)]
        try:
            resolved_templates(config.method, config.settings, config.objectives, task.texts, task.class_names)
        except ConfigError as error:
            problems.setdefault(f"{task.name}: {error}", task.name)
    if problems:
        names = ", ".join(dict.fromkeys(problems.values()))
        raise ConfigError("\n".join([f"nothing was run, because of the texts for {names}:", *problems]))
