"""Turns strings into token ids and back. Knows no HTTP, no blocks, no tensors."""
