"""BatchFormer: what it computes, when it runs, and that evaluation doesn't depend on the batch."""
import pytest
import torch
from torch import nn

from model.batchformer import BatchFormerLayer, BatchFormerStack, across_ranks, make_block
from model.model import build_model
from utils.errors import ConfigError


def model_of(kind="ResNet32Model", **args):
    torch.manual_seed(0)
    return build_model({"type": kind, "args": args}, num_classes=6)


@pytest.mark.parametrize("width", [48, 132])
def test_layer_is_a_transformer_over_the_batch_for_each_expert(width):
    torch.manual_seed(0)
    layer = BatchFormerLayer(width).eval()
    twin = nn.TransformerEncoderLayer(width, 4 if width > 128 else 1, width, 0.5).eval()
    twin.load_state_dict(layer.state_dict())
    features = torch.randn(5, 3, width)
    out = layer(features)
    for expert in range(3):   # the published code: [N, D] as a sequence of N, batch 1, one expert at a time
        torch.testing.assert_close(out[:, expert], twin(features[:, expert].unsqueeze(1)).squeeze(1))
    assert layer.dropout.p == layer.self_attn.dropout == 0.5 and not layer.norm_first


def test_layer_by_hand():
    torch.manual_seed(0)
    layer, x = BatchFormerLayer(8).double().eval(), torch.randn(4, 1, 8, dtype=torch.double)
    rows = x[:, 0]
    query, key, value = (rows @ layer.self_attn.in_proj_weight.t() + layer.self_attn.in_proj_bias).chunk(3, dim=1)
    attended = (query @ key.t() / 8 ** 0.5).softmax(1) @ value
    y = layer.norm1(rows + layer.self_attn.out_proj(attended))
    y = layer.norm2(y + layer.linear2(layer.linear1(y).relu()))
    torch.testing.assert_close(layer(x)[:, 0], y)


@pytest.mark.parametrize("add_bt,depth", [(0, 0), (1, 1), (32, 1), (33, 1), (12, 8), (13, 6)])
def test_depths(add_bt, depth):
    block = make_block(add_bt, 16)
    layers = 0 if block is None else len(block.layers) if isinstance(block, BatchFormerStack) else 1
    assert layers == depth


def test_recording_shows_attention_and_changes_nothing():
    torch.manual_seed(0)
    layer, features = BatchFormerLayer(132), torch.randn(5, 2, 132)
    torch.manual_seed(1)
    plain = layer(features)
    layer.record = True
    torch.manual_seed(1)
    assert torch.equal(layer(features), plain)
    attention = layer.last_attention
    assert attention.shape == (5, 5) and not attention.requires_grad
    torch.testing.assert_close(attention.sum(1), torch.ones(5))
    expected = torch.stack([layer.self_attn(f, f, f, average_attn_weights=True)[1]
                            for f in layer.eval() and features.transpose(0, 1)]).mean(0)
    torch.testing.assert_close(attention, expected)


def test_recording_through_the_model():
    model = model_of(num_experts=2, add_bt=12)
    model.backbone.batchformer.record = True
    model(torch.randn(5, 3, 32, 32))
    assert model.backbone.batchformer.last_attention.shape == (5, 5)


@pytest.mark.parametrize("kind,args,shared", [
    ("ResNet32Model", dict(add_bt=1), True), ("ResNet32Model", dict(add_bt=1, num_experts=3), True),
    ("ResNet32Model", dict(add_bt=1, shared_classifier=False), False),
    ("ResNet10Model", dict(add_bt=1), True), ("ResNet10Model", dict(add_bt=1, num_experts=2), False),
    ("ResNet10Model", dict(add_bt=33, num_experts=2), True),
    ("ResNet10Model", dict(add_bt=1, num_experts=2, shared_classifier=True), True),
    ("ResNet32Model", dict(add_bt=0, shared_classifier=True), False)])
def test_who_shares_the_classifier(kind, args, shared):
    outputs = model_of(kind, **args)(torch.randn(3, 3, 32, 32))
    experts = args.get("num_experts", 1)
    assert ("logits_old" in outputs) == ("output_old" in outputs) == shared
    if shared:
        assert outputs["logits_old"].shape == (3, experts, 6)
        torch.testing.assert_close(outputs["output_old"], outputs["logits_old"].mean(1))


def test_stream_weights():
    images = torch.randn(3, 3, 32, 32)
    assert model_of(add_bt=32)(images)["bt_weights"] == (0.01, 1.0)
    assert model_of(add_bt=33)(images)["bt_weights"] == (1.0, 1.0)
    assert model_of(add_bt=1)(images)["bt_weights"] == (0.1, 1.0)
    assert model_of(add_bt=1, bt_weight=0.3)(images)["bt_weights"] == (0.3, 1.0)


def test_old_stream_is_the_same_head_on_the_features():
    model = model_of(add_bt=1, num_experts=2)
    outputs = model(torch.randn(3, 3, 32, 32))
    for e in (0, 1):
        torch.testing.assert_close(outputs["logits_old"][:, e], model.backbone.linears[e](outputs["feat"][:, e]))


@pytest.mark.parametrize("add_bt", [1, 12, 33])
def test_evaluation_is_the_same_alone_and_in_any_batch(add_bt):
    model = model_of(num_experts=2, add_bt=add_bt).eval()
    images = torch.randn(7, 3, 32, 32)
    with torch.no_grad():
        together = model(images)
        alone = torch.cat([model(image[None])["logits"] for image in images])
    torch.testing.assert_close(together["logits"], alone, rtol=1e-4, atol=1e-4)
    assert "logits_old" not in together


@pytest.mark.parametrize("eval_bt", [False, True])
def test_a_norm_in_the_classifier_remembers_the_stream_of_evaluation(eval_bt):
    """Both go through one head in training."""
    model = model_of(add_bt=1, classifier="linear_fcbn_notaffine", eval_bt=eval_bt).train()
    norm, streams = model.backbone.linear.bn, []
    norm.momentum = 1.0
    norm.register_forward_hook(lambda module, inputs, output: streams.append(inputs[0].mean(0)))
    assert "output_old" in model(torch.randn(8, 3, 16, 16))
    after, before = streams
    torch.testing.assert_close(norm.running_mean, (after if eval_bt else before).detach())
    assert norm.track_running_stats and norm.num_batches_tracked == 1


def test_gathering_refuses_experts_left_out_by_chance():
    model = model_of(num_experts=3, use_experts="rand", add_bt=1)
    with pytest.raises(ConfigError, match=r"trainer\.bt_gather: with arch\.args\.use_experts"):
        model.gather_batches()


def test_eval_bt_applies_the_block():
    model = model_of(num_experts=2, add_bt=1, eval_bt=1).eval()
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        together, alone = model(images)["logits"], model(images[:1])["logits"]
    assert not torch.allclose(together[:1], alone, atol=1e-3)
    assert "logits_old" not in model(images)


@pytest.mark.parametrize("n", [1, 3, 8])
@pytest.mark.parametrize("kind", ["ResNet32Model", "ResNet10Model"])
def test_any_batch_size_trains_every_parameter(kind, n):
    size = 32 if kind == "ResNet32Model" else 64
    model = model_of(kind, add_bt=1, num_experts=2)
    outputs = model(torch.randn(n, 3, size, size))
    assert outputs["output"].isfinite().all()
    outputs["output"].square().sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


def test_gradients_reach_the_block_and_the_trunk():
    model = model_of(add_bt=1, num_experts=2)
    model(torch.randn(4, 3, 32, 32))["output"].square().sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


def test_autocast_and_channels_last():
    model = model_of(add_bt=1, num_experts=2).to(memory_format=torch.channels_last)
    images = torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(images)
    assert outputs["output"].isfinite().all() and outputs["output_old"].isfinite().all()


def test_one_process_gathers_itself():
    layer, features = BatchFormerLayer(16).eval(), torch.randn(4, 2, 16)
    torch.testing.assert_close(across_ranks(layer, features), layer(features))


def _two_ranks(rank, port, folder):
    import os

    from utils import dist
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.setup("cpu")
    torch.manual_seed(0)
    layer, features = BatchFormerLayer(16).eval(), torch.randn(5, 2, 16)
    own = (features[:2] if rank == 0 else features[2:]).clone().requires_grad_()
    layer.record = True
    out = across_ranks(layer, own)
    out.square().sum().backward()
    torch.save([out.detach(), own.grad, layer.last_attention], f"{folder}/{rank}.pt")
    dist.cleanup()
    # In one of about forty runs on a busy machine a thread of torch's outlives the interpreter, which then aborts.
    os._exit(0)


def test_two_ranks_attend_to_each_other(tmp_path):
    import socket
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_two_ranks, args=(port, str(tmp_path)), nprocs=2)
    torch.manual_seed(0)
    layer, features = BatchFormerLayer(16).eval(), torch.randn(5, 2, 16).requires_grad_()
    layer.record = True
    out = layer(features)
    out.square().sum().backward()
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), out.detach())
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), features.grad)
    torch.testing.assert_close(parts[1][2], layer.last_attention[2:, 2:])
