"""Compilers of structured-output constraints."""
