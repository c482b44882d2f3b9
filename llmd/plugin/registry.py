"""One family of specs: name → spec and its owner. A wheel overrides a built-in; two wheels with one name are a conflict."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from llmd.errors import ConfigError
from llmd.plugin.specs import Spec

log = logging.getLogger(__name__)

S = TypeVar("S", bound=Spec)


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """Who provides a spec."""

    plugin: str
    distribution: str
    builtin: bool

    def __str__(self) -> str:
        return f"{self.plugin} of {self.distribution}"

    def answers_to(self, name: str) -> bool:
        """Whether the config means this owner by `name`: a distribution or a plugin."""
        return name in (self.plugin, self.distribution)


@dataclass(frozen=True, slots=True)
class Offer(Generic[S]):
    """A spec and who brought it."""

    spec: S
    owner: Owner


class Registry(Mapping[str, S]):
    """The specs of one family that won their names, in the order of loading."""

    def __init__(self, family: str, offers: list[Offer[S]], prefer: Mapping[str, str] | None = None) -> None:
        """Settle who has which name; raises ConfigError with a line for each name that two wheels want."""
        self.family = family
        self.problems: list[str] = []
        by_name: dict[str, list[Offer[S]]] = {}
        for offer in offers:
            by_name.setdefault(offer.spec.name, []).append(offer)
        preferred = {name: (prefer or {}).get(f"{family}.{name}") for name in by_name}
        winners = {name: self._settle(name, rivals, preferred[name]) for name, rivals in by_name.items()}
        if self.problems:
            raise ConfigError(self.problems)
        self._offers = winners

    def _settle(self, name: str, rivals: list[Offer[S]], preferred: str | None) -> Offer[S]:
        chosen = [offer for offer in rivals if preferred and offer.owner.answers_to(preferred)]
        if preferred and not chosen:
            log.warning("plugins.prefer: %r does not provide %s.%s", preferred, self.family, name)
        candidates = chosen or [offer for offer in rivals if not offer.owner.builtin] or rivals
        if len(candidates) > 1:
            owners = " and ".join(str(offer.owner) for offer in candidates)
            self.problems.append(
                f'{self.family}.{name} is provided by {owners}; say which: [plugins.prefer] "{self.family}.{name}" = '
                f'"{candidates[0].owner.distribution}", or disable one of them'
            )
        winner = candidates[0]
        if len(rivals) > 1 and len(candidates) == 1:
            losers = ", ".join(str(offer.owner) for offer in rivals if offer is not winner)
            log.info("%s.%s: %s is taken over %s", self.family, name, winner.owner, losers)
        return winner

    def __getitem__(self, name: str) -> S:
        return self._offers[name].spec

    def __iter__(self) -> Iterator[str]:
        return iter(self._offers)

    def __len__(self) -> int:
        return len(self._offers)

    def owner(self, name: str) -> Owner:
        """Who provides `name`."""
        return self._offers[name].owner
