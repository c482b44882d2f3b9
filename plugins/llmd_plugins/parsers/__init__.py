"""Parsers of tool calls and reasoning, one file a format; `select` finds the format of a model."""
