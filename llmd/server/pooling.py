"""What a model gives besides text: vectors, classes, scores. From texts and pairs to checked prompts and params."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from llmd.engine.params import POOLINGS, PoolingParams
from llmd.engine.request import Prompt
from llmd.errors import InvalidParams, InvalidRequest
from llmd.text.chat_template import ChatTemplate
from llmd.text.pooling import PoolingDefaults
from llmd.text.score_template import QWEN3_RERANKER, is_written_out, score_messages
from llmd.text.tokenizer import Encoded

if TYPE_CHECKING:
    from llmd.engine.executor import ExecutorInfo
    from llmd.server.generate import ModelService

Text = str | Sequence[int]


class Pooling:
    """The vectors' side of one served model. Loop thread only."""

    def __init__(self, service: ModelService, defaults: PoolingDefaults) -> None:
        self._service = service
        self.defaults = defaults
        self._score_template = self._find_score_template()

    def _find_score_template(self) -> ChatTemplate | None:
        """The template that the configuration gives, which is one of pairs where the model scores pairs; or the model's."""
        if self._service.config.chat_template is not None:
            return self._service.chat_template
        return ChatTemplate(QWEN3_RERANKER) if self.defaults.is_yes_no_reranker else None

    @property
    def _info(self) -> ExecutorInfo:
        return self._service.engine.info

    @property
    def labels(self) -> tuple[str, ...]:
        """A classifier's labels in the order of its scores; none: the model gives vectors."""
        return self._info.labels

    @property
    def is_cross_encoder(self) -> bool:
        """Whether it reads two texts at once and gives one score."""
        return len(self.labels) == 1

    def max_length(self, num_tokens: int) -> int:
        """The longest text: what the model was made for, or less where its files say so and the config does not."""
        limit = self.defaults.max_length
        return num_tokens if limit is None or self._service.config.max_model_len is not None else min(limit, num_tokens)

    def params(self, given: PoolingParams) -> PoolingParams:
        """The request's params with the model's own for what it leaves open; InvalidRequest for what it cannot give."""
        if given.task == "classify":
            self._check_classifier()
            return replace(given, pooling=given.pooling or self._info.pooling)
        if self.labels:
            raise InvalidRequest(f"model {self._name!r} is a classifier: it gives scores and no vectors", param="model")
        if given.dimensions is not None:
            self._check_dimensions(given.dimensions)
        own = self.defaults.pooling or self._info.pooling
        return PoolingParams(
            pooling=given.pooling or (own if own in POOLINGS else None),  # the others only the files can ask for
            normalize=self.defaults.normalize if given.normalize is None else given.normalize,
            dimensions=given.dimensions,
        )

    def _check_dimensions(self, dimensions: int) -> None:
        """Vectors of models that were not trained for it mean nothing when they are cut."""
        size, lengths = self._info.embedding_size, self.defaults.matryoshka_dimensions
        if size and dimensions > size:
            raise InvalidParams("dimensions", dimensions, f"at most {size}, the length of this model's vectors")
        if dimensions == size:
            return
        if not self.defaults.is_matryoshka:
            raise InvalidRequest(
                f"dimensions: model {self._name!r} does not support Matryoshka embeddings, leave dimensions out "
                f"(hf_overrides with is_matryoshka = true says that it does), got {dimensions}",
                param="dimensions",
                code="unsupported_parameter",
            )
        if lengths and dimensions not in lengths:
            raise InvalidParams("dimensions", dimensions, f"one of {', '.join(map(str, lengths))}")

    def score_params(self, use_activation: bool | None = None) -> PoolingParams:
        """For scores of pairs: the classifier's, or vectors whose cosine is the score."""
        if self.is_cross_encoder:
            return self.params(PoolingParams(task="classify", use_activation=use_activation))
        if self.labels:
            message = f"model {self._name!r} is a classifier of {len(self.labels)} labels: it gives no single score"
            raise InvalidRequest(message, param="model")
        return self.params(PoolingParams(normalize=True))

    async def prompt(
        self, text: Text, *, prompt_name: str | None = None, max_length: int | None = None, add_special_tokens: bool = True
    ) -> Prompt:
        """As `make_prompt`, long texts in a thread."""
        make = partial(
            self.make_prompt, text, prompt_name=prompt_name, max_length=max_length, add_special_tokens=add_special_tokens
        )
        if not isinstance(text, str):
            return make()
        await self._service.check_text(text, clips=max_length is not None)
        return await self._service.tokenizer.off_loop(len(text), make)

    async def pair(
        self,
        text: str,
        other: str,
        *,
        max_length: int | None = None,
        max_other_length: int | None = None,
        instruction: str | None = None,
    ) -> Prompt:
        """As `make_pair`, long texts in a thread."""
        clips = max_length is not None or max_other_length is not None
        await self._service.check_text(text + other, clips=clips)
        make = partial(
            self.make_pair,
            text,
            other,
            max_length=max_length,
            max_other_length=max_other_length,
            instruction=instruction,
        )
        return await self._service.tokenizer.off_loop(len(text) + len(other), make)

    def make_prompt(
        self, text: Text, *, prompt_name: str | None = None, max_length: int | None = None, add_special_tokens: bool = True
    ) -> Prompt:
        """Token ids of a text, led by the model's prompt of that name, cut to `max_length` tokens (-1: the context)."""
        limit = self._limit(max_length)
        if not isinstance(text, str):
            return Prompt(tuple(text[:limit]))
        text = self.defaults.prompt(prompt_name) + self._plain(text)
        tokenizer = self._service.tokenizer
        if not add_special_tokens:
            return Prompt(tuple(tokenizer.encode(text, add_special_tokens=False)[:limit]))
        return self._ended(tokenizer.encode_parts(text, max_length=limit), limit)

    async def rendered(self, text: str, *, max_length: int | None = None, add_special_tokens: bool = False) -> Prompt:
        """Token ids of a conversation that a chat template has rendered; the last `max_length` of them are kept."""
        await self._service.check_text(text, clips=max_length is not None)
        token_ids = await self._service.tokenizer.encode_async(text, add_special_tokens=add_special_tokens)
        limit = self._limit(max_length)
        return Prompt(tuple(token_ids if limit is None else token_ids[-limit:]))

    def make_pair(
        self,
        text: str,
        other: str,
        *,
        max_length: int | None = None,
        max_other_length: int | None = None,
        instruction: str | None = None,
    ) -> Prompt:
        """Token ids of two texts that the model reads at once; `max_other_length` bounds the second alone.

        `instruction` is what models with a template of pairs are told to look for.
        """
        limit = self._limit(max_length)
        template = self._score_template
        if template is not None and not (self.defaults.is_yes_no_reranker and is_written_out(text)):
            return self._templated(template, text, other, limit, max_other_length, instruction)
        if instruction is not None:
            message = f"instruction: model {self._name!r} has no template of pairs that it could go into"
            raise InvalidRequest(message, param="instruction", code="unsupported_parameter")
        if template is not None:
            return self.make_prompt(text + other, max_length=max_length, add_special_tokens=False)
        encoded = self._service.tokenizer.encode_parts(
            self._plain(text), self._plain(other), max_length=limit, max_other_length=max_other_length
        )
        return self._ended(encoded, limit)

    def _templated(
        self,
        template: ChatTemplate,
        query: str,
        document: str,
        limit: int | None,
        max_document_length: int | None,
        instruction: str | None,
    ) -> Prompt:
        """A pair in the template's words; what is too long is cut off the document's end, the words stay whole."""
        tokenizer = self._service.tokenizer
        if max_document_length is not None:
            document = tokenizer.prefix(document, max_document_length)
        token_ids = self._render_pair(template, query, document, instruction)
        while limit is not None and document and (excess := len(token_ids) - limit) > 0:
            shorter = tokenizer.prefix(document, len(self._encode(document)) - excess)
            document = shorter if len(shorter) < len(document) else document[:-1]  # one character may be many tokens
            token_ids = self._render_pair(template, query, document, instruction)
        return Prompt(tuple(token_ids[:limit]))

    def _render_pair(self, template: ChatTemplate, query: str, document: str, instruction: str | None) -> list[int]:
        return self._encode(template.render(score_messages(query, document, instruction)))

    def _encode(self, text: str) -> list[int]:
        return self._service.tokenizer.encode(text, add_special_tokens=False)

    @property
    def _name(self) -> str:
        return self._service.names[0]

    def _check_classifier(self) -> None:
        if not self.labels:
            raise InvalidRequest(f"model {self._name!r} is not a classifier: it has no labels", param="model")

    def _limit(self, max_length: int | None) -> int | None:
        return self._service.max_model_len if max_length == -1 else max_length

    def _plain(self, text: str) -> str:
        return text.lower() if self.defaults.is_lower_case else text

    def _ended(self, encoded: Encoded, limit: int | None) -> Prompt:
        """Decoders that were trained so have an EOS at the end, which tokenizer.json may leave to its user."""
        token_ids = encoded.token_ids
        tokenizer = self._service.tokenizer
        eos = tokenizer.eos_token_id if tokenizer.config.get("add_eos_token") is True else None
        if eos is not None and token_ids[-1:] != [eos]:
            token_ids = [*token_ids[: None if limit is None else max(0, limit - 1)], eos]
        types = tuple(encoded.token_types) if any(encoded.token_types) and len(encoded.token_types) == len(token_ids) else ()
        return Prompt(tuple(token_ids), token_types=types)
