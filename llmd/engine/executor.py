"""The border to the device: what the engine asks of an executor, in plain data."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from llmd.engine.step import StepPlan, StepResult

if TYPE_CHECKING:
    from llmd.engine.grammar import Bitmask


class LoadProgress(NamedTuple):
    """Where loading stands: `phase` in words ("shard 3/8"), `fraction` of all the work between 0 and 1."""

    phase: str
    fraction: float


@dataclass(frozen=True, slots=True, kw_only=True)
class KVGroup:
    """Layers that share the rules for hits and freeing: "full" ones a block table, those of kind "state" none.

    A state is what a row keeps between steps whatever its length. It is known at the row's last computed token only, so a
    model with such a group can neither begin behind a cached prefix nor go back: what is undone begins again at position 0.
    """

    name: str = "full"
    kind: str = "full"  # or "state"
    num_layers: int = 0  # of a "state" group: tensors
    row_bytes: int = 0  # of a "state" group: what each row keeps


class AdapterFacts(NamedTuple):
    """What is known of an adapter once it is read."""

    rank: int  # the largest of its modules
    num_bytes: int  # of host memory


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorInfo:
    """What the executor offers once it has loaded: the engine sizes itself by it."""

    num_blocks: int
    block_size: int  # tokens a block
    max_num_seqs: int  # rows
    max_model_len: int
    vocab_size: int
    kv_groups: tuple[KVGroup, ...] = (KVGroup(),)  # none: an encoder, which keeps nothing between steps
    needs_whole_prompts: bool = False  # every token attends to every other: a prompt is computed in one step
    can_generate: bool = True
    weights_bytes: int = 0
    kv_bytes: int = 0
    device: str = ""
    attention_backend: str = ""
    can_pool: bool = True
    pooling: str = "last"  # how this architecture's hidden states become one vector unless the model's files say otherwise
    embedding_size: int = 0  # of a pooled vector; 0: not told
    labels: tuple[str, ...] = ()  # a classifier's, in the order of its scores
    max_loras: int = 0  # adapter slots on the device; 0: adapters are not served
    max_cpu_loras: int = 0  # adapters that host memory may hold for them
    facts: dict[str, Any] = field(default_factory=dict)  # for the start log and `llmd status` only

    @property
    def num_block_tables(self) -> int:
        """Block tables of a row: one a KV group that has blocks."""
        return sum(group.kind != "state" for group in self.kv_groups)


class Executor(Protocol):
    """Owns every tensor. All methods are called on the loop thread; none may block it.

    One whose steps or calls may take longer than health.hang_timeout_s also offers `moves` (llmd.engine.pulse.TellsMoves).
    """

    async def start(self, report: Callable[[LoadProgress], None]) -> ExecutorInfo:
        """Load the model, size the KV pool, warm up. `report` is called on the loop thread."""

    def submit(self, plan: StepPlan, masks: Future[Bitmask] | None = None) -> Awaitable[StepResult]:
        """Queue one step and return at once; steps run in the order given, at most two outstanding.

        `masks`, given where plan.masked is not empty, is waited for after the forward and before sampling: one row of
        32-bit words for each index of plan.masked, bit set = token allowed.
        The awaitable raises StepFailed (this step only), StepOutOfMemory (it is computed again, smaller) or EngineFailure
        (the device is gone). After the first two, what the plan released and admitted is done all the same; what it
        loaded and updated need not be.
        """

    async def load_adapter(self, adapter_id: int, path: str) -> AdapterFacts:
        """Read an adapter's folder into host memory, beside the steps. Plans may then put it into slots by its id.

        Raises AdapterError for files that cannot be used, and then holds nothing.
        """

    def unload_adapter(self, adapter_id: int) -> None:
        """Let go of the host's copy, behind the steps that are queued; slots keep theirs."""

    async def ping(self) -> float:
        """Run a no-op behind what is queued; seconds until it was answered."""

    async def stop(self) -> None:
        """Finish what is queued, free the device, end the thread or processes. May be called twice."""
