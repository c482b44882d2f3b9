"""What a wheel's objects cost in each step, who raised there, and who takes over.

    spec of a wheel ─► guarded(spec) ─► its object behind a guard: timed, named when it raises or is slow, replaced

Built-ins are not guarded: they pay nothing. A guard is called on the executor thread only; the loop thread reads numbers.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from llmd.plugin.catalog import Catalog

log = logging.getLogger("llmd.plugins")

SLOW_S = 0.05  # a call: a decode step of a large model takes half as long as a whole
_WARM_CALLS = 20  # the first ones compile and allocate

S = TypeVar("S", bound=Any)
T = TypeVar("T")


@dataclass(slots=True)
class StepCost:
    """What one thing of one plugin cost so far."""

    plugin: str
    provides: str  # "family.name"
    tell: Callable[[str, str], None]  # (plugin, reason): into its row
    calls: int = 0
    seconds: float = 0.0
    failures: int = 0
    is_slow: bool = False

    def plain(self) -> dict[str, Any]:
        """The numbers."""
        return {"calls": self.calls, "seconds": self.seconds, "failures": self.failures, "is_slow": self.is_slow}

    def timed(self, call: Callable[..., T], *args: Any, **options: Any) -> T:
        """Call it and count; what it raises is named, counted and goes on."""
        start_s = time.perf_counter()
        try:
            return call(*args, **options)
        except Exception as error:
            self._failed(error)
            raise
        finally:
            self._count(time.perf_counter() - start_s)

    def _count(self, elapsed_s: float) -> None:
        self.calls += 1
        self.seconds += elapsed_s
        if elapsed_s > SLOW_S and self.calls > _WARM_CALLS and not self.is_slow:
            self.is_slow = True
            reason = f"{self.provides} took {1e3 * elapsed_s:.0f} ms in a step"
            log.warning("plugin %s is slow: %s (further ones are not logged)", self.plugin, reason)
            self.tell(self.plugin, reason)

    def _failed(self, error: Exception) -> None:
        self.failures += 1
        if self.failures == 1:
            reason = f"{self.provides} raised {type(error).__name__}: {error}"
            log.warning("plugin %s: in a step %s (further ones are not logged)", self.plugin, reason)
            self.tell(self.plugin, reason)


class _Guard:
    """Passes on what it does not know."""

    def __init__(self, inner: Any, cost: StepCost) -> None:
        self._inner, self._cost = inner, cost

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class GuardedProcessor(_Guard):
    """A logits processor. Nothing can stand in for it: the rows that asked for it end with an error, the others go on."""

    def apply(self, logits: Any, rows: Any) -> Any:
        """Timed."""
        return self._cost.timed(self._inner.apply, logits, rows)


class GuardedSampler(_Guard):
    """A sampler; llmd's own takes over the rows of one that raised, from this step on."""

    launches = None  # its calls are not recorded: each is timed, and it may be replaced

    def __init__(self, inner: Any, cost: StepCost, substitute: Callable[[], Any] | None) -> None:
        super().__init__(inner, cost)
        self._substitute = substitute
        self._admitted: dict[int, Any] = {}

    def admit(self, admit: Any) -> None:
        """Remember the row, for whoever takes over."""
        self._admitted[admit.row] = admit
        self._inner.admit(admit)

    def release(self, row: int) -> None:
        """Forget the row."""
        self._admitted.pop(row, None)
        self._inner.release(row)

    def sample(self, *args: Any, **options: Any) -> Any:
        """Timed, and repeated by the substitute where it raises."""
        try:
            return self._cost.timed(self._inner.sample, *args, **options)
        except Exception:
            if self._substitute is None:
                raise
        log.warning("plugin %s: llmd's own sampler takes over", self._cost.plugin)
        self._inner, self._substitute = self._substitute(), None
        for admit in self._admitted.values():
            self._inner.admit(admit)
        return self._inner.sample(*args, **options)


class GuardedAttention(_Guard):
    """An attention backend; of the built-in ones that can serve the model over a cache of this shape the best takes over."""

    def __init__(self, inner: Any, cost: StepCost, others: Iterable[Any]) -> None:
        super().__init__(inner, cost)
        self._others = sorted(others, key=lambda spec: -spec.priority)
        self._needs: Any = None
        self._shape: tuple[int, ...] = ()

    def why_not(self, needs: Any) -> list[str]:
        """Asked before anything else: the needs are kept for whoever takes over."""
        self._needs = needs
        reasons: list[str] = self._inner.why_not(needs)
        return reasons

    def prepare(self, batch: Any) -> Any:
        """The batch too, for a substitute in the middle of a step."""
        return batch, self._call("prepare", batch)

    def forward(self, q: Any, k: Any, v: Any, kv: Any, meta: Any, **options: Any) -> Any:
        """Timed; a substitute stores and attends again."""
        batch, own = meta
        before = self._inner
        try:
            return self._cost.timed(self._inner.forward, q, k, v, kv, own, **options)
        except Exception as error:  # noqa: BLE001 - raised again where nobody can take over
            self._take_over(error)
        assert self._inner is not before
        return self._inner.forward(q, k, v, kv, self._inner.prepare(batch), **options)

    def _call(self, method: str, *args: Any) -> Any:
        try:
            return self._cost.timed(getattr(self._inner, method), *args)
        except Exception as error:  # noqa: BLE001 - raised again where nobody can take over
            self._take_over(error)
            return getattr(self._inner, method)(*args)

    def _take_over(self, error: Exception) -> None:
        """Put a built-in backend in its place, or raise the error again."""
        needs = self._needs
        sizes = (needs.block_size, needs.num_kv_heads, needs.head_dim)
        while self._others:
            spec = self._others.pop(0)
            backend = spec.build()
            if not backend.why_not(needs) and backend.kv_shape(*sizes) == self._inner.kv_shape(*sizes):
                log.warning("plugin %s: attention backend %s takes over", self._cost.plugin, spec.name)
                self._inner = backend
                return
        raise error


class StepGuards:
    """The guards of one catalog: specs in, the same specs out, those of wheels with guarded objects."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def guarded(self, family: str) -> Mapping[str, Any]:
        """The registry of a family."""
        registry = self._catalog.registry(family)
        if all(registry.owner(name).builtin for name in registry):
            return registry
        return {name: spec if registry.owner(name).builtin else self._guard(family, spec) for name, spec in registry.items()}

    def _guard(self, family: str, spec: S) -> S:
        registry, costs = self._catalog.registry(family), self._catalog.step_costs
        cost = StepCost(registry.owner(spec.name).plugin, f"{family}.{spec.name}", self._catalog.manager.note)
        falls_back = self._catalog.manager.falls_back
        others = [other for name, other in registry.items() if registry.owner(name).builtin] if falls_back else []

        def build(*args: Any) -> Any:
            inner = spec.build(*args)
            costs[cost.provides] = cost
            if family == "logits_processors":
                return GuardedProcessor(inner, cost)
            if family == "samplers":
                return GuardedSampler(inner, cost, (lambda: _own_sampler(*args)) if falls_back else None)
            if spec.for_encoders:
                return inner
            return GuardedAttention(inner, cost, [other for other in others if not other.for_encoders])

        return replace(spec, build=build)


def _own_sampler(context: Any) -> Any:
    from llmd.model.sampler import TorchSampler

    return TorchSampler(context)


def status_rows(catalog: Catalog) -> list[dict[str, Any]]:
    """Each plugin's row, with what its objects cost in steps so far: "steps", by "family.name"."""
    costs = list(catalog.step_costs.values())
    return [
        asdict(row) | {"steps": {cost.provides: cost.plain() for cost in costs if cost.plugin == row.name}}
        for row in catalog.plugins
    ]


class CostCollector:
    """The costs in /metrics; nothing while no wheel takes part in steps."""

    def __init__(self, costs: Mapping[str, StepCost]) -> None:
        self._costs = costs

    def collect(self) -> Iterator[Any]:
        """Seconds, calls and failures of each."""
        from prometheus_client.core import CounterMetricFamily

        for name, text in (
            ("seconds", "Time in steps that a plugin's object took."),
            ("calls", "Calls of a plugin's object in steps."),
            ("failures", "Calls of a plugin's object that raised."),
        ):
            if not self._costs:
                return
            family = CounterMetricFamily(f"llmd_plugin_{name}", text, labels=["plugin", "provides"])
            for cost in list(self._costs.values()):
                family.add_metric([cost.plugin, cost.provides], getattr(cost, name))
            yield family
