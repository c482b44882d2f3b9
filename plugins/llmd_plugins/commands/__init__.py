"""Commands of the `llmd` program."""
