"""Layers load their parts and their rank's slices, and together the ranks compute what one device does."""

import pytest
import torch

from llmd.errors import ModelError
from llmd.model.config import parse_config
from llmd.model.layers import Layers, Shard
from llmd.model.quantization import PartMethods, Unquantized

CPU = torch.device("cpu")


def make_layers(rank=0, world=1, **changes):
    config = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 4, "intermediate_size": 10,
        "max_position_embeddings": 64, **changes,
    }  # fmt: skip
    return Layers(parse_config(config), None, dtype=torch.float32, device=CPU, max_model_len=64, shard=Shard(rank, world))


def load(layer, tensors, name="block.linear"):
    """Fill a linear as the loader does; the names that it asked for."""
    layer.name, layer.method = name, Unquantized()
    layer.method.create_weights(layer)
    slots = list(layer.weight_slots())
    for slot in slots:
        assert tuple(tensors[slot.name].shape) == slot.shape
        slot.load(tensors[slot.name])
    layer.finish_weights()
    return [slot.name for slot in slots]


def random_tensors(**shapes):
    torch.manual_seed(0)
    return {f"block.{name}": torch.randn(shape) for name, shape in shapes.items()}


QKV = {
    f"{part}_proj.{kind}": shape
    for part, rows in (("q", 24), ("k", 8), ("v", 8))
    for kind, shape in (("weight", (rows, 24)), ("bias", (rows,)))
}


@pytest.mark.parametrize("world", [1, 2])
def test_qkv_is_merged_from_its_parts(world):
    tensors, x = random_tensors(**QKV), torch.randn(3, 24)
    found = {"q": [], "k": [], "v": []}
    for rank in range(world):
        layers = make_layers(rank, world)
        linear = layers.qkv(bias=True)
        assert sorted(load(linear, tensors)) == sorted(tensors)
        for part, heads in zip("qkv", layers.split_qkv(linear(x)), strict=True):
            found[part].append(heads)
    for part, heads in found.items():
        expected = x @ tensors[f"block.{part}_proj.weight"].T + tensors[f"block.{part}_proj.bias"]
        torch.testing.assert_close(torch.cat(heads, 1).flatten(1), expected)


def test_more_ranks_than_kv_heads_share_them():
    tensors, x = random_tensors(**QKV), torch.randn(3, 24)
    expected = (x @ tensors["block.k_proj.weight"].T + tensors["block.k_proj.bias"]).view(3, 2, 4)
    for rank in range(6):
        layers = make_layers(rank, 6)
        linear = layers.qkv(bias=True)
        load(linear, tensors)
        _, k, _ = layers.split_qkv(linear(x))
        torch.testing.assert_close(k[:, 0], expected[:, rank // 3])
    with pytest.raises(ModelError, match="one must divide the other"):
        make_layers(0, 3).qkv()


@pytest.mark.parametrize("world", [1, 2])
def test_an_mlp_is_the_sum_of_its_ranks(world, monkeypatch):
    shapes = {
        "gate_proj.weight": (10, 24),
        "up_proj.weight": (10, 24),
        "down_proj.weight": (24, 10),
        "down_proj.bias": (24,),
    }
    tensors, x = random_tensors(**shapes), torch.randn(3, 24)
    monkeypatch.setattr(Shard, "reduce", lambda self, y: y)  # added up below
    total = torch.zeros(3, 24)
    for rank in range(world):
        layers = make_layers(rank, world)
        gate_up, down = layers.gate_up(), layers.output(10, bias=True)
        load(gate_up, tensors)
        load(down, tensors, "block.down_proj")
        total += down(layers.activation()(gate_up(x)))
    gate, up, down_weight = (tensors[f"block.{name}_proj.weight"] for name in ("gate", "up", "down"))
    expected = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down_weight.T + tensors["block.down_proj.bias"]
    torch.testing.assert_close(total, expected)


def test_what_cannot_be_divided_says_so():
    with pytest.raises(ModelError, match=r"num_attention_heads \(6\) cannot be divided among 4 ranks"):
        make_layers(0, 4)


def test_packed_weights_are_sliced_by_their_ratio():
    """A method that packs eight inputs a word and groups outputs, as 4-bit formats do."""
    layers = make_layers(1, 2, intermediate_size=64)
    linear = layers.output(64)
    linear.name = "down_proj"
    linear.add_weight("qweight", (32 // 8, 24), torch.int32, output_dim=1, input_dim=0)
    [slot] = linear.weight_slots()
    assert slot.shape == (8, 24)
    tensor = torch.arange(8 * 24, dtype=torch.int32).view(8, 24)
    slot.load(tensor)
    assert torch.equal(linear.get_parameter("qweight"), tensor[4:])


def test_unknown_activations_are_named():
    with pytest.raises(ModelError, match="hidden_act must be one of silu"):
        make_layers(hidden_act="relu").activation()


def test_parameters_take_no_memory_before_they_are_loaded():
    linear = make_layers().linear(1 << 20, 1 << 20)
    linear.name, linear.method = "huge", Unquantized()
    linear.method.create_weights(linear)
    assert linear.weight.is_meta


def test_entries_of_blocks_are_each_parts_own():
    """Scales of 16 outputs and 8 inputs: no entry reaches over two parts, a part's last one stands for fewer."""
    linear = make_layers(hidden_size=20, intermediate_size=40).gate_up()
    linear.name = "block.linear"
    assert linear.num_blocks(16) == 6
    linear.add_weight("scale", (6, 3), torch.float32, output_block=16, input_block=8)
    gate, up = linear.weight_slots()
    assert gate.shape == up.shape == (3, 3)
    gate.load(torch.full((3, 3), 1.0))
    up.load(torch.full((3, 3), 2.0))
    assert torch.equal(linear.take("scale"), torch.tensor([[1.0]] * 3 + [[2.0]] * 3).expand(6, 3))
    assert not list(linear.weight_slots())


def test_blocks_are_not_cut_between_ranks():
    linear = make_layers(1, 2, intermediate_size=40).gate_up()
    linear.name = "block.linear"
    linear.add_weight("scale", (4, 3), torch.float32, output_block=16, input_block=8)
    with pytest.raises(ModelError, match=r"gate_proj.scale cannot be divided among ranks: 16 features share an entry"):
        list(linear.weight_slots())


def test_codes_that_do_not_fill_their_words():
    linear = make_layers(1, 3, intermediate_size=36, num_key_value_heads=6).gate_up()
    linear.name = "block.linear"
    linear.add_weight("zeros", (1, 9), torch.int32, output_dim=1, input_dim=None)  # 3 bits: 9 words for 96 outputs
    with pytest.raises(ModelError, match=r"gate_proj.zeros: 12 of 24 features are no whole part of its 9 entries"):
        list(linear.weight_slots())


def test_tensors_that_may_be_missing():
    linear = make_layers(hidden_size=24, intermediate_size=10).gate_up()
    linear.name = "block.linear"
    for name in ("none", "one"):
        linear.add_part_weight(name, (2,), torch.float32, default=7.0)
    slots = {slot.name: slot for slot in linear.weight_slots()}
    assert all(slot.is_optional and slot.dtype == torch.float32 for slot in slots.values())
    slots["block.up_proj.one"].load(torch.tensor([1.0, 2.0]))
    assert linear.take("none") is None
    assert linear.take("one").tolist() == [[7.0, 7.0], [1.0, 2.0]]


def test_parts_that_are_kept_in_different_ways():
    """What one plain method keeps as a matrix, two keep apart; the outputs are the same."""
    tensors = random_tensors(**{"gate_proj.weight": (10, 24), "up_proj.weight": (10, 24)})
    merged, apart = make_layers().gate_up(), make_layers().gate_up()
    load(merged, tensors)
    apart.name = "block.linear"
    apart.method = PartMethods([None, Unquantized()])
    apart.method.create_weights(apart)
    for slot in apart.weight_slots():
        slot.load(tensors[slot.name])
    apart.finish_weights()
    x = torch.randn(3, 24)
    torch.testing.assert_close(apart(x), merged(x))
    assert torch.equal(apart.method.dense_weight(apart), merged.weight)


class OneMore:
    """An adapter."""

    def add(self, x, y):
        return y + 1


@pytest.mark.parametrize("adapters", [None, OneMore()])
@pytest.mark.parametrize("method", [None, PartMethods([None, Unquantized()])])
def test_an_activation_follows_what_a_linear_gives(method, adapters):
    """In one go where its method has one and nothing comes in between, else one after another."""
    tensors = random_tensors(**{"gate_proj.weight": (10, 24), "up_proj.weight": (10, 24)})
    layers = make_layers()
    linear, activation = layers.gate_up(), layers.activation()
    load(linear, tensors)
    if method is not None:
        linear.name, linear.method = "block.linear", method
        method.create_weights(linear)
        for slot in linear.weight_slots():
            if slot.name in tensors:
                slot.load(tensors[slot.name])
    linear.adapters, x = adapters, torch.randn(3, 24)
    assert torch.equal(linear(x, activation), activation(linear(x)))


def test_a_head_that_is_kept_as_a_method_does():
    layers = make_layers()
    head, plain = layers.lm_head(layers.embedding()), layers.lm_head(layers.embedding())
    weight = torch.randn(50, 24)
    for each in (head, plain):
        each.name = "lm_head"
    head.quantize(head.as_linear(), Unquantized())
    for each in (head, plain):
        [slot] = each.weight_slots()
        assert (slot.name, slot.shape) == ("lm_head.weight", (50, 24))
        slot.load(weight)
        each.finish_weights()
    x = torch.randn(3, 24)
    torch.testing.assert_close(head(x), plain(x))
    assert torch.equal(head.table, plain.table)
