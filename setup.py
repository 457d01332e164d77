"""Beside the packages (see pyproject.toml), a wheel holds the files that a project begins with: those in
`FILES`, which the package finds through `diffsynth_dagster/project.py`."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

FILES = (
    "recipes/examples/*/*.yaml",
    "recipes/accelerate/*.yaml",
    "workspace.yaml",
    "dagster_home/dagster.yaml",
)


class WithProjectFiles(build_py):
    """Copies the files into the package that is built; an editable install reads those of the checkout."""

    def run(self) -> None:
        """Called by setuptools."""
        super().run()
        if self.editable_mode:
            return
        root, folder = Path(__file__).parent, Path(self.build_lib, "diffsynth_dagster")
        for path in sorted(path for pattern in FILES for path in root.glob(pattern)):
            target = folder / "project_files" / path.relative_to(root)
            self.mkpath(str(target.parent))
            self.copy_file(str(path), str(target))


setup(cmdclass={"build_py": WithProjectFiles})
