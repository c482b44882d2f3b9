"""Scheduling over plain ints: requests, sequences, KV blocks, steps. Knows no strings, no tensors, no HTTP."""
