"""Tests and benchmarks of a GPU host; README.md says how to run them."""
