"""Who may import whom, read from the sources, and what stays unloaded, seen in a fresh process."""

import ast
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

LEAVES = {
    "llmd._version",
    "llmd.credentials",
    "llmd.listeners",
    "llmd.errors",
    "llmd.config",
    "llmd.config_diff",
    "llmd.config_keys",
    "llmd.config_load",
    "llmd.config_messages",
    "llmd.config_text",
    "llmd.config_toml",
    "llmd.flags",
    "llmd.flags_help",
    "llmd.flags_table",
    "llmd.log",
    "llmd.metrics",
    "llmd.metrics_tables",
    "llmd.journald",
    "llmd.sdnotify",
    "llmd.state",
    "llmd.sentence_files",
}
EVERYTHING = {"llmd"}

# package or module → what it may import of ours (prefixes), besides itself and the leaves
OURS = {
    "llmd.engine": set(),
    "llmd.text": {"llmd.engine.params", "llmd.engine.request", "llmd.engine.step"},
    "llmd.model": {"llmd.engine.params", "llmd.engine.step", "llmd.engine.executor", "llmd_kernels"},
    "llmd.server": {"llmd.engine.params", "llmd.engine.request", "llmd.engine.engine", "llmd.text"},
    "llmd.plugin": set(),
    "llmd.api": set(),
    "llmd.api.v1.testing": EVERYTHING,
    "llmd_kernels": None,  # nothing at all, not even the leaves
    "llmd_plugins": {"llmd.api.v1", "llmd_kernels"},
    "llmd.daemon": EVERYTHING,
    "llmd.lifecycle": EVERYTHING,
    "llmd.crash": EVERYTHING,
    "llmd.plugin_guards": EVERYTHING,
    "llmd.plugin_costs": {"llmd.errors"},
    "llmd.precompile": EVERYTHING,
    "llmd.replay": EVERYTHING,
    "llmd.loading": EVERYTHING,
    "llmd.sites": EVERYTHING,
    "llmd.status": EVERYTHING,
    "llmd.reload": EVERYTHING,
    "llmd.guard": EVERYTHING,
    "llmd.checks": EVERYTHING,
    "llmd.checks_adapters": EVERYTHING,
    "llmd.devices": EVERYTHING,
    "llmd.plan": EVERYTHING,
    "llmd.plan_advice": EVERYTHING,
    "llmd.folders": EVERYTHING,
    "llmd.cli": EVERYTHING,
    "llmd.offline": EVERYTHING,
    "llmd.__main__": EVERYTHING,
    "llmd.__init__": EVERYTHING,
}

# beyond the table: the server describes its routes by specs and is handed the parts of a model; a request's constraint is
# compiled where its text is known; what an attention backend is asked stands beside its protocol; the roofline is one
# formula for what is planned and for what is measured
ALSO = {
    "llmd.text": {"llmd.engine.grammar"},
    "llmd.server": {"llmd.plugin.specs", "llmd.engine.executor", "llmd.engine.step", "llmd.engine.queue"},
    "llmd.plugin": {"llmd.model.attention"},
    "llmd.model": {"llmd.engine.roofline"},
}

# package → what it may import of others, the standard library aside
OTHERS = {
    "llmd_kernels": {"torch", "triton"},
    "llmd.errors": set(),
    "llmd.config": {"pydantic"},
    "llmd.engine": {"numpy"},
    "llmd.text": {"tokenizers", "transformers", "jinja2", "numpy", "orjson"},
    "llmd.model": {"torch", "safetensors", "numpy", "triton"},
    "llmd.server": {"aiohttp", "orjson", "multidict", "pydantic"},
    "llmd.plugin": {"pluggy"},
}


def modules(root, package):
    """Dotted name → file, of every module of a package."""
    for file in sorted((ROOT / root / package.replace(".", "/")).rglob("*.py")):
        parts = file.relative_to(ROOT / root).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts), file


def is_for_types(node, parents):
    """Whether an import stands under `if TYPE_CHECKING`."""
    while (node := parents.get(node)) is not None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return True
    return False


def imports(file, module, *, types_too):
    """Absolute names of what a file imports."""
    tree = ast.parse(file.read_text())
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if not types_too and is_for_types(node, parents):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module if file.name == "__init__.py" else module.rpartition(".")[0]
                base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1] + ([base] if base else []))
            yield base
            if base in ("llmd", "llmd_plugins", "llmd.api", "llmd.engine", "llmd.text", "llmd.model", "llmd.server"):
                yield from (f"{base}.{alias.name}" for alias in node.names if f"{base}.{alias.name}" in ALL)


ALL = {
    name: file
    for root, package in ((".", "llmd"), ("plugins", "llmd_plugins"), ("kernels", "llmd_kernels"))
    for name, file in modules(root, package)
}


def owner(module):
    """The row of the table that a module belongs to."""
    rows = [row for row in OURS if module == row or module.startswith(f"{row}.")]
    return max(rows, key=len, default=None)


def under(name, prefixes):
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


@pytest.mark.parametrize("module", sorted(ALL))
def test_imports_of_ours(module):
    row = owner(module)
    if module in LEAVES or module == "llmd":
        allowed, row = LEAVES | ({"llmd"} if module == "llmd" else set()), module
    else:
        assert row is not None, f"{module} has no row in the table"
        allowed = set() if OURS[row] is None else OURS[row] | LEAVES | ALSO.get(row, set())
    if row == "llmd_plugins":  # a plugin may use its own folder, not another plugin
        allowed = OURS["llmd_plugins"] | {".".join(module.split(".")[:2]), ".".join(module.split(".")[:3])}
        allowed -= {"llmd_plugins"}
    types_too = row in ("llmd_plugins", "llmd_kernels")
    for name in imports(ALL[module], module, types_too=types_too):
        if name.split(".")[0] in ("llmd", "llmd_plugins", "llmd_kernels") and name != "llmd":
            own = row if row not in (None, "llmd_plugins") else module
            assert under(name, allowed | {own}), f"{module} imports {name}"


@pytest.mark.parametrize("module", sorted(name for name in ALL if any(under(name, [row]) for row in OTHERS)))
def test_imports_of_others(module):
    row = max((row for row in OTHERS if under(module, [row])), key=len)
    for name in imports(ALL[module], module, types_too=False):
        first = name.split(".")[0]
        if first not in sys.stdlib_module_names and first not in ("llmd", "llmd_kernels", "__future__"):
            assert first in OTHERS[row], f"{module} imports {name}"


HEAVY = ("numpy", "torch", "aiohttp", "transformers", "tokenizers", "triton", "huggingface_hub", "safetensors")


def loaded_after(program):
    """Which heavy packages a fresh process has loaded after a program."""
    program += f"\nimport sys; print(' '.join(name for name in {HEAVY} if name in sys.modules))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_importing_the_engine_loads_nothing_heavy():
    names = [name for name in ALL if name == "llmd.engine" or name.startswith("llmd.engine.")]
    assert loaded_after("".join(f"import {name}\n" for name in names)) <= {"numpy"}


def test_importing_llmd_loads_nothing_heavy():
    assert loaded_after("import llmd, llmd.api.v1") == set()


def test_loading_every_plugin_loads_nothing_heavy():
    program = "from llmd.plugin.catalog import build_catalog\nfrom llmd.config import PluginsConfig\n"
    program += "build_catalog(PluginsConfig(autoload=False))"
    assert loaded_after(program) == set()


@pytest.mark.parametrize("arguments", [["--help"], ["plugins"], ["check"], ["config"], ["serve", "--help"]])
def test_quick_commands_load_nothing_heavy(arguments):
    program = f"from llmd.cli import run\nrun({arguments!r}, fail=lambda code: None)\nprint()\nprint('--')"
    program += f"\nimport sys; print(' '.join(name for name in {HEAVY} if name in sys.modules))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.rpartition("--")[2].split() == []


def test_every_builtin_feature_has_an_entry_point():
    """Each module with a hook implementation is in the table of pyproject.toml, and each line of it exists."""
    points = {point.value for point in distribution("llmd").entry_points if point.group == "llmd.plugins"}
    ours = {name: file for name, file in ALL.items() if name.startswith("llmd_plugins") and ".templates." not in name}
    with_hooks = {name for name, file in ours.items() if "@hookimpl" in file.read_text()}
    assert with_hooks == points
