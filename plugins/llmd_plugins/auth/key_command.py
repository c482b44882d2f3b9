"""`llmd key new NAME`: a fresh key, shown once, and its table for the configuration, which holds only its digest."""

from __future__ import annotations

import hashlib
import secrets
import sys

import click

_PREFIX = "sk-llmd-"
_NUM_BYTES = 32
_HASH_PREFIX = "sha256:"


def hash_of(key: str) -> str:
    """What stands in the configuration for a key."""
    return _HASH_PREFIX + hashlib.sha256(key.encode()).hexdigest()


def table_of(name: str, digest: str) -> str:
    """The `[[keys]]` table."""
    return f'[[keys]]\nname = "{name}"\nhash = "{digest}"\n'


@click.group("key")
def key_group() -> None:
    """Make API keys for [[keys]]."""


@key_group.command("new")
@click.argument("name")
def new_key(name: str) -> None:
    """Print a new key for NAME on stderr, once, and the [[keys]] table for the configuration on stdout."""
    from pydantic import ValidationError

    from llmd.api.v1 import KeyConfig

    key = _PREFIX + secrets.token_urlsafe(_NUM_BYTES)
    digest = hash_of(key)
    try:
        KeyConfig(name=name, hash=digest)
    except ValidationError:
        allowed = "letters, digits and '._@-', at most 64, the first a letter or digit"
        raise click.BadParameter(f"{name!r} is not valid; allowed: {allowed}", param_hint="NAME") from None
    click.echo(f"# the key of {name}; it is not kept anywhere: {key}", err=True)
    click.echo(table_of(name, digest), nl=False)


@key_group.command("hash")
def hash_key() -> None:
    """Read a key from stdin and print its digest, for `hash` in a [[keys]] table."""
    key = sys.stdin.readline().strip()
    if not key:
        raise click.UsageError("stdin holds no key")
    click.echo(hash_of(key))
