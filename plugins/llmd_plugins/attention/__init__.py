"""Ways to compute attention over the paged KV cache."""
