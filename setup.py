"""Puts the data-set cards and the run configurations into the wheel; all else is in setup.cfg.

``datasets/`` and ``configs/`` stand at the top of a clone, where readers look for them, and must not become top-level
packages. A wheel carries them as ``vlprompt/assets/datasets`` and ``vlprompt/assets/configs``; an editable install
carries neither, because the clone's own folders are read then.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithCards(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for folder in ("configs", "datasets"):
            sources = sorted(Path(folder).rglob("*.yaml"))
            if not sources:
                raise SystemExit(f"{folder}/ holds no YAML file: build vlprompt from a complete clone or sdist")
            for source in sources:
                target = Path(self.build_lib, "vlprompt", "assets", source)
                self.mkpath(str(target.parent))
                self.copy_file(str(source), str(target))


setup(cmdclass={"build_py": BuildWithCards})
