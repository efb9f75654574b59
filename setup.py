"""Bundles the op library into wheels that are built where TVM and g++ are (`python -m build --no-isolation`).

Everything else is in pyproject.toml. Without them the wheel carries the library's sources, and the library is
built once per machine when it is first needed.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

LIBRARY = Path("isofold", "runtimes", "onnx", "oplib", "lib", "libisofold_ops.so")


class BuildWithLibrary(build_py):
    """`build_py` that also builds the op library into the package."""

    def run(self) -> None:
        super().run()
        if self.editable_mode or importlib.util.find_spec("tvm") is None:
            return
        build = Path(self.build_lib).absolute()
        target = build / LIBRARY
        target.parent.mkdir(parents=True, exist_ok=True)
        code = "import sys; from pathlib import Path; from isofold.runtimes.onnx.oplib.build import build; "
        code += "build(out=Path(sys.argv[1]))"
        # The copy just made is imported, not an installed one; the kernels' sources are next to it.
        subprocess.run([sys.executable, "-c", code, str(target)], check=True, cwd=build)


class PlatformWheel(bdist_wheel):
    """A wheel with the library inside is for this platform, for any Python 3."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = importlib.util.find_spec("tvm") is None

    def get_tag(self) -> tuple[str, str, str]:
        tags = super().get_tag()
        return tags if self.root_is_pure else ("py3", "none", tags[2])


setup(cmdclass={"build_py": BuildWithLibrary, "bdist_wheel": PlatformWheel})
