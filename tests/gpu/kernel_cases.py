"""Each kernel's package called at odd sizes on a device, beside its reference on the same numbers: (name, got, expected)."""

import torch
from kernels.attention_calls import make_call
from torch.nn.functional import gelu

from llmd_kernels import (
    bitmask,
    copy_blocks,
    embedding,
    experts,
    fp8_linear,
    grouped_linear,
    int8_linear,
    linear,
    logprobs,
    lora,
    penalties,
    prepare_batch,
    rms_norm,
    rotary,
    sampling,
    silu_mul,
    store_kv,
)
from llmd_kernels.paged_attention import paged_attention
from llmd_kernels.paged_attention import reference as attention_reference
from llmd_kernels.quantized_kv import QuantizedKV, dequantize, half_bytes, view_quantized


def on(device, value):
    """The same with all its tensors on the device."""
    if isinstance(value, torch.Tensor):
        moved = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
        return moved.copy_(value)
    if isinstance(value, tuple):
        moved = [on(device, part) for part in value]
        return type(value)(*moved) if hasattr(value, "_fields") else tuple(moved)
    return value


ROWS = {"decode": ([5, 1300, 77, 1], [1, 1, 1, 1]), "mixed": ([5, 1500, 77, 9], [5, 1, 70, 1])}
EXTRAS = {"soft_cap": 5.0, "sinks": torch.arange(6) - 3.0, "alibi_slopes": torch.full((6,), 0.01), "window": 600}


def attention(*heads, kv_dtype=None, **extras):
    """Query heads, KV heads, head dim and block size."""

    def cases(device, dtype):
        for name, (lengths, counts) in ROWS.items():
            call = make_call(lengths, counts, *heads, dtype, kv_dtype, **extras)
            yield name, paged_attention(on(device, call)), attention_reference.paged_attention(call)

    return cases


def norms(device, dtype):
    for shape in ((1, 1), (3, 63), (5, 1500), (70, 3584)):
        x, residual = torch.randn(2, *shape).to(dtype)
        weight = torch.randn(shape[-1]).to(dtype)
        moved = on(device, (x, residual.clone(), weight))
        yield f"rms_norm {shape}", rms_norm.rms_norm(moved[0], moved[2], 1e-6), rms_norm.reference.rms_norm(x, weight, 1e-6)
        got = rms_norm.add_rms_norm(*moved, 1e-6)
        expected = rms_norm.reference.add_rms_norm(x, residual, weight, 1e-6)
        yield f"add_rms_norm {shape}", got[0], expected[0]
        yield f"residual {shape}", got[1], expected[1]


def activations(device, dtype):
    x = (torch.randn(3, 2 * 1100) * 5).to(dtype)
    gate, up = x.float().chunk(2, dim=-1)
    yield "silu", silu_mul.silu_mul(on(device, x)), silu_mul.reference.silu_mul(x)
    yield "gelu", silu_mul.gelu_mul(on(device, x)), gelu(gate) * up
    yield "gelu tanh", silu_mul.gelu_mul(on(device, x), tanh=True), gelu(gate, approximate="tanh") * up


def _heads(dtype, dim):
    heads = torch.randn(4, 10, dim).to(dtype)
    return heads[:, :6], heads[:, 6:8], heads[:, 8:]


def rotations(device, dtype):
    for dim, turned in ((20, 20), (64, 32), (128, 128)):
        q, k, _ = _heads(dtype, dim)
        table, positions = torch.randn(50, turned), torch.tensor([3, 49, 0, 3])
        mine = on(device, (q, k, positions, table))
        rotary.rotary(*mine)
        rotary.reference.rotary(q, k, positions, table)
        yield f"q {dim}", mine[0], q
        yield f"k {dim}", mine[1], k


def _cache(dtype, dim, device):
    shape = (2, 5, 2, dim)
    if dtype.itemsize > 1:
        return torch.zeros(4, 3, *shape, dtype=dtype, device=device)[:, 1]
    raw = torch.zeros(4, 3, 2, half_bytes(shape), dtype=torch.uint8, device=device)
    return view_quantized(raw[:, 1], shape, dtype)


def _content(kv):
    return dequantize(*kv) if isinstance(kv, QuantizedKV) else kv


def stores(device, dtype):
    slots, positions, cpu = torch.tensor([7, 0, 19, 12]), torch.tensor([3, 49, 0, 3]), torch.device("cpu")
    for dim, turned in ((20, 20), (64, 32), (128, 128)):
        table, norm = torch.randn(50, turned), (torch.randn(dim).to(dtype), torch.randn(dim).to(dtype), 1e-5)
        for kv_dtype in (dtype, torch.int8, torch.float8_e4m3fn):
            for given in (None, norm):
                q, k, v = _heads(dtype, dim)
                mine, expected = _cache(kv_dtype, dim, device), _cache(kv_dtype, dim, cpu)
                got_q, *rest = on(device, (q, k, v))
                store_kv.rotary_store_kv(got_q, *rest, mine, *on(device, (positions, slots, table)), on(device, given))
                if given is not None:
                    q, k = (rms_norm.reference.rms_norm(x, w, given[2]) for x, w in ((q, given[0]), (k, given[1])))
                rotary.reference.rotary(q, k, positions, table)
                store_kv.reference.store_kv(k, v, expected, slots)
                yield f"q {dim} {kv_dtype} {given is None}", got_q, q
                yield f"kv {dim} {kv_dtype} {given is None}", _content(mine), _content(expected)


def embeddings(device, dtype):
    table, ids = torch.randn(7, 1100).to(dtype)[:, :1030], torch.tensor([[6, 0], [-1, 7], [3, 1 << 40]])
    yield "embedding", embedding.embedding(*on(device, (ids, table))), embedding.reference.embedding(ids, table)


def linears(device, dtype):
    for rows, width, depth in ((1, 96, 272), (2, 4100, 512), (3, 96, 272), (8, 640, 1024), (64, 96, 272), (65, 33, 48)):
        x, weight, bias = (
            torch.randn(rows, depth).to(dtype),
            torch.randn(width, depth).to(dtype),
            torch.randn(width).to(dtype),
        )
        moved = on(device, (x, weight, bias))
        expected = x.float() @ weight.float().T + bias.float()
        yield f"linear {rows} {width}", linear.linear(*moved), expected
        yield f"float32 {rows} {width}", linear.linear(*moved, out_dtype=torch.float32), expected
        if width % 32 == 0:
            got = linear.gated_linear(*moved, silu_mul.silu_mul)
            yield f"gated {rows} {width}", got, silu_mul.reference.silu_mul(expected)


def products_fp8(device, dtype):
    for rows, width, depth, block, kind in (
        (1, 33, 300, None, "float"), (3, 130, 384, (128, 128), "float"), (20, 40, 256, (128, 128), "group"),
        (70, 70, 96, None, "token"),
    ):  # fmt: skip
        x, weight = torch.randn(rows, depth).to(dtype), (torch.randn(width, depth) * 9).to(torch.float8_e4m3fn)
        grid = (width,) if block is None else (-(-width // block[0]), -(-depth // block[1]))
        scale = torch.rand(grid) * 0.1
        dense = fp8_linear.dequantize(weight, scale, block)
        moved = on(device, (x, weight, scale))
        if kind == "float":
            yield f"{rows} {block}", fp8_linear.fp8_linear(*moved, block=block), x.float() @ dense.T
        else:
            given = {"block": block, "activations": kind}
            yield f"{rows} {kind}", fp8_linear.fp8_linear(*moved, **given), fp8_linear.fp8_linear(x, weight, scale, **given)


def products_grouped(device, dtype):
    for rows, width, depth, bits, group in (
        (1, 33, 300, 4, 128),
        (5, 70, 256, 4, 32),
        (70, 96, 272, 8, 64),
        (20, 40, 130, 4, 33),
    ):
        q = torch.randint(1 << bits, (width, depth), dtype=torch.uint8)
        scale = torch.rand(width, -(-depth // group)) * 0.02 + 0.001
        offset = -scale * (1 << (bits - 1)) * (1 + torch.rand_like(scale) * 0.1)
        weight = grouped_linear.pack(*on(device, (q, scale, offset)), bits=bits, group_size=group)
        x = torch.randn(rows, depth).to(dtype)
        got = grouped_linear.grouped_linear(on(device, x), weight)
        yield f"{rows} {bits} {group}", got, x.float() @ grouped_linear.unpack(weight).cpu().T


def products_int8(device, dtype):
    for rows, width, depth, x_scale in ((1, 33, 300, None), (20, 70, 130, 0.02), (70, 130, 64, None)):
        x, q, scale = (
            torch.randn(rows, depth).to(dtype),
            torch.randint(-127, 128, (width, depth)).to(torch.int8),
            torch.rand(width),
        )
        given = None if x_scale is None else torch.tensor(x_scale)
        weight = int8_linear.pack(*on(device, (q, scale)))
        got = int8_linear.int8_linear(on(device, x), weight, x_scale=on(device, given))
        yield f"{rows} {x_scale}", got, int8_linear.reference.int8_linear(x, q, scale, None, given, 0)


def loras(device, dtype):
    for slots, outputs, depth, ranks, rows in (
        (1, (7,), 5, [[8]], [0]),
        (3, (33, 300, 16), 77, [[16, 0, 3], [5, 7, 1], [0, 0, 0]], [-1, 0, 2, 1, 1, 2, -1, 0]),
        (2, (70, 1), 130, [[16, 9], [1, 2]], [0] * 39 + [1, -1] + [0] * 5),
    ):
        starts = (0, *torch.tensor(outputs).cumsum(0).tolist())
        a, b = torch.randn(slots, len(outputs), 16, depth).to(dtype), torch.randn(slots, 16, starts[-1]).to(dtype)
        weights = lora.LoraWeights(a, b, torch.tensor(ranks, dtype=torch.int32), starts)
        x, y = torch.randn(len(rows), depth).to(dtype), torch.randn(len(rows), starts[-1]).to(dtype)
        mine = lora.LoraWeights(*on(device, (a, b, weights.ranks)), starts)
        got = lora.add_lora(*on(device, (y.clone(), x)), mine, lora.rows_of_slots(torch.tensor(rows), slots, device))
        wide = lora.LoraWeights(a.float(), b.float(), weights.ranks, starts)
        used = lora.rows_of_slots(torch.tensor(rows), slots, torch.device("cpu"))
        yield f"{slots} {outputs}", got, lora.reference.add_lora(y.float(), x.float(), wide, used)


def mixtures(device, dtype):
    for tokens, k, count in ((1, 1, 3), (16, 8, 40), (300, 2, 5)):
        hidden, inner = 96, 64
        gate_up = [(torch.randn(2 * inner, hidden) / hidden**0.5).to(dtype) for _ in range(count)]
        down = [(torch.randn(hidden, inner) / inner**0.5).to(dtype) for _ in range(count)]
        x, (ids, weights) = (
            torch.randn(tokens, hidden).to(dtype),
            experts.route(torch.randn(tokens, count), k, normalized=True),
        )
        mine = [_stacked([on(device, one) for one in each]) for each in (gate_up, down)]
        got = experts.experts(*on(device, (x, ids.contiguous(), weights)), *mine)
        wide = [experts.ExpertWeights([one.float() for one in each]) for each in (gate_up, down)]
        yield f"{tokens} {k} {count}", got, experts.reference.experts(x.float(), ids, weights, *wide, silu_mul.silu_mul)


def _stacked(each):
    stack = experts.Stack(len(each))
    for number, weight in enumerate(each):
        stack.take(number, weight)
    return experts.ExpertWeights(each, stack.weight)


def inputs(device, dtype):
    for counts, places in (([1], 1), ([5, 1, 70, 0, 1], 77), ([1] * 131, 160)):
        num_rows = len(counts)
        columns = torch.stack((torch.randperm(140)[:num_rows], torch.randint(0, 50, (num_rows,)), torch.tensor(counts)))
        tokens, blocks = torch.randint(0, 999, (140, 130)).int(), torch.randint(0, 99, (140, 30)).int()
        mine, expected = (prepare_batch.new_inputs(places, num_rows, at) for at in (device, columns.device))
        prepare_batch.prepare_batch(mine, *on(device, (columns, tokens, blocks)), 5, pad_slot=13)
        prepare_batch.reference.prepare_batch(expected, columns, tokens, blocks, 5, 13)
        for name, got, wanted in zip(mine._fields, mine, expected, strict=True):
            yield f"{name} {counts[:3]}", got, wanted


KNOBS = (  # 1 / temperature, top_k, top_p, min_p
    (0.0, 1e6, 0.5, 0.0), (1.0, 1e6, 1.0, 0.0), (0.5, 5, 0.9, 0.0), (1.25, 1e6, 1.0, 0.0625), (2.0, 1, 0.25, 0.0),
    (1.0, 20, 1.0, 0.0), (1.0, 1e6, 0.95, 0.0), (1.0, 3, 0.25, 1.0), (1.0, 129, 0.75, 0.0),
)  # fmt: skip


def samples(device, dtype):
    """Tokens must be the same ones: the reference is the torch sampler's, on the same device."""
    for width in (7, 3003, 151_936):
        values = torch.tensor(KNOBS, dtype=torch.float64)
        values[:, 1].clamp_(max=width)
        knobs = sampling.Knobs(torch.randint(-(1 << 62), 1 << 62, (len(KNOBS),)), values)
        logits, rows = torch.randn(len(KNOBS), width) * 4, torch.randperm(len(KNOBS))
        call = on(device, (logits, rows, torch.randint(1, 1 << 20, (len(KNOBS),)), knobs))
        got, expected = sampling.sample(*call), sampling.reference.sample(*call)
        yield f"tokens {width}", got[0], expected[0]
        yield f"largest {width}", got[1], expected[1]


def punished(device, dtype):
    width, num = 3003, 5
    token_ids, counts = torch.randint(0, 60, (9, 700)).int(), torch.tensor([0, 700, 7, 1, 300])
    facts = torch.stack((torch.full((9,), 5.0), torch.rand(9) + 0.5, torch.rand(9), torch.randn(9)), 1)
    bias = penalties.Bias(torch.tensor([0, 2, 2, 3, 3, 3]).int(), torch.tensor([3, 9, 3002]), torch.tensor([1.0, -2.0, 5.0]))
    logits, rows = torch.randn(num, width) * 4, torch.randperm(9)[:num]
    call = on(device, (logits.clone(), rows, counts, token_ids, facts))
    got = penalties.penalise(*call, penalties.new_scratch(9, width, device), on(device, bias))
    yield "penalties", got, penalties.reference.penalise(logits, rows, counts, token_ids, facts, bias)


def told(device, dtype):
    logits, tokens = torch.randn(4, 151_936) * 3, torch.tensor([0, 151_935, 77, 5])
    got = logprobs.token_logprobs(*on(device, (logits, tokens)), 6)
    expected = logprobs.reference.token_logprobs(logits, tokens, 6)
    yield from zip(got._fields, got, expected, strict=True)


def copied(device, dtype):
    for shape in ((9, 3, 2, 16, 2, 64), (5, 7), (6, 1, 3)):
        pool, ids = torch.randn(shape).to(dtype), torch.randperm(shape[0])
        sources, targets = ids[:2].clone(), ids[2:4].clone()
        mine = on(device, pool)
        copy_blocks.copy_blocks(mine, *on(device, (sources, targets)))
        pool[targets] = pool[sources]
        yield f"{shape}", mine, pool


def masked(device, dtype):
    logits, places = torch.randn(5, 3003), torch.tensor([4, 0])
    words = torch.randint(-(1 << 31), 1 << 31, (2, 94)).to(torch.int32)
    got = bitmask.mask_logits(*on(device, (logits.clone(), places, words)))
    expected = bitmask.reference.mask_logits(logits.clone(), places, words)
    yield "barred", got.isinf(), expected.isinf()
    yield "others", got.nan_to_num(neginf=0.0), expected.nan_to_num(neginf=0.0)


CASES = {
    "paged_attention": attention(14, 2, 64, 16),
    "paged_attention: 80, all else": attention(6, 3, 80, 4, **EXTRAS),
    "paged_attention: 128": attention(32, 8, 128, 16),
    "paged_attention: 256": attention(4, 2, 256, 16),
    "quantized_kv": attention(8, 1, 128, 16, kv_dtype=torch.int8),
    "quantized_kv: fp8": attention(14, 2, 64, 16, kv_dtype=torch.float8_e4m3fn),
    "rms_norm": norms, "silu_mul": activations, "rotary": rotations,
    "store_kv": stores, "embedding": embeddings, "linear": linears, "fp8_linear": products_fp8,
    "grouped_linear": products_grouped, "int8_linear": products_int8, "lora": loras, "experts": mixtures,
    "prepare_batch": inputs, "sampling": samples, "penalties": punished, "logprobs": told, "bitmask": masked,
    "copy_blocks": copied,
}  # fmt: skip
"""By the kernel's folder, and behind a colon what is special."""
