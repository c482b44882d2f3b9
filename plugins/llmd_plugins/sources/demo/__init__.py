"""The embedded demo model: a tiny Llama that makes the first minute with llmd need no download."""
