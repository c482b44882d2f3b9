"""The only door for plugins: `llmd.api.v1`."""
