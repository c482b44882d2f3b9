"""Building the kernels: cached, atomic, refused when somebody else could have written them, done without when impossible."""

import logging
import os
import platform
import subprocess

import pytest

from llmd_kernels import native


@pytest.fixture
def cache(tmp_path, monkeypatch):
    if native.library() is None:
        pytest.skip("no compiler")
    monkeypatch.setenv("LLMD_CACHE_DIR", str(tmp_path))
    return tmp_path / "kernels"


@pytest.fixture
def compiled(monkeypatch):
    """A compiler that writes a marker, and how often it ran."""
    runs = []

    def compile_(compiler, sources, path, openmp):
        runs.append(path)
        path.write_bytes(b"library")

    monkeypatch.setattr(native, "_compile", compile_)
    return runs


def test_a_build_is_made_once(cache, compiled):
    first = native._build()
    assert first.parent == cache
    assert native._build() == first
    assert len(compiled) == 1


def test_a_library_that_others_can_write_is_built_again(cache, compiled):
    path = native._build()
    os.chmod(path, 0o666)
    native._build()
    assert len(compiled) == 2


def test_other_flags_are_another_build(cache, compiled, monkeypatch):
    first = native._build()
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-g"))
    assert native._build() != first


def test_flags_may_be_added(cache, compiled, monkeypatch):
    first = native._build()
    monkeypatch.setenv("LLMD_KERNEL_FLAGS", "-march=x86-64-v2  -O1")
    assert native._flags()[-2:] == ("-march=x86-64-v2", "-O1")
    assert native._build() != first


@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86")
def test_another_processor_is_another_build(cache, compiled, monkeypatch):
    """What counts is what the compiler would use: /proc/cpuinfo may tell more, or less, than a container's CPU can do."""
    monkeypatch.setattr(native, "_cpu", lambda: "the same")
    builds = []
    for flag in ("-mno-avx512f", "-mno-avx2", "-mno-sse4.2"):
        monkeypatch.setattr(native, "FLAGS", ("-O1", "-march=x86-64-v4"))
        run = subprocess.run

        def masked(command, flag=flag, run=run, **options):
            """The compiler on a CPU that lacks something."""
            return run([*command, flag] if "-dM" in command else command, **options)

        monkeypatch.setattr(native.subprocess, "run", masked)
        builds.append(native._build())
        monkeypatch.setattr(native.subprocess, "run", run)
    assert len(set(builds)) == 3


def test_the_cache_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.delenv("LLMD_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native._cache_folder() == tmp_path / "llmd" / "kernels"


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_it_says_so_and_goes_on(monkeypatch, tmp_path, caplog, compiler):
    monkeypatch.setenv("LLMD_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(native, "_found", [])
    with caplog.at_level(logging.WARNING):
        assert native.library() is None
        assert native.library() is None
    assert [record.message for record in caplog.records if "no native CPU kernels" in record.message].__len__() == 1
