"""Block hashes: sha256 chained over a sequence's full blocks, rooted in its namespace.

    root = H(namespace)   hash[i] = H(hash[i-1] ‖ the block's token ids ‖ content hashes of spans that touch it)

Equal hash means equal tokens from position 0 on, under the same adapter, salt and key: a collision would hand one
client's KV to another, hence a cryptographic hash.
"""

from __future__ import annotations

from array import array
from hashlib import sha256

from llmd.engine.sequence import Sequence


def root_hash(sequence: Sequence, *, shared: bool) -> bytes:
    """Where a sequence's chain starts. Unless `shared`, only the request's own sequences (and resumptions) meet."""
    request = sequence.request
    parts = [request.namespace, (request.adapter or "").encode()]
    if sequence.adapter is not None:
        parts.append(b"generation:%d" % sequence.adapter.adapter_id)  # the same name may be loaded again
    if not shared:
        parts.append(b"only:" + request.request_id.encode())
    digest = sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()


def extend_hashes(sequence: Sequence, block_size: int, num_blocks: int, *, shared: bool) -> list[bytes]:
    """Compute the hashes of the first `num_blocks` full blocks, as far as not done, and return all that there are."""
    hashes, token_ids = sequence.prefix_hashes, sequence.token_ids
    if len(hashes) >= num_blocks:
        return hashes
    previous = hashes[-1] if hashes else root_hash(sequence, shared=shared)
    for index in range(len(hashes), num_blocks):
        start = index * block_size
        content = array("i", token_ids[start : start + block_size]).tobytes()
        if sequence.request.prompt.spans:
            content += _span_hashes(sequence, start, start + block_size)
        previous = sha256(previous + content).digest()
        hashes.append(previous)
    return hashes


def _span_hashes(sequence: Sequence, start: int, end: int) -> bytes:
    touching = (span for span in sequence.request.prompt.spans if span.start < end and start < span.start + span.length)
    return b"".join(span.content_hash + (start - span.start).to_bytes(8, "little", signed=True) for span in touching)
