"""llama.cpp through llama-cpp-python's plain bindings: a sequence for each prompt, with a context of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

from . import Generated

_BATCH_TOKENS = 2048  # llama.cpp's own default; its inner batches keep their default of 512


class _Token(NamedTuple):
    token: int
    position: int
    seq: int
    is_last: bool  # its logits are wanted


class Engine:
    """The context is made for each work anew (sequences at once, tokens each); the model stays loaded."""

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        import llama_cpp

        self._lib: Any = llama_cpp
        self._context: Any = None
        self._threads = options["threads"]
        self._silence = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._silence, None)
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(model.encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {model}")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(_BATCH_TOKENS, 0, 1)
        self.prepare(1, 512)

    def facts(self) -> dict[str, Any]:
        """Versions."""
        return {"version": f"llama-cpp-python {self._lib.__version__}"}

    def prepare(self, num_seqs: int, max_len: int) -> None:
        """Make the context, after freeing the last one."""
        self._free_context()
        params = self._lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = num_seqs * max_len, num_seqs, False
        params.n_threads = params.n_threads_batch = self._threads
        params.n_batch = _BATCH_TOKENS
        self._context = self._lib.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp makes no context of {num_seqs} x {max_len} tokens")

    def generate(self, prompts: list[list[int]], num_tokens: int) -> Generated:
        """Prompts fill whole batches; then each step decodes a token of every sequence."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        rows: list[list[int]] = [[] for _ in prompts]
        prefill = (
            _Token(token, position, seq, position == len(prompt) - 1)
            for seq, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        )
        self._advance(prefill, rows)
        for step in range(num_tokens - 1):
            self._advance([_Token(row[-1], len(prompts[seq]) + step, seq, True) for seq, row in enumerate(rows)], rows)
        return Generated.of(rows)

    def _advance(self, tokens: Iterable[_Token], rows: list[list[int]]) -> None:
        """Run the tokens, and append to the rows what follows those that are last."""
        rest = iter(tokens)
        while taken := self._fill(rest):
            if status := self._lib.llama_decode(self._context, self._batch):
                raise RuntimeError(f"llama_decode: {status}")
            for i, token in enumerate(taken):
                if token.is_last:
                    rows[token.seq].append(self._argmax(i))

    def _fill(self, tokens: Iterator[_Token]) -> list[_Token]:
        batch, taken = self._batch, list(islice(tokens, _BATCH_TOKENS))
        for i, token in enumerate(taken):
            batch.token[i], batch.pos[i], batch.logits[i] = token.token, token.position, token.is_last
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, token.seq
        batch.n_tokens = len(taken)
        return taken

    def _argmax(self, row: int) -> int:
        import numpy

        logits = self._lib.llama_get_logits_ith(self._context, row)
        return int(numpy.ctypeslib.as_array(logits, (self._vocab_size,)).argmax())

    def _free_context(self) -> None:
        if self._context is not None:
            self._lib.llama_free(self._context)
            self._context = None

    def close(self) -> None:
        """Free everything."""
        self._free_context()
        self._lib.llama_batch_free(self._batch)
        self._lib.llama_model_free(self._model)
