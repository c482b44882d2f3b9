"""Distributions made in a folder: a module, its dist-info and entry points, as an installed wheel leaves them."""

import sys
import textwrap
from pathlib import Path


class Wheels:
    """Installs fake wheels into a folder on sys.path and takes them away again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._modules: set[str] = set()

    def add(self, distribution: str, source: str, *, name: str | None = None, version: str = "1.0") -> str:
        """One wheel with one plugin; the plugin's name."""
        module = distribution.replace("-", "_")
        name = name or f"{distribution}.main"
        (self.folder / f"{module}.py").write_text(textwrap.dedent(source))
        info = self.folder / f"{module}-{version}.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        points = info / "entry_points.txt"
        points.write_text(f"[llmd.plugins]\n{name} = {module}\n")
        self._modules.add(module)
        return name

    def forget(self) -> None:
        """Leave no module behind that the next test could find."""
        for module in self._modules:
            sys.modules.pop(module, None)


SPEC_OF_A_SAMPLER = """
    from llmd.api.v1 import SamplerSpec, hookimpl

    @hookimpl
    def llmd_register_samplers():
        return [SamplerSpec(name="{name}", summary="for tests", build=lambda context: None)]
"""


def sampler(name: str) -> str:
    """The source of a plugin that provides one sampler."""
    return SPEC_OF_A_SAMPLER.format(name=name)
