"""Benchmarks; a package by name, so that no other of that name on a host is taken for it."""
