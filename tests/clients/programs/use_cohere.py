"""cohere: rerank in both versions of its API, and an error as its own exception."""

import cohere
from cohere.core import ApiError
from common import KEY, URL, tell

DOCUMENTS = ["a red cat", "the stock market", "a blue dog", "cats and dogs"]


def order(answer):
    """[(index, score)] as ranked."""
    return [(result.index, result.relevance_score) for result in answer.results]


newer = cohere.ClientV2(api_key=KEY, base_url=URL)
older = cohere.Client(api_key=KEY, base_url=URL)
try:
    newer.rerank(model="nobody", query="cat", documents=DOCUMENTS)
    status = 200
except ApiError as error:
    status = error.status_code
tell(
    newer=order(newer.rerank(model="cross", query="cat", documents=DOCUMENTS)),
    older=order(older.rerank(model="cross", query="cat", documents=DOCUMENTS)),
    best=order(newer.rerank(model="cross", query="cat", documents=DOCUMENTS, top_n=2)),
    status=status,
)
