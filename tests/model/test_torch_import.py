"""A quicker import of torch is the same torch to whoever needs what was postponed."""

import subprocess
import sys
from importlib import metadata

import pytest

from llmd.model import torch_import

pytestmark = pytest.mark.skipif(
    not metadata.version("torch").startswith(torch_import._KNOWN_RELEASE), reason="this torch is imported as it is"
)

PROGRAM = """
import gc, sys
from llmd.model.torch_import import finish_import, import_torch
import_torch()
assert gc.isenabled()
import torch
name = "torch._meta_registrations"
assert name not in sys.modules and not hasattr(torch, "_meta_registrations")
def table():
    with torch.device("meta"):
        return torch.nn.Embedding(3, 4)(torch.arange(2)).shape
try:
    table()
    raise AssertionError("nothing was postponed")
except NotImplementedError:
    pass
{then}
assert name in sys.modules and table() == (2, 4)
assert not finish_import()
"""


def run(then):
    subprocess.run([sys.executable, "-c", PROGRAM.format(then=then)], check=True, timeout=60)


def test_what_was_postponed_comes_when_it_is_asked_for():
    run("assert finish_import()")


def test_it_comes_with_the_modules_that_need_it():
    run("import accelerate" if _has("accelerate") else "import transformers")


def test_another_release_is_imported_as_it_is():
    program = """
import sys
from llmd.model import torch_import
torch_import._KNOWN_RELEASE = "1."
torch_import.import_torch()
import torch
assert "torch._meta_registrations" in sys.modules
assert not torch_import.finish_import()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def _has(module):
    from importlib.util import find_spec

    return find_spec(module) is not None
