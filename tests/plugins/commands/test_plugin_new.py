"""`llmd plugin new`: each kind is a whole distribution whose own tests pass, as it comes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from llmd_plugins.commands.plugin.command import plugin_group
from llmd_plugins.commands.plugin.skeleton import KINDS, NOT_YET

MAX_LINES_OF_A_QUANTIZER = 40


def new(*arguments):
    return CliRunner().invoke(plugin_group, ["new", *map(str, arguments)])


def install(folder: Path, site: Path) -> None:
    """What an editable install leaves on the path: the package and the entry points."""
    import tomllib

    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    ((name, module),) = project["entry-points"]["llmd.plugins"].items()
    info = site / f"{module}-{project['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    (info / "entry_points.txt").write_text(f"[llmd.plugins]\n{name} = {module}\n")
    (site / module).symlink_to(folder / module)


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    """Every kind, written and installed beside each other: (folder, environment)."""
    folder = tmp_path_factory.mktemp("skeletons")
    for kind in KINDS:
        result = new(kind, f"acme-{kind}", "--into", folder / kind)
        assert result.exit_code == 0, result.output
        install(folder / kind, folder / "site")
    path = os.pathsep.join([str(folder / "site"), os.environ.get("PYTHONPATH", "")])
    return folder, os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def test_all_load(generated):
    _, env = generated
    run = subprocess.run([sys.executable, "-m", "llmd", "plugins"], env=env, capture_output=True, text=True, check=True)
    rows = [line for line in run.stdout.splitlines() if line.startswith("acme.")]
    assert len(rows) == len(KINDS)
    assert all(" loaded " in row for row in rows), run.stdout


def test_own_tests_pass(generated):
    folder, env = generated
    tests = [str(file) for file in sorted(folder.glob("*/tests/test_*.py"))]
    assert len(tests) == len(KINDS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(folder), *tests]
    run = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=170, check=False)
    assert run.returncode == 0, run.stdout[-6000:]


@pytest.mark.parametrize("kind", KINDS)
def test_is_whole_and_names_no_placeholder(generated, kind):
    folder = generated[0] / kind
    module = f"acme_{kind.replace('-', '_')}"
    names = {
        str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file() and "__pycache__" not in str(file)
    }
    wanted = {
        "pyproject.toml",
        "README.md",
        ".github/workflows/test.yaml",
        f"{module}/__init__.py",
        f"tests/test_{module}.py",
    }
    assert wanted <= names
    for name in names:
        text = (folder / name).read_text()
        assert "zeta" not in text.lower(), name
        assert "0.0.1" not in text, name


def test_entry_modules_import_nothing_heavy(generated):
    _, env = generated
    modules = ", ".join(f"acme_{kind.replace('-', '_')}" for kind in KINDS)
    program = f"import sys, {modules}; print('torch' in sys.modules, 'aiohttp' in sys.modules, 'numpy' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False"] * 3


def test_quantizer_is_short(generated):
    sources = (generated[0] / "quantization" / "acme_quantization").glob("*.py")
    lines = [line for source in sources for line in source.read_text().splitlines() if line.strip()]
    assert len(lines) <= MAX_LINES_OF_A_QUANTIZER, f"{len(lines)} lines"


@pytest.mark.parametrize("kind", sorted(NOT_YET))
def test_kinds_that_nothing_asks_for_are_refused(kind, tmp_path):
    result = new(kind, "acme-x", "--into", tmp_path / "x")
    assert result.exit_code == 2
    assert NOT_YET[kind] in result.output
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("kind", "name", "told"),
    [
        ("tensor", "acme-x", "'tensor' is not known; allowed: architecture, quantization"),
        ("route", "Acme", "cannot be the name of a distribution"),
        ("route", "acme--x", "cannot be the name of a distribution"),
        ("route", "../x", "cannot be the name of a distribution"),
        ("route", "x" * 61, "cannot be the name of a distribution"),
        ("route", "class", "is taken by Python"),
        ("route", "json", "is taken by Python"),
        ("route", "llmd-x", "is taken by Python or by llmd"),
    ],
)
def test_bad_arguments(kind, name, told, tmp_path):
    result = new(kind, name, "--into", tmp_path / "x")
    assert result.exit_code == 2
    assert told in " ".join(result.output.split())
    assert not (tmp_path / "x").exists()


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "mine.py").write_text("1")
    result = new("route", "acme-x", "--into", tmp_path)
    assert result.exit_code == 2
    assert [file.name for file in tmp_path.iterdir()] == ["mine.py"]
