"""Wheels that know nothing of llmd but llmd.api.v1: architectures, a quantizer, a route with an authenticator."""

import ast
import json
import sys

import torch
from safetensors.torch import save_file
from wheels.building import GOOD, HERE, run

from llmd.api.v1 import LLM, SamplingParams
from llmd.api.v1.testing import (
    Server,
    Wanted,
    check_architecture,
    check_authenticator,
    check_plugin,
    check_quantization,
    check_route,
    make_tiny_model,
)

SIZE, HEADS, KV_HEADS, DIM, INNER, VOCAB, LAYERS = 64, 4, 2, 16, 96, 258, 2


def test_they_import_only_the_public_api():
    for file in HERE.glob("acme-*/**/*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [module]
            assert all(name == "llmd.api.v1" for name in names if name.split(".")[0] in ("llmd", "llmd_plugins")), file


def test_they_are_listed(environment):
    rows = json.loads(run(sys.executable, "-m", "llmd", "plugins", "--json", env=environment))
    mine = {row["distribution"]: row for row in rows if row["distribution"] in GOOD}
    assert set(mine) == set(GOOD)
    assert {row["state"] for row in mine.values()} == {"loaded"}
    assert mine["acme-gate"]["provides"] == ["authenticators.acme_gate", "routes.acme.whoami"]


def weights(seed=0):
    """A checkpoint of the parallel decoder."""
    torch.manual_seed(seed)
    shapes = {"embed.weight": (VOCAB, SIZE), "norm.weight": (SIZE,), "head.weight": (VOCAB, SIZE)}
    for layer in range(LAYERS):
        linears = {"q": (HEADS * DIM, SIZE), "k": (KV_HEADS * DIM, SIZE), "v": (KV_HEADS * DIM, SIZE)}
        linears |= {"o": (SIZE, HEADS * DIM), "gate": (INNER, SIZE), "up": (INNER, SIZE), "down": (SIZE, INNER)}
        shapes |= {f"blocks.{layer}.{name}_proj.weight": shape for name, shape in linears.items()}
        shapes |= {f"blocks.{layer}.norm.weight": (SIZE,), f"blocks.{layer}.gates.gate": (HEADS,)}
    return {name: 0.2 * torch.randn(shape) + (1 if name.endswith("norm.weight") else 0) for name, shape in shapes.items()}


def rotated(x, theta=10000.0):
    """[L, H, D] with each half-pair turned by its position."""
    half = x.shape[2] // 2
    angle = torch.arange(x.shape[0]).unsqueeze(1) * theta ** (-torch.arange(half) / half)
    cos, sin = angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)
    return torch.cat([x[..., :half] * cos - x[..., half:] * sin, x[..., half:] * cos + x[..., :half] * sin], dim=2)


def normed(x, weight):
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


def reference(tensors, token_ids):
    """[L, V], from the formulas and no layer of llmd's."""
    x, length = tensors["embed.weight"][list(token_ids)], len(token_ids)
    for layer in range(LAYERS):
        prefix = f"blocks.{layer}."
        w = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        y = normed(x, w["norm.weight"])
        q, k, v = ((y @ w[f"{name}_proj.weight"].T).view(length, -1, DIM) for name in "qkv")
        k, v = (part.repeat_interleave(HEADS // KV_HEADS, dim=1) for part in (rotated(k), v))
        scores = torch.einsum("nhd,lhd->hnl", rotated(q), k) / DIM**0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
        heads = torch.einsum("hnl,lhd->nhd", scores.softmax(-1), v) * w["gates.gate"].sigmoid().unsqueeze(1)
        inner = torch.nn.functional.silu(y @ w["gate_proj.weight"].T) * (y @ w["up_proj.weight"].T)
        x = x + heads.flatten(1) @ w["o_proj.weight"].T + inner @ w["down_proj.weight"].T
    return normed(x, tensors["norm.weight"]) @ tensors["head.weight"].T


def test_architecture(installed, tmp_path):
    folder = make_tiny_model(tmp_path, architectures=["AcmeParallelForCausalLM"], model_type="acme")
    tensors = weights()
    save_file(tensors, folder / "model.safetensors")
    check_architecture(folder, reference=lambda token_ids: reference(tensors, token_ids))


def test_quantizer(installed):
    from acme_ternary import llmd_register_quantizations
    from acme_ternary.linear import pack, unpack

    ternary = torch.randint(-1, 2, (5, 13), dtype=torch.int8)
    assert torch.equal(unpack(pack(ternary), 13), ternary)
    check_quantization(*llmd_register_quantizations(), max_bits=2.1)


def test_quantizer_and_architecture_together(installed, tmp_path):
    """Neither knows of the other."""
    folder = make_tiny_model(tmp_path, architectures=["AcmeParallelForCausalLM"], model_type="acme")
    with LLM(model=str(folder), load_format="dummy", device="cpu", dtype="float32", quantization="ternary") as llm:
        (output,) = llm.generate("hello", SamplingParams(max_tokens=5, ignore_eos=True), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 5


def test_gate_by_the_kit(installed):
    from acme_gate import Gate, llmd_register_routes, sign

    known = {"Authorization": f"ticket ann {sign('s', 'ann')}"}
    unknown = [
        {"Authorization": f"ticket bob {sign('s', 'ann')}"},
        {"Authorization": "ticket ann é"},
        {"Authorization": "ticket"},
    ]
    check_authenticator(Gate("s"), known=[known], unknown=unknown)
    check_route(*llmd_register_routes(), [Wanted(200), Wanted(405, "POST", body={})])


def test_gate_in_a_daemon(site, tmp_path, installed):
    from acme_gate import sign

    folder = make_tiny_model(tmp_path / "model")
    arguments = (str(folder), "--load-format", "dummy", "--device", "cpu", "--quantization", "ternary")
    with Server(*arguments, PYTHONPATH=str(site), ACME_GATE_SECRET="s") as server:
        assert server.request("GET", "/acme/whoami").status == 401
        headers = {"Authorization": f"ticket ann {sign('s', 'ann')}"}
        assert server.request("GET", "/acme/whoami", headers=headers).json() == {"key": "ticket-of-ann"}
        answer = server.request("POST", "/v1/completions", {"prompt": "hi", "max_tokens": 3}, headers)
        assert answer.status == 200, answer.body
        assert answer.json()["usage"]["completion_tokens"] <= 3


def test_verdicts(installed):
    for name in GOOD:
        verdict = check_plugin(name)
        assert verdict.is_good, verdict
        assert [finding for finding in verdict.findings if finding.check == "contract"]


def test_nothing_of_them_is_left_in_our_own_tree():
    assert not list(HERE.glob("**/*.whl"))
