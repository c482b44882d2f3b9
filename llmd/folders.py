"""A model's files for commands that work on them without serving."""

from __future__ import annotations

from pathlib import Path

from llmd.config import Config, ModelConfig, PluginsConfig


def model_folder(model: str) -> Path:
    """The folder of a model ('demo', a folder, a file, or a hub name), downloaded where need be. Raises ModelError."""
    from llmd.daemon import resolve_model
    from llmd.plugin.catalog import build_catalog

    config = ModelConfig(model=model)
    return resolve_model(Config(models=(config,)), build_catalog(PluginsConfig()), config)
