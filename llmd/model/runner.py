"""One step on the device: apply the plan to the rows, run the model, sample, and bring the results back.

Everything here runs on the executor thread. `launch` queues the work and returns a PendingStep whose `result` waits for
the device; on a GPU the next step can be launched in between.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from llmd.config import CacheConfig, ModelConfig, SchedulerConfig
from llmd.engine.executor import ExecutorInfo, LoadProgress
from llmd.engine.params import PoolingParams, SamplingParams
from llmd.engine.step import RowAdmit, StepPlan, StepResult
from llmd.errors import AdapterError, ModelError
from llmd.model.adapter_packing import pack
from llmd.model.adapter_slots import AdapterTable, NoAdapters, PackedAdapter
from llmd.model.adapters import read_adapter
from llmd.model.batch import Batch, RowArrays
from llmd.model.device_memory import Peak, peak_bytes
from llmd.model.executor_info import executor_info
from llmd.model.footprint import reserve_memory
from llmd.model.graphs import Capture, DecodeGraphs, Key, capture_for
from llmd.model.kv_tensors import KVTensors, NoRoom, show
from llmd.model.loader import ModelParts, load_model, plan_model
from llmd.model.logits import LogitsContext
from llmd.model.memory_account import MemoryAccount
from llmd.model.out_of_memory import is_out_of_memory
from llmd.model.outputs import PromptScorer, RowErrors, mask_logits
from llmd.model.pending_step import PendingStep
from llmd.model.pooler import Head, Pooler
from llmd.model.sampler import PendingTokens, Sampler, SamplerContext
from llmd.model.sampling_graphs import NoSamplingGraphs, SamplingGraphs
from llmd.model.sentence import read_tail
from llmd.model.sizing import PoolSizing
from llmd.model.staging import Outbox, to_device
from llmd.model.states import StateTensors
from llmd.model.warm_up import warm_up

if TYPE_CHECKING:
    from llmd.engine.grammar import Bitmask

log = logging.getLogger("llmd.model")

_WEIGHTS_SHARE = 0.95  # of the loading bar; the rest is the KV pool and warm-up


class Runner:
    """Owns weights, KV pool, rows and sampler of one model."""

    def __init__(
        self, model_config: ModelConfig, cache: CacheConfig, scheduler: SchedulerConfig, path: Path, parts: ModelParts
    ) -> None:
        self._config, self._cache, self._scheduler = model_config, cache, scheduler
        self._path, self.parts = path, parts
        self.num_layers_done = 0  # read by other threads
        self._graph_bytes = 0  # that all graphs will take, by what two of them took

    # --- start

    def load(self, report: Callable[[LoadProgress], None]) -> ExecutorInfo:
        """Load the weights, size the pool, build the sampler, warm up."""
        started_s = time.perf_counter()
        blueprint = plan_model(
            self._config,
            self._path,
            self.parts,
            block_size=self._cache.block_size,
            kv_cache_dtype=self._cache.kv_cache_dtype,
        )
        sizing = self._sizing = PoolSizing(self._cache, self._scheduler, blueprint, self._config.max_model_len)
        used = reserve_memory(self._config, self._cache, self._scheduler, self._path, self.parts, blueprint)
        sizes = sizing.before_weights(used)
        self._cache, self._dtype = sizing.cache, sizing.dtype
        self.model = load_model(
            self._config,
            self._path,
            self.parts,
            blueprint,
            max_model_len=sizes.max_model_len if sizes else sizing.context,
            report=lambda progress: report(LoadProgress(progress.phase, progress.fraction * _WEIGHTS_SHARE)),
        )
        self.device = blueprint.device
        self._count_layers(self.model.module)
        self.adapters = self._make_adapter_slots()
        self._tail = read_tail(self._path, blueprint.config.hidden_size, self.device)
        report(LoadProgress("KV pool", _WEIGHTS_SHARE))
        if sizes is None:
            sizes = sizing.beside(self._profile(sizing), graph_bytes=self._graph_bytes)
        sizing.settle(sizes, lambda fit: self._allocate(fit.num_blocks, fit.max_model_len))
        report(LoadProgress("warm-up", 0.98))
        warm_up(self)
        for size in self._graphs.first_sizes():
            self._record(Key(size, 0))
        report(LoadProgress("ready", 1.0))
        return executor_info(self, time.perf_counter() - started_s)

    def _make_adapter_slots(self) -> AdapterTable | NoAdapters:
        """Room for adapters beside the layers, where the configuration wants it: taken before the KV pool is sized."""
        wanted = self.parts.adapters
        if wanted is None or not wanted.enable_lora:
            return NoAdapters()
        return AdapterTable(
            self.model.module,
            num_slots=wanted.max_loras,
            max_rank=wanted.max_lora_rank,
            max_rows=self._scheduler.max_num_seqs,
            targets=wanted.lora_target_modules,
        )

    def _count_layers(self, module: Any) -> None:
        """Let the loop see that a long step moves: one addition a layer."""

        def count(*_: Any) -> None:
            self.num_layers_done += 1

        for part in module.modules():
            if isinstance(part, torch.nn.ModuleList):
                for layer in part:
                    layer.register_forward_pre_hook(count)

    def _allocate(self, num_blocks: int, max_model_len: int) -> None:
        """Rows, pool and what reads them."""
        config, max_rows = self.model.config, self._scheduler.max_num_seqs
        self.max_model_len = max_model_len
        module: Any = self.model.module
        num_groups = 0
        shape: tuple[int, ...] = ()
        if not self.model.is_encoder:
            num_groups = 1
            shape = self.model.backend.kv_shape(self._cache.block_size, config.num_kv_heads, config.head_dim)
        capture = capture_for(self.device) if self.can_generate and not self._config.enforce_eager else None
        self.num_blocks, num_lines = num_blocks, max_rows + 1
        has_spare = num_blocks > 0 and capture is not None and not capture.is_free  # a block for RowArrays' spare line
        self.kv = KVTensors(num_blocks + has_spare, self.model.num_kv_layers, shape, self._dtype, self.device)
        self.states = StateTensors(self.model.states, num_lines, self.device)
        self.rows = RowArrays(
            max_rows,
            max_model_len,
            self._cache.block_size,
            num_groups,
            self.device,
            spare_block=num_blocks if has_spare else 0,
            with_token_types=getattr(module, "num_token_types", 1) > 1,
        )
        self._outbox = Outbox(self.device)
        self._sampler = self._build_sampler(num_lines, max_model_len)
        self._make_graphs(capture)
        self._scorer = PromptScorer(self.logits, self._outbox)
        head = Head(module.classify, config.label_activation) if hasattr(module, "classify") else None
        self._pooler = Pooler(getattr(module, "pooling", "last"), head, self._tail, self.adapters.use_rows)
        self._errors = RowErrors()
        self._params: dict[int, SamplingParams | PoolingParams] = {}
        self._num_prompt_tokens: dict[int, int] = {}

    def _make_graphs(self, capture: Capture | None) -> None:
        """Recorded decode steps, as far as the device has them."""
        max_rows = self._scheduler.max_num_seqs
        self._graphs = DecodeGraphs(lambda batch: self.logits(self.forward(batch)), self.rows.decode, capture, max_rows)
        self._draws: SamplingGraphs | NoSamplingGraphs = NoSamplingGraphs()
        if capture is not None and not capture.is_free:
            self._draws = SamplingGraphs(self._sampler, self.rows, capture, self._outbox)

    def _build_sampler(self, max_rows: int, max_model_len: int) -> Sampler:
        vocab_size = self.model.config.vocab_size
        facts = LogitsContext(max_num_rows=max_rows, max_model_len=max_model_len, vocab_size=vocab_size, device=self.device)
        specs = sorted(self.parts.logits_processors.values(), key=lambda spec: spec.order)
        context = SamplerContext(
            max_num_rows=max_rows,
            max_model_len=max_model_len,
            vocab_size=vocab_size,
            device=self.device,
            logits_processors=[spec.build(facts) for spec in specs],
        )
        if not self.parts.samplers:
            raise ModelError("no sampler plugin is loaded")
        return max(self.parts.samplers.values(), key=lambda spec: spec.priority).build(context)

    def _profile(self, sizing: PoolSizing) -> Peak:
        """What is taken at the peak of the largest step, and by graphs."""

        def largest_step() -> None:
            self._allocate(sizing.num_profile_blocks, sizing.context)
            warm_up(self)
            self._graph_bytes = self._record_two()
            self.release_kv()

        return peak_bytes(self.device, largest_step)

    def _record_two(self) -> int:
        """Record the largest decode step and the smallest; what all will take, if those between are like the smallest."""
        sizes = self._graphs.first_sizes()
        taken = [self._record(Key(size, 0)) for size in {sizes[0]: 0, sizes[-1]: 0}] if sizes else [0]
        return sum(taken) + max(0, self._graphs.num_sizes - len(taken)) * taken[-1]

    @property
    def can_generate(self) -> bool:
        """Whether the model has a head that gives logits."""
        return hasattr(self.model.module, "logits")

    @property
    def embedding_size(self) -> int:
        """Numbers of a pooled vector."""
        return self._tail.size(self.model.config.hidden_size)

    def memory_account(self) -> MemoryAccount:
        """The sum of the device's memory."""
        return self._sizing.account(
            weights_bytes=self.model.weights_bytes,
            adapter_bytes=self.adapters.num_bytes,
            graph_bytes=self._graph_bytes or self._graphs.num_bytes,
        )

    @property
    def max_num_batched_tokens(self) -> int:
        """Tokens of the largest step."""
        return self._scheduler.max_num_batched_tokens

    # --- steps

    @property
    def is_synchronous(self) -> bool:
        """Whether a launched step is already computed, so that there is nothing to overlap."""
        device = getattr(self, "device", None)
        return device is None or device.type == "cpu"

    def run(self, plan: StepPlan, masks: Future[Bitmask] | None = None) -> StepResult:
        """One step, start to end."""
        return self.launch(plan, masks).result()

    @torch.inference_mode()
    def launch(self, plan: StepPlan, masks: Future[Bitmask] | None = None) -> PendingStep:
        """Queue a step's work on the device."""
        started_s = time.perf_counter()
        self._apply(plan)
        if not plan.rows:
            self.rows.update_blocks(plan.block_updates)
            return PendingStep(plan, started_s)
        if (key := self._graphs.choose(plan, self.adapters.variant(plan.rows))) is not None:
            tokens = self._replay(plan, key, masks)
            return PendingStep(plan, started_s, tokens, errors=self._errors.of(plan.rows))
        batch = self.rows.batch(plan)
        self.adapters.use_tokens(plan.rows, plan.counts)
        hidden = self.forward(batch)
        drawn = self._sample(plan, batch, hidden, masks)
        self._score_prompts(plan, batch, hidden)
        self._pool(plan, batch, hidden)
        return PendingStep(
            plan, started_s, drawn, self._scorer.take(), self._pooler.take(self._outbox), self._errors.of(plan.rows),
            end=self._outbox.mark() if drawn is None else None,
        )  # fmt: skip

    def _replay(self, plan: StepPlan, key: Key, masks: Future[Bitmask] | None) -> PendingTokens:
        """A step of which every row computes one token and samples, by its graph."""
        self.adapters.use_rows(plan.rows, key.size)
        step, num_rows = self._graphs.run(plan, key), len(plan.rows)
        self.num_layers_done += self.model.config.num_layers
        if masks is not None and plan.masked:
            mask_logits(step.logits, plan.masked, masks.result())
        drawn: PendingTokens | None = self._draws.draw(step, plan.rows)
        if drawn is not None:
            return drawn
        logits, rows, num_tokens = step.logits[:num_rows], step.batch.rows[:num_rows], step.num_tokens[:num_rows]
        return self._draw(logits, rows, num_tokens, plan.rows, max(plan.starts) + 1)

    def record_next(self) -> bool:
        """Record a kind of decode step that is lacking, while there is nothing else to do; True once there is none."""
        if (key := self._graphs.lacking(self.adapters.present_variant)) is not None:
            self._record(key)
        elif self._graphs.num_bytes:
            told = show(self._graphs.num_bytes), show(self._graph_bytes) if self._graph_bytes else "nothing"
            log.info("all %d decode graphs are there: they took %s, %s was reckoned", self._graphs.num_recorded, *told)
        return key is None

    @property
    def lacks_graphs(self) -> bool:
        """Whether `record_next` has something to do."""
        graphs: DecodeGraphs | None = self.__dict__.get("_graphs")
        return graphs is not None and graphs.lacking(self.adapters.present_variant) is not None

    @torch.inference_mode()
    def _record(self, key: Key) -> int:
        """Record by a step of spare lines; bytes that it took."""
        self.adapters.use_rows((), key.size, by_all=key.variant != 0)
        before = self._graphs.num_bytes
        self._graphs.record(key)
        return self._graphs.num_bytes - before

    def forget_step(self) -> None:
        """A step failed midway: nothing it found may be taken for the next one's, and its memory is free again."""
        self._scorer.take()
        self._pooler.forget()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def forward(self, batch: Batch) -> Tensor:
        """Hidden states [T, hidden_size] of a batch."""
        attention = self.model.backend.prepare(batch)
        batch = replace(batch, kv=self.kv.layers, attention=attention, states=self.states.tensors)
        return self.model.module(batch)

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, hidden_size] → [N, vocab_size] float32."""
        return self.model.module.logits(hidden)  # type: ignore[operator]

    def _apply(self, plan: StepPlan) -> None:
        """Rows go and come, adapters take slots, rows get tokens, blocks are copied; blocks come with the batch."""
        for row in plan.released:
            self._release(row)
        for admit in plan.admitted:
            self._admit(admit)
        for load in plan.adapter_loads:  # may find no memory: rows are there all the same
            self.adapters.fill(load.slot, load.adapter_id)
        if plan.token_updates:
            self.rows.update_tokens(plan.token_updates)
        if plan.block_copies:
            self.kv.copy(plan.block_copies)

    def _release(self, row: int) -> None:
        try:
            self._sampler.release(row)
        except Exception:
            log.exception("a sampler failed to release row %d", row)
        self._pooler.release(row)
        self._errors.release(row)
        self._params.pop(row, None)

    def _admit(self, admit: RowAdmit) -> None:
        """A sequence that cannot be served as it is gets an error of its own; the step goes on without harm."""
        self._errors.release(admit.row)
        ids = np.asarray(admit.token_ids, dtype=np.int64)
        vocab_size = self.model.config.vocab_size
        if ids.size > self.max_model_len or ids.min(initial=0) < 0 or ids.max(initial=0) >= vocab_size:
            self._errors.add(admit.row, f"token ids must be below {vocab_size} and at most {self.max_model_len} of them")
            ids = ids[: self.max_model_len].clip(0, vocab_size - 1)
        self.adapters.admit(admit.row, admit.adapter_slot)
        self._params[admit.row] = admit.params
        self._num_prompt_tokens[admit.row] = admit.num_prompt_tokens
        self.rows.admit(admit.row, ids, admit.token_types)
        self.states.begin(admit.row)
        self._pooler.admit(admit.row)
        try:
            self._sampler.admit(admit)
        except Exception as error:
            log.exception("a sampler or logits processor refused row %d", admit.row)
            self._errors.add(admit.row, f"the sampler refused the request: {error}")
            self._sampler.admit(_plain(admit))

    def _sample(self, plan: StepPlan, batch: Batch, hidden: Tensor, masks: Future[Bitmask] | None) -> PendingTokens | None:
        """Draw a token for each row that samples."""
        chosen = [index for index, samples in enumerate(plan.samples) if samples]
        if not chosen:
            return None
        rows, num_tokens = batch.rows, batch.seq_lens.long()
        if not len(chosen) == batch.num_rows == batch.num_tokens:
            index = to_device(chosen, np.int64, self.device)
            hidden = hidden[batch.query_start[1:][index].long() - 1]
            rows, num_tokens = rows[index], num_tokens[index]
        host_rows = [plan.rows[index] for index in chosen]
        self.adapters.use_rows(host_rows)
        logits = self.logits(hidden)
        if masks is not None and plan.masked:
            logits = mask_logits(logits, [chosen.index(index) for index in plan.masked], masks.result())
        return self._draw(logits, rows, num_tokens, host_rows, batch.max_seq_len)

    def _draw(
        self, logits: Tensor, rows: Tensor, num_tokens: Tensor, host_rows: Sequence[int], max_tokens: int
    ) -> PendingTokens:
        """A token for each row, from its line of the logits; it is written where the next step reads it."""
        sampled = self._sampler.sample(
            logits, rows, num_tokens, self.rows.token_ids, host_rows=host_rows, max_tokens=max_tokens
        )
        self.rows.append(rows, num_tokens, sampled.token_ids)
        return sampled.to_host(self._outbox)

    def _score_prompts(self, plan: StepPlan, batch: Batch, hidden: Tensor) -> None:
        """Log-probabilities of prompt tokens, from the logits one position before each."""
        first = 0
        for row, start, count, num_logits in zip(plan.rows, plan.starts, plan.counts, plan.num_logits, strict=True):
            params = self._params.get(row)
            if num_logits and isinstance(params, SamplingParams) and params.prompt_logprobs is not None:
                begin = start + count - num_logits
                end = min(start + count, self._num_prompt_tokens[row] - 1)
                if begin < end:
                    here = slice(first + begin - start, first + end - start)
                    next_ids = self.rows.token_ids[row, begin + 1 : end + 1].long()
                    self.adapters.use_one(row)
                    self._scorer.score(row, hidden[here], next_ids, params.prompt_logprobs)
            first += count

    def _pool(self, plan: StepPlan, batch: Batch, hidden: Tensor) -> None:
        """Hidden states of rows that want a vector."""
        first = 0
        for row, start, count in zip(plan.rows, plan.starts, plan.counts, strict=True):
            params = self._params.get(row)
            if isinstance(params, PoolingParams):
                is_last = start + count >= self._num_prompt_tokens[row]
                error = self._pooler.feed(row, hidden[first : first + count], start, is_last, params)
                if error is not None:
                    self._errors.add(row, error)
            first += count

    # --- adapters

    def read_adapter(self, path: Path) -> PackedAdapter:
        """Read an adapter's files and lay it out; called beside the steps, changes nothing here."""
        if isinstance(self.adapters, NoAdapters):
            raise AdapterError("adapters are not served: enable_lora is off")
        found = read_adapter(path, self.parts.adapter_formats, self.adapters.modules, self.adapters.max_rank)
        return pack(found, self.adapters)

    def keep_adapter(self, adapter_id: int, packed: PackedAdapter) -> None:
        """Hold it in host memory, for plans to put into slots."""
        self.adapters.keep(adapter_id, packed)

    def drop_adapter(self, adapter_id: int) -> None:
        """Let go of the host's copy."""
        self.adapters.drop(adapter_id)

    # --- sleep and wake

    def release_kv(self) -> None:
        """Give the KV pool's memory back; every cached block is lost."""
        self._graphs.clear()
        self._draws.clear()
        self.states.release()
        self.kv.release()

    def refill_kv(self) -> None:
        """Take the KV pool's memory again. Where there is none it raises, and may be tried once more."""
        self.kv.refill()
        try:
            self.states.refill()
        except Exception as error:
            self.release_kv()
            if not is_out_of_memory(error):
                raise
            raise NoRoom(f"{self.device} has no {show(self.states.num_bytes)} for states of rows") from error

    def close(self) -> None:
        """Drop every tensor."""
        self.__dict__.pop("model", None)
        for name in ("kv", "states", "rows", "_graphs", "_draws", "adapters", "_sampler", "_scorer", "_pooler", "_tail"):
            self.__dict__.pop(name, None)
        if getattr(self, "device", None) is not None and self.device.type == "cuda":
            torch.cuda.empty_cache()


def _plain(admit: RowAdmit) -> RowAdmit:
    """The same row, greedy: it fills a place in the batch, its tokens mean nothing."""
    return replace(admit, params=SamplingParams(temperature=0.0), bad_words_ids=())
