"""Attention by installed libraries: the same results as plain attention, no wait, no copy of the cache."""

import inspect
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model.step_driver import StepDriver, make_runner, model_parts
from model.tiny_models import make_model, prompts, save_model
from plugins.attention import library_fakes
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import varlen

from llmd.api.v1 import AttentionBackendSpec, AttentionExtras, HeadTurn, LibraryAttention, LibraryStep
from llmd.api.v1.testing.attention import check_attention_backend
from llmd.api.v1.testing.paged import PagedRows
from llmd_kernels.paged_attention import AttentionCall, libraries
from llmd_kernels.paged_attention.libraries import Speed
from llmd_kernels.quantized_kv import QuantizedKV
from llmd_plugins.attention import reference
from llmd_plugins.attention.flash_attn import FlashAttention2, FlashAttention3
from llmd_plugins.attention.flashinfer import FlashInfer
from llmd_plugins.attention.torch_varlen import TorchVarlen

TORCHS_OWN = varlen.varlen_attn
LIBRARIES = {library.name: library for library in (FlashAttention2, FlashAttention3, FlashInfer, TorchVarlen)}


@pytest.fixture
def installed(monkeypatch):
    """Where all of them can be imported."""
    library_fakes.install(monkeypatch)
    return monkeypatch


class OnCpu(LibraryAttention):
    """Answers on a CPU as it would on a GPU."""

    def why_not(self, needs):
        return super().why_not(replace(needs, device="cuda"))


def test_the_fakes_are_called_as_torchs_own():
    names = [
        [
            (parameter.name, parameter.kind, parameter.default)
            for parameter in inspect.signature(function).parameters.values()
        ]
        for function in (TORCHS_OWN, library_fakes.varlen_attn)
    ]
    assert names[0] == names[1]


@pytest.mark.parametrize("name", LIBRARIES)
def test_it_keeps_the_contract(name, installed):
    installed.setattr(library_fakes, "PAGE_MULTIPLE", 4)
    library = LIBRARIES[name]()
    library.limits = replace(library.limits, block_multiple=1)
    check_attention_backend(OnCpu(library), dtype=torch.bfloat16, num_cases=16)


@pytest.mark.parametrize("name", LIBRARIES)
def test_it_keeps_the_contract_where_it_decodes_too(name, installed):
    installed.setattr(library_fakes, "PAGE_MULTIPLE", 4)
    for dim in (16, 64, 128):
        installed.setitem(libraries._TABLE, (name, "cpu", dim), Speed(2.0, 2.0))
    library = LIBRARIES[name]()
    library.limits = replace(library.limits, block_multiple=1)
    check_attention_backend(OnCpu(library), dtype=torch.bfloat16, num_cases=12, seed=3)


class Case:
    """Rows of a layer in the middle of a pool, as models hand them over: nothing but heads and numbers is dense."""

    def __init__(self, lens, counts, *, block_size, dim=64, kv_heads=2, group=2, seed=0):
        torch.manual_seed(seed)
        self.rows = PagedRows(lens, block_size=block_size, seed=seed)
        self.lens, self.counts, self.dim = lens, counts, dim
        pool = torch.zeros(self.rows.num_blocks, 3, 2, block_size, kv_heads, dim, dtype=torch.bfloat16)
        self.kv = pool[:, 1]
        self.heads = (kv_heads * group, kv_heads, kv_heads)

    def drawn(self, counts):
        """q, k, v as one projection gives them."""
        both = torch.randn(sum(counts), sum(self.heads), self.dim).bfloat16()
        return both.split(self.heads, dim=1)

    def step(self, backend, starts, counts, qkv, kv, **options):
        batch = self.rows.batch(starts, counts, [i for i, count in enumerate(counts) if count])
        options = {"scale": self.dim**-0.5, "window": None, **options}
        return backend.forward(*(x.clone() for x in qkv), kv, backend.prepare(batch), **options)

    def compare(self, backend, **options):
        """Two steps, both with the backend and the reference, over caches that begin equal."""
        starts = [length - count for length, count in zip(self.lens, self.counts, strict=True)]
        found, expected = self.kv, self.kv.clone()
        for begin, counts in (([0] * len(starts), starts), (starts, self.counts)):
            if not any(counts):
                continue
            qkv = self.drawn(counts)
            out = self.step(backend, begin, counts, qkv, found, **options)
            plain = self.step(reference.ReferenceAttention(), begin, counts, qkv, expected, **options)
            assert out.is_contiguous()
            torch.testing.assert_close(out.float(), plain.float(), rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(found, expected)


OPTIONS = {
    "plain": {},
    "a window": {"window": 37},
    "a window of one": {"window": 1},
    "a soft cap": {"extras": AttentionExtras(soft_cap=5.0)},
    "both": {"window": 300, "extras": AttentionExtras(soft_cap=3.0), "scale": 0.3},
    "ALiBi": {"extras": AttentionExtras(alibi_slopes=torch.tensor([0.5, 0.1, 0.03, 0.25]))},
}
LACKS = {"flash_attn_3": {"ALiBi"}, "flashinfer": {"ALiBi"}, "torch_varlen": {"ALiBi", "a soft cap", "both"}}
SERVED = [(name, option) for name in LIBRARIES for option in OPTIONS if option not in LACKS.get(name, ())]


@pytest.mark.parametrize("decodes", [False, True])
@pytest.mark.parametrize(("name", "option"), SERVED)
def test_the_same_as_plain_attention_at_its_own_block_size(name, option, decodes, installed):
    """Prompts beside decodes, then decodes alone; rows that end within, at and behind a block's end."""
    if decodes:
        installed.setitem(libraries._TABLE, (name, "cpu", 64), Speed(2.0, 2.0))
    for lens, counts in [((1, 257, 300, 512), (1, 40, 1, 256)), ((513, 2, 256), (1, 1, 1))]:
        Case(lens, counts, block_size=256).compare(LibraryAttention(LIBRARIES[name]()), **OPTIONS[option])


@pytest.mark.parametrize("name", ["flash_attn_3", "flashinfer"])
@settings(max_examples=15, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=5),
    block_size=st.sampled_from([1, 3, 16, 24]),
    window=st.none() | st.integers(1, 70),
)
def test_blocks_of_any_size(name, rows, block_size, window):
    with pytest.MonkeyPatch.context() as monkeypatch:
        library_fakes.install(monkeypatch)
        case = Case([max(row) for row in rows], [min(row) for row in rows], block_size=block_size)
        case.compare(LibraryAttention(LIBRARIES[name]()), window=window)


@pytest.mark.parametrize("name", LIBRARIES)
def test_heads_are_turned_and_stored_first(name, installed):
    case = Case((260, 5), (20, 1), block_size=256)
    qkv = case.drawn((20, 1))
    batch = case.rows.batch([240, 4], [20, 1])
    angles = torch.rand(300, 32)
    turn = HeadTurn(batch.positions, torch.cat((angles.cos(), angles.sin()), dim=1), None)
    backend, found, expected = LibraryAttention(LIBRARIES[name]()), case.kv, case.kv.clone()
    out = case.step(backend, [240, 4], [20, 1], qkv, found, turn=turn)
    q, k = (torch.cat(
        (x[..., :32] * angles.cos()[batch.positions, None] - x[..., 32:] * angles.sin()[batch.positions, None],
         x[..., 32:] * angles.cos()[batch.positions, None] + x[..., :32] * angles.sin()[batch.positions, None]), dim=-1,
    ).bfloat16() for x in (qkv[0].float(), qkv[1].float()))  # fmt: skip
    plain = case.step(reference.ReferenceAttention(), [240, 4], [20, 1], (q, k, qkv[2]), expected)
    torch.testing.assert_close(out.float(), plain.float(), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", LIBRARIES)
def test_which_steps_the_library_has(name, installed):
    """Prompts alone, until decode was measured to be quicker, in which case what was measured counts for both."""
    seen = []
    library = LIBRARIES[name]()
    attend = library.attend
    library.attend = lambda call, step: seen.append(call.max_query_len) or attend(call, step)
    cases = [(None, [4]), (Speed(0.9, 0.8), [4]), (Speed(1.2, 1.2), [4, 1]), (Speed(1.2, 0.9), [1]), (Speed(1.01, 1.4), [4])]
    for speed, expected in cases:
        seen.clear()
        if speed is not None:
            installed.setitem(libraries._TABLE, (name, "cpu", 64), speed)
        backend = LibraryAttention(library)
        Case((4, 2), (4, 2), block_size=256).compare(backend)
        Case((4, 2), (1, 1), block_size=256).step(
            backend, [3, 1], [1, 1], Case((4, 2), (1, 1), block_size=256).drawn((1, 1)),
            torch.zeros(5, 2, 256, 2, 64, dtype=torch.bfloat16),
        )  # fmt: skip
        assert seen == [n for n in expected if n > 1 or name != "flashinfer"]


def test_flashinfer_never_waits_and_plans_once_for_each_kind_of_layer(installed):
    waits, plans = [], []
    cpu, plan = torch.Tensor.cpu, library_fakes.BatchPrefillWithPagedKVCacheWrapper.plan
    installed.setattr(torch.Tensor, "cpu", lambda tensor: waits.append(tensor) or cpu(tensor))
    installed.setattr(
        library_fakes.BatchPrefillWithPagedKVCacheWrapper, "plan",
        lambda wrapper, *args, **options: plans.append(wrapper) or plan(wrapper, *args, **options),
    )  # fmt: skip
    backend, case = LibraryAttention(FlashInfer()), Case((20, 33), (20, 30), block_size=16)
    for num_steps in (1, 2, 3):
        batch = case.rows.batch([0, 3], [20, 30])
        meta, (q, k, v) = backend.prepare(batch), case.drawn((20, 30))
        for window in (None, 8, None, 8, 8):
            backend.forward(q, k, v, case.kv, meta, scale=0.125, window=window)
        assert (len(waits), len(plans), len(set(plans))) == (0, 2 * num_steps, min(4, 2 * num_steps))


META_LIBRARIES = [name for name in LIBRARIES if name != "flashinfer"]


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("name", META_LIBRARIES)
def test_nothing_waits_and_shapes_hang_on_rows_alone(name, count, installed):
    """On tensors that hold no numbers, whose reading is an error; what the library is handed is a view of the cache."""
    given_to_it = {}

    def library(*arguments, **options):
        given_to_it.update(zip("qkv", arguments, strict=False), **options)
        return arguments[0]

    for module in ("flash_attn", "flash_attn_interface"):
        stub = ModuleType(module)
        stub.flash_attn_varlen_func = stub.flash_attn_with_kvcache = library
        installed.setitem(sys.modules, module, stub)
    installed.setattr("torch.nn.attention.varlen.varlen_attn", library)
    kv = torch.empty(9, 3, 2, 256, 2, 64, device="meta", dtype=torch.bfloat16)[:, 1]
    rows = torch.empty(3, dtype=torch.int64, device="meta")
    table = torch.empty(8, 40, dtype=torch.int32, device="meta")
    lens = torch.empty(3, dtype=torch.int32, device="meta")
    starts = torch.empty(4, dtype=torch.int32, device="meta")
    q = torch.empty(3 * count, 4, 64, device="meta", dtype=torch.bfloat16)
    step = LibraryStep(SimpleNamespace(max_seq_len=2000))
    call = AttentionCall(q, kv, table, rows, starts, lens, count, 0.125)
    assert LIBRARIES[name]().attend(call, step).shape == q.shape
    handed = given_to_it["k"], given_to_it["v"], given_to_it.get("block_table", given_to_it.get("page_table"))
    assert handed[0].stride() == kv[:, 0].stride()
    assert handed[1].storage_offset() == kv[:, 1].storage_offset()
    assert handed[2].shape == (3, 8)
    assert step.block_table(call) is handed[2]


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_cache_of_eight_bits_is_refused_before_the_library_sees_it(name, installed):
    kv = QuantizedKV(torch.zeros(2, 2, 256, 2, 64, dtype=torch.int8), torch.zeros(2, 2, 256, 2, dtype=torch.bfloat16))
    columns = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([0]), torch.tensor([0, 2]).int(), torch.tensor([2]).int()
    call = AttentionCall(torch.zeros(2, 4, 64).bfloat16(), kv, *columns, 2, 0.125)
    with pytest.raises(ValueError, match="not a cache of eight bits"):
        LIBRARIES[name]().attend(call, LibraryStep(SimpleNamespace(max_seq_len=2, host_lens=np.array([[0], [2]]))))


def test_a_device_that_only_compiles_launches_no_library(installed):
    """Its tensors have no numbers, and its torch believes in a GPU."""
    library = FlashAttention2()
    library.attend = lambda call, step: pytest.fail("launched")
    installed.setattr("llmd_kernels.store_kv.store_kv", lambda *_: None)
    installed.setattr("llmd_kernels.gpu.device_name", lambda device: "sm_90")
    with FakeTensorMode():
        q, k, v = (torch.empty(3, heads, 64, dtype=torch.bfloat16) for heads in (4, 2, 2))
        kv, columns = torch.empty(2, 2, 256, 2, 64), torch.empty(2, dtype=torch.int32)
        batch = SimpleNamespace(
            slot_mapping=columns,
            block_tables=(columns,),
            rows=columns,
            query_start=columns,
            seq_lens=columns,
            max_query_len=2,
        )
        out = LibraryAttention(library).forward(q, k, v, kv, LibraryStep(batch), scale=1.0, window=None)
    assert out.shape == q.shape


@pytest.mark.parametrize("name", ["flash_attn_3", "flash_attn"])
@pytest.mark.parametrize("decodes", [False, True])
def test_a_whole_model_writes_the_same_tokens(name, decodes, monkeypatch, tmp_path):
    """Chunks of a prompt, tokens beside another's prompt, then tokens alone, through a runner."""
    path = save_model(make_model("Qwen3", head_dim=16), tmp_path)  # by transformers, which looks for libraries itself
    library_fakes.install(monkeypatch)
    if decodes:
        monkeypatch.setitem(libraries._TABLE, (name, "cpu", 16), Speed(2.0, 2.0))
    spec = AttentionBackendSpec(name=name, summary="", build=lambda: OnCpu(LIBRARIES[name]()))
    parts = replace(model_parts(), attention_backends={**model_parts().attention_backends, name: spec})
    found = []
    for backend in (name, "reference"):
        runner = make_runner(path, dtype="bfloat16", attention_backend=backend, parts=parts, cache={"block_size": 256})
        assert runner.info.attention_backend == backend
        driver = StepDriver(runner)
        first, second = (driver.sequence(prompts(length)[0]) for length in (40, 9))
        driver.step([(first, 23)])
        driver.step([(first, 17)])
        driver.step([(first, 1), (second, 9)])
        for _ in range(4):
            driver.step([(first, 1), (second, 1)])
        found.append((first.tokens, second.tokens))
    assert found[0] == found[1]
