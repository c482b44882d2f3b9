"""A device made of dictionaries: it takes real plans, keeps a real paged KV pool, and tells when a plan is wrong."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Awaitable, Callable

from llmd.engine.executor import AdapterFacts, ExecutorInfo, LoadProgress
from llmd.engine.params import PoolingParams, SamplingParams
from llmd.engine.step import StepPlan, StepResult, TokenLogprobs
from llmd.errors import AdapterError

ROOT = b"root"


def chain(previous: bytes, token_id: int) -> bytes:
    """What the fake KV holds at a position: a hash of all tokens up to it."""
    return hashlib.blake2b(previous + token_id.to_bytes(8, "little", signed=True), digest_size=12).digest()


def next_token(kv: bytes, seed: int, vocab_size: int, allowed: Callable[[int], bool] = lambda token_id: True) -> int:
    """The token that the fake model samples after a prefix: the first allowed one from a hashed place on."""
    digest = hashlib.blake2b(kv + seed.to_bytes(16, "little", signed=True), digest_size=8).digest()
    first = int.from_bytes(digest, "little")
    return next(token for token in ((first + step) % vocab_size for step in range(vocab_size)) if allowed(token))


def root_of(adapter: str | None) -> bytes:
    """What comes before the first token: an adapter, by the path of its files, changes all that follows."""
    return ROOT if adapter is None else hashlib.blake2b(adapter.encode(), digest_size=12).digest()


def expected_tokens(
    prompt: list[int], count: int, vocab_size: int, seed: int = 0, matcher=None, adapter: str | None = None
) -> list[int]:
    """What the fake model says to a prompt, computed without any cache, a token at a time."""
    kv, tokens = root_of(adapter), []
    for token_id in prompt:
        kv = chain(kv, token_id)
    while len(tokens) < count and not (matcher and matcher.finished):
        tokens.append(next_token(kv, seed, vocab_size, matcher.allows if matcher else lambda token_id: True))
        kv = chain(kv, tokens[-1])
        if matcher:
            assert matcher.accept(tokens[-1:])
    return tokens


class FakeGrammar:
    """A constraint over small vocabularies whose choices hang on all tokens so far: often just one may follow."""

    def __init__(self, vocab_size: int, salt: int = 0) -> None:
        self.vocab_size, self.salt = vocab_size, salt

    def matcher(self) -> FakeMatcher:
        """Start."""
        return FakeMatcher(self)


class FakeMatcher:
    """Allows one token in two of three states, else half of them; ends in one state of sixteen."""

    def __init__(self, grammar: FakeGrammar) -> None:
        self.grammar = grammar
        self.state = chain(ROOT, grammar.salt)
        self.has_begun = False

    def allows(self, token_id: int) -> bool:
        """Whether a token may follow."""
        if self.state[0] % 3:
            return token_id == self.state[1] % self.grammar.vocab_size
        return bool(hashlib.blake2b(self.state + bytes([token_id % 256]), digest_size=1).digest()[0] % 2) or token_id == 0

    def accept(self, token_ids) -> bool:
        """Advance."""
        for token_id in token_ids:
            if self.finished or not self.allows(token_id):
                return False
            self.state = chain(self.state, token_id)
            self.has_begun = True
        return True

    def fill(self, mask_row) -> None:
        """Bits of what may follow."""
        assert not self.finished
        mask_row[:] = 0
        words = mask_row.view("uint32")
        for token_id in range(self.grammar.vocab_size):
            if self.allows(token_id):
                words[token_id // 32] |= 1 << (token_id % 32)

    def forced(self) -> list[int]:
        """As long as there is no choice."""
        ahead, tokens = FakeMatcher(self.grammar), []
        ahead.state, ahead.has_begun = self.state, self.has_begun
        while not ahead.finished and ahead.state[0] % 3 and len(tokens) < 9:
            tokens.append(ahead.state[1] % self.grammar.vocab_size)
            ahead.accept(tokens[-1:])
        return tokens

    @property
    def finished(self) -> bool:
        """Whether nothing may follow."""
        return self.has_begun and self.state[2] % 16 == 0


class _Row:
    def __init__(self, admit, num_groups: int) -> None:
        self.admit = admit
        self.token_ids = list(admit.token_ids)
        self.tables: list[list[int]] = [[] for _ in range(num_groups)]
        self.adapter: str | None = None  # the path of what lay in its slot when it came
        self.state: bytes | None = None  # what a group of kind "state" keeps: the chain of all that was computed, in order


class FakeDevice:
    """Runs plans in the order given. Every read of the KV pool is checked against the row's own tokens, so a block that
    was shared wrongly, freed too early or never computed fails the test at once. Seeds count only for non-greedy params."""

    def __init__(self, info: ExecutorInfo) -> None:
        self.info = info
        self.rows: dict[int, _Row] = {}
        self.kv: dict[tuple[int, int, int], bytes] = {}  # (group, block, offset) -> chain
        self.num_computed = self.num_copies = 0
        self.adapters: dict[int, str] = {}  # in host memory: id -> path
        self.slots: dict[int, str] = {}  # slot -> path
        self.failing_requests: set[str] = set()
        self.masks: dict = {}  # by row, of the plan being computed
        self.has_state = any(group.kind == "state" for group in info.kv_groups)

    def fail(self, plan: StepPlan) -> None:
        """A step that breaks off midway: what it told holds, the states of its rows are worth nothing any more."""
        self.apply(plan)
        for row in plan.rows:
            self.rows[row].state = b"broken off"

    def apply(self, plan: StepPlan) -> None:
        """Release, admit and update the block tables."""
        for row in plan.released:
            del self.rows[row]
        for load in plan.adapter_loads:
            assert 0 <= load.slot < self.info.max_loras
            assert load.adapter_id in self.adapters, "an adapter is put into a slot that host memory does not hold"
            self.slots[load.slot] = self.adapters[load.adapter_id]
        for admit in plan.admitted:
            assert admit.row not in self.rows, "a row is given twice"
            self.rows[admit.row] = _Row(admit, self.info.num_block_tables)
            assert (admit.adapter is None) == (admit.adapter_slot is None)
            if admit.adapter_slot is not None:
                self.rows[admit.row].adapter = self.slots[admit.adapter_slot]
        for update in plan.block_updates:
            table = self.rows[update.row].tables[update.group]
            assert len(table) == update.first_index
            table.extend(update.block_ids)

        for update in plan.token_updates:
            token_ids = self.rows[update.row].token_ids
            assert len(token_ids) >= update.first_position
            token_ids[update.first_position :] = update.token_ids

    def copy(self, plan: StepPlan) -> None:
        """Copy blocks in the worst order; sources belong to somebody, targets to one row alone."""
        held = self.holders()
        targets = [target for _, target in plan.block_copies]
        assert len(set(targets)) == len(targets), "two copies have one target"
        assert not {source for source, _ in plan.block_copies} & set(targets), "a source is a target"
        for source, target in reversed(plan.block_copies):
            assert held[source], "a block is copied that nobody holds"
            assert held[target] == 1, "a copy overwrites what is not one row's alone"
            for group, block, offset in [key for key in self.kv if key[1] == source]:
                self.kv[group, target, offset] = self.kv[group, block, offset]
        self.num_copies += len(plan.block_copies)

    def holders(self) -> Counter[int]:
        """How often block tables name a block."""
        return Counter(block for row in self.rows.values() for table in row.tables for block in table)

    def check_writes(self, plan: StepPlan) -> None:
        """A step writes into no block that several rows share, but for those that a replay fills beforehand."""
        held, size = self.holders(), self.info.block_size
        if plan.step_id < 0:
            return
        for row, start, count in zip(plan.rows, plan.starts, plan.counts, strict=True):
            for table in self.rows[row].tables:
                written = table[start // size : -(-(start + count) // size)]
                assert all(held[block] == 1 for block in written), "a shared block is written"

    def run(self, plan: StepPlan, bitmask=None) -> StepResult:
        """Compute one plan."""
        self.apply(plan)
        self.copy(plan)
        self.check_writes(plan)
        self.masks = {plan.rows[index]: bitmask[nth].view("uint32") for nth, index in enumerate(plan.masked)}
        tokens: list[int] = []
        result = StepResult(step_id=plan.step_id, token_ids=tokens)
        if self.info.needs_whole_prompts:
            assert [self.rows[row].admit.num_prompt_tokens for row in plan.rows] == list(plan.counts)
        columns = zip(plan.rows, plan.starts, plan.counts, plan.num_logits, plan.samples, strict=True)
        for row, start, count, num_logits, samples in columns:
            self._compute(self.rows[row], row, start, count, num_logits, samples, result, tokens)
        return result

    def _compute(
        self, row: _Row, index: int, start: int, count: int, num_logits: int, samples: bool, result, tokens
    ) -> None:
        assert len(row.token_ids) >= start + count, "a token is computed before it is known"
        slot = row.admit.adapter_slot
        assert slot is None or self.slots[slot] == row.adapter, "an adapter was taken from under a row"
        kv, chains = root_of(row.adapter), []
        before = row.state or kv
        for position, token_id in enumerate(row.token_ids[: start + count]):
            kv = chain(kv, token_id)
            chains.append(kv)
            for group, table in enumerate(row.tables):
                key = (group, table[position // self.info.block_size], position % self.info.block_size)
                if position >= start:
                    self.kv[key] = kv
                else:
                    assert self.kv.get(key) == kv, f"wrong KV at position {position} of {row.admit.request_id}"
            if self.has_state and position == start - 1:
                assert before == kv, f"the state of {row.admit.request_id} is not that of position {position}"
        assert not self.has_state or start or row.state is None, "a row with a state begins again"
        row.state = kv
        self.num_computed += count
        params = row.admit.params
        if row.admit.request_id in self.failing_requests:
            result.errors[index] = "NaN logits"
        if isinstance(params, PoolingParams):
            if start + count == row.admit.num_prompt_tokens:
                result.pooled[index] = [float(byte) for byte in kv]
            return
        if params.prompt_logprobs is not None and num_logits and start < row.admit.num_prompt_tokens:
            first = start + count - num_logits
            follow = row.token_ids[first + 1 : min(start + count + 1, row.admit.num_prompt_tokens)]
            result.prompt_logprobs[index] = [TokenLogprobs(token_id, -1.0, 1, (token_id,), (-1.0,)) for token_id in follow]
        if samples:
            assert start + count == len(row.token_ids), "a row samples before its end"
            mask = self.masks.get(index)
            allowed = (lambda token: True) if mask is None else (lambda token: bool(mask[token // 32] >> (token % 32) & 1))
            token_id = next_token(kv, 0 if params.is_greedy else row.admit.seed, self.info.vocab_size, allowed)
            row.token_ids.append(token_id)
            tokens.append(token_id)
            if params.logprobs is not None:
                result.logprobs[index] = [TokenLogprobs(token_id, -0.5, 1, (token_id,), (-0.5,))]


def fake_info(**changes) -> ExecutorInfo:
    """A small device."""
    values = {"num_blocks": 64, "block_size": 4, "max_num_seqs": 8, "max_model_len": 128, "vocab_size": 1000}
    return ExecutorInfo(**{**values, "device": "fake", **changes})


class FakeExecutor:
    """The real Executor Protocol over a FakeDevice; a step takes `step_s` seconds, one after the other."""

    def __init__(self, info: ExecutorInfo | None = None, *, step_s: float = 0.0) -> None:
        self.device = FakeDevice(info or fake_info())
        self.step_s = step_s
        self.fail_next: BaseException | None = None
        self.num_outstanding = 0
        self.max_outstanding = 0
        self.stopped = False
        self._last: asyncio.Future | None = None
        self.load_s = 0.0  # that reading an adapter takes
        self.broken_adapters: set[str] = set()  # paths whose files cannot be used
        self.adapters_read: list[str] = []
        self._drops: set[int] = set()  # ids that go when the steps before have run

    async def start(self, report: Callable[[LoadProgress], None]) -> ExecutorInfo:
        """Ready at once, after one word of progress."""
        report(LoadProgress("loading the fake", 0.5))
        return self.device.info

    def submit(self, plan: StepPlan, masks=None) -> Awaitable[StepResult]:
        """Run the step after those before it."""
        self.num_outstanding += 1
        self.max_outstanding = max(self.max_outstanding, self.num_outstanding)
        error, self.fail_next = self.fail_next, None
        previous = self._last
        self._last = asyncio.ensure_future(self._run(plan, masks, previous, error))
        return self._last

    async def _run(self, plan: StepPlan, masks, previous: asyncio.Future | None, error: BaseException | None) -> StepResult:
        if previous is not None:
            await asyncio.wait([previous])
        await asyncio.sleep(self.step_s)
        self.num_outstanding -= 1
        if error is not None:
            self.device.fail(plan)
            raise error
        return self.device.run(plan, None if masks is None else await asyncio.wrap_future(masks))

    async def load_adapter(self, adapter_id: int, path: str) -> AdapterFacts:
        """Every path is an adapter, but for those that are broken."""
        await asyncio.sleep(self.load_s)
        self.adapters_read.append(path)
        if path in self.broken_adapters:
            raise AdapterError(f"tensor a of {path} is missing")
        self.device.adapters[adapter_id] = path
        self._drops.discard(adapter_id)
        assert len(self.device.adapters) - len(self._drops) <= self.device.info.max_cpu_loras
        return AdapterFacts(rank=8, num_bytes=1000)

    def unload_adapter(self, adapter_id: int) -> None:
        """After the steps that are queued; they may put it into a slot yet."""
        self._drops.add(adapter_id)
        if self._last is None or self._last.done():
            self._drop(adapter_id)
        else:
            self._last.add_done_callback(lambda _: self._drop(adapter_id))

    def _drop(self, adapter_id: int) -> None:
        if adapter_id in self._drops:  # not read again meanwhile
            self._drops.remove(adapter_id)
            del self.device.adapters[adapter_id]

    async def ping(self) -> float:
        """Answered at once."""
        return 0.0

    async def stop(self) -> None:
        """Nothing to free."""
        self.stopped = True


def greedy(**changes) -> SamplingParams:
    """Greedy sampling parameters."""
    return SamplingParams(**{"temperature": 0.0, **changes})
