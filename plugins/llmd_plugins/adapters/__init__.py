"""File formats of adapters."""
