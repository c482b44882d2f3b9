"""The examples of the authors' guide: each is loaded alone and held to the contract."""

import re
from pathlib import Path

import pytest

from llmd.api.v1.testing import check_plugin

GUIDE = Path(__file__).parents[2] / "plugins" / "README.md"
EXAMPLES = dict(re.findall(r"^### ([^\n]+)\n\n```python\n(.*?)^```$", GUIDE.read_text(), re.MULTILINE | re.DOTALL))
MAX_LINES = 40


def test_there_are_examples():
    assert len(EXAMPLES) >= 14


@pytest.mark.parametrize("title", EXAMPLES)
def test_example(title, wheels):
    source = EXAMPLES[title]
    assert sum(bool(line.strip()) for line in source.splitlines()) <= MAX_LINES
    wheels.add("acme-guide", source, name="acme.guide")
    verdict = check_plugin("acme-guide")
    assert verdict.is_good, [finding for finding in verdict.findings if finding.result == "failed"]
    assert len(verdict.findings) > 1
