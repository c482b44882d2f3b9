"""How a pair of texts is put to a language model that scores them: messages of the roles query and document.

A `system` message before them is the instruction. Templates of that form are given as a model's chat_template, as with
vLLM; Qwen3-Reranker's own form is known here: https://huggingface.co/Qwen/Qwen3-Reranker-0.6B
"""

from __future__ import annotations

QWEN3_RERANKER = """\
<|im_start|>system
Judge whether the Document meets the requirements based on the Query and the Instruct provided. \
Note that the answer can only be "yes" or "no".<|im_end|>
<|im_start|>user
<Instruct>: {{ messages | selectattr("role", "eq", "system") | map(attribute="content") | first | \
default("Given a web search query, retrieve relevant passages that answer the query") }}
<Query>: {{ messages | selectattr("role", "eq", "query") | map(attribute="content") | first }}
<Document>: {{ messages | selectattr("role", "eq", "document") | map(attribute="content") | first }}<|im_end|>
<|im_start|>assistant
<think>

</think>

{{ "" }}"""


def score_messages(query: str, document: str, instruction: str | None = None) -> list[dict[str, str]]:
    """The messages of a pair."""
    asked = [] if instruction is None else [{"role": "system", "content": instruction}]
    return [*asked, {"role": "query", "content": query}, {"role": "document", "content": document}]


def is_written_out(query: str) -> bool:
    """Whether a client has put the template's words around the texts itself, as servers without templates need it."""
    return query.startswith("<|im_start|>")
