"""What protocols check and run: the data sets that are needed, and the trainings, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from vlprompt._dist import is_main_process
from vlprompt.config.run import DataConfig, RunConfig
from vlprompt.datasets import FewShotTask
from vlprompt.errors import DataError
from vlprompt.runs.run import Run, run_session
from vlprompt.runs.session import Session, load_task


class Runner:
    """Runs configurations one after the other; finished runs are reused, and so is a backbone that stays the same.

    Args:
        force: Run everything again.
        report: Called after every run, in the first process.
    """

    def __init__(self, *, force: bool = False, report: Callable[[Run], None] | None = None) -> None:
        self.force, self.report = force, report
        self.last: Session | None = None

    def seeds(self, config: RunConfig, seeds: Sequence[int]) -> list[Run]:
        """Run ``config`` with each seed."""
        return [self.run(replace(config, seed=seed)) for seed in seeds]

    def run(self, config: RunConfig) -> Run:
        """Run ``config``."""
        self.last = Session(config, after=self.last)
        done = run_session(self.last, force=self.force)
        if self.report is not None and is_main_process():
            self.report(done)
        return done


def load_all(wanted: Sequence[DataConfig], seed: int) -> list[FewShotTask]:
    """Return the task of each of ``wanted``.

    Raises:
        DataError: Data sets that are missing or cannot be used; all of them are named.
        ConfigError: Values that are not accepted.
    """
    tasks, missing = [], []
    for data in wanted:
        try:
            tasks.append(load_task(data, seed))
        except DataError as error:
            missing.append(f"{data.name}: {error}")
    if len(missing) == 1:
        raise DataError(f"nothing was run, because a data set cannot be used.\n{missing[0]}")
    if missing:
        # Of many, what is wrong and where it was looked for; how to get one is said when it is asked for alone.
        short = [" ".join(" ".join(text.splitlines()[:2]).split()) for text in missing]
        names = ", ".join(text.partition(":")[0] for text in missing)
        raise DataError(
            f"nothing was run, because {len(missing)} of {len(wanted)} data sets cannot be used ({names}):\n"
            + "\n".join(f"  {number}. {text}" for number, text in enumerate(short, 1))
            + "\n`vlprompt data check NAME` tells what to fetch and where to put it. Others: --datasets, --targets."
        )
    return tasks
