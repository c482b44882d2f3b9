"""Everything that touches tensors, all of it on the executor thread. Knows no HTTP, no strings, no Sequences."""
