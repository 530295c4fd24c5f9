"""What setup.cfg cannot say: the configs, searches and images in jobs/ are part of the wheel.

They exist once, in jobs/, where `ray job submit` uploads them from; a wheel holds them in jebm/shipped/.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("configs", "searches", "data")


class BuildWithShipped(build_py):
    """Builds the package, and copies what is shipped with it; an editable install reads jobs/ itself."""

    def run(self) -> None:
        """Build into build_lib."""
        super().run()
        if not self.editable_mode:
            for folder in SHIPPED:
                target = Path(self.build_lib, "jebm", "shipped", folder)
                shutil.rmtree(target, ignore_errors=True)
                shutil.copytree(Path("jobs", folder), target)


setup(cmdclass={"build_py": BuildWithShipped})
