"""Layers: shapes, state, properties that follow from the masks."""

import inspect
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

import hstu_kernels
from hstu_kernels import HSTU, HSTULayer

LENGTHS = [4, 0, 1, 9]


def batch(width=10):
    generator = torch.Generator().manual_seed(0)
    total = sum(LENGTHS)
    stamps = torch.randint(0, 10**6, (total,), generator=generator)
    return torch.randn(total, width, generator=generator), torch.tensor([0, *LENGTHS]).cumsum(0), stamps


def stack(**options):
    torch.manual_seed(0)
    return HSTU(2, 10, 2, 3, 5, max_seqlen=12, **options)


def test_output_has_the_shape_of_the_input_and_gradients_reach_everything():
    x, offsets, stamps = batch()
    model = stack()
    out = model(x, offsets, timestamps=stamps)
    assert out.shape == x.shape
    out.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_tables_are_there_only_when_asked_for():
    names = {name.split(".")[-1] for name, _ in stack(position_bias=False, time_buckets=None).named_parameters()}
    assert not names & {"position_weight", "time_weight"}
    assert stack(time_buckets=30).layers[0].time_weight.shape == (1, 31)
    assert stack().layers[1].position_weight.shape == (1, 23)


def test_time_matters_only_when_given():
    x, offsets, stamps = batch()
    model = stack()
    with torch.no_grad():
        for layer in model.layers:
            layer.time_weight.normal_()
    without, with_time = model(x, offsets), model(x, offsets, timestamps=stamps)
    assert not torch.allclose(without, with_time)
    torch.testing.assert_close(model(x, offsets, timestamps=stamps + 10**9), with_time)


def test_a_row_depends_on_the_past_of_its_own_sequence_only():
    x, offsets, stamps = batch()
    model = stack()
    before = model(x, offsets, timestamps=stamps)
    changed = x.clone()
    changed[9] += 1.0
    after = model(changed, offsets, timestamps=stamps)
    same = (before == after).all(1)
    assert same[:9].all() and not same[9:].any()


def test_alone_or_in_a_batch_is_the_same():
    x, offsets, stamps = batch()
    model = stack()
    together = model(x, offsets, timestamps=stamps)
    alone = model(x[5:], torch.tensor([0, 9]), timestamps=stamps[5:])
    torch.testing.assert_close(together[5:], alone)


def test_backends_give_one_model():
    x, offsets, stamps = batch()
    found = {}
    for backend in ("reference", "cpu", *(["triton"] if hstu_kernels.available_backends()["triton"] == "ok" else [])):
        model = stack(backend=backend)
        out = model(x, offsets, timestamps=stamps)
        out.square().sum().backward()
        found[backend] = [out.detach(), *(p.grad for p in model.parameters())]
    for other in found.values():
        for a, b in zip(other, found["reference"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_dropout_draws_from_torch_and_only_in_training():
    x, offsets, stamps = batch()
    model = stack(dropout=0.5, attention_dropout=0.5)
    torch.manual_seed(3)
    first = model(x, offsets, timestamps=stamps)
    torch.manual_seed(3)
    torch.testing.assert_close(model(x, offsets, timestamps=stamps), first)
    assert not torch.allclose(model(x, offsets, timestamps=stamps), first)
    model.eval()
    torch.testing.assert_close(model(x, offsets, timestamps=stamps), stack()(x, offsets, timestamps=stamps))


def test_compile_and_state_dict():
    x, offsets, stamps = batch()
    model, other = stack(), stack()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    other.load_state_dict(model.state_dict())
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, offsets, timestamps=stamps), model(x, offsets, timestamps=stamps))


def test_too_long_a_sequence_is_named():
    layer = HSTULayer(10, 2, 3, 5, max_seqlen=8)
    with pytest.raises(ValueError, match="sequence 3 has length 9, needs at most max_seqlen, 8"):
        layer(*batch()[:2])


def test_autocast_trains_in_bfloat16_with_float32_tables():
    x, offsets, stamps = batch()
    model = stack()
    exact = model(x, offsets, timestamps=stamps)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x, offsets, timestamps=stamps)
        loss = out.square().sum()
    loss.backward()
    torch.testing.assert_close(out.float(), exact, rtol=0.05, atol=0.05)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def by_hand(layer, x, offsets, targets, group_norm, concat_ua):
    """The layer from torch's own pieces and a loop over sequences, float64."""
    normed = F.layer_norm(x, x.shape[1:], layer.input_norm.weight, layer.input_norm.bias, 1e-6)
    heads, d_qk, d_v = layer.num_heads, layer.d_qk, layer.d_v
    sizes = [heads * d_v, heads * d_v, heads * d_qk, heads * d_qk]
    u, v, q, k = F.silu(normed @ layer.uvqk.weight.T).split(sizes, -1)
    q, k, v = q.view(-1, heads, d_qk), k.view(-1, heads, d_qk), v.view(-1, heads, d_v)
    alpha = d_qk**-0.5 if layer.alpha is None else layer.alpha
    rows = []
    for b, (begin, end) in enumerate(pairwise(offsets.tolist())):
        n, center = end - begin, layer.position_weight.shape[1] // 2
        i, j = torch.arange(n)[:, None], torch.arange(n)[None]
        scores = (
            alpha * torch.einsum("ihd,jhd->hij", q[begin:end], k[begin:end]) + layer.position_weight[0][center + j - i]
        )
        history = n - int(targets[b])
        seen = (j < i) & (j < history)
        if layer.max_attn_len:
            seen &= i.clamp(max=history) - j <= layer.max_attn_len
        seen |= i == j
        rows.append(torch.einsum("hij,jhv->ihv", F.silu(scores) * seen / layer.max_seqlen, v[begin:end]))
    attention, norm = torch.cat(rows), layer.attention_norm
    if group_norm:
        mean, variance = attention.mean(-1, keepdim=True), attention.var(-1, keepdim=True, unbiased=False)
        a = (attention - mean) / (variance + 1e-6).sqrt() * norm.weight[:, None] + norm.bias[:, None]
        a = a.flatten(1)
    else:
        a = F.layer_norm(attention.flatten(1), (heads * d_v,), norm.weight, norm.bias, 1e-6)
    gated = torch.cat([u, a, u * a], 1) if concat_ua else u * a
    return x + layer.output(gated)


@pytest.mark.parametrize("group_norm", [False, True])
@pytest.mark.parametrize("concat_ua", [False, True])
@pytest.mark.parametrize("options", [{}, {"alpha": 1.0, "max_attn_len": 2}, {"recompute": True}])
def test_options_are_what_they_are_by_hand(group_norm, concat_ua, options):
    torch.manual_seed(0)
    layer = HSTULayer(
        10, 2, 3, 5, max_seqlen=12, group_norm=group_norm, concat_ua=concat_ua, dtype=torch.float64, **options
    )
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    x, offsets, _ = batch()
    x, targets = x.double().requires_grad_(), torch.tensor([2, 0, 1, 3])
    found, expected = layer(x, offsets, num_targets=targets), by_hand(layer, x, offsets, targets, group_norm, concat_ua)
    torch.testing.assert_close(found, expected)
    leaves = [x, *(p for name, p in layer.named_parameters() if name != "time_weight")]
    up = torch.randn_like(found)
    ours, theirs = torch.autograd.grad(found, leaves, up), torch.autograd.grad(expected, leaves, up)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    shape = (2,) if group_norm else (10,)
    assert layer.attention_norm.weight.shape == shape and layer.output.in_features == (30 if concat_ua else 10)


def test_contextual_rows_and_groups_reach_the_attention():
    x, offsets, _ = batch()
    plain, grouped = stack(), stack(target_group_size=2)
    grouped.load_state_dict(plain.state_dict())
    assert not torch.equal(plain(x, offsets), plain(x, offsets, num_contextual=2))
    assert torch.equal(
        plain(x, offsets, num_contextual=2), plain(x, offsets, num_contextual=torch.tensor([2, 2, 2, 2]))
    )
    targets = torch.tensor([2, 0, 0, 4])
    assert not torch.equal(plain(x, offsets, num_targets=targets), grouped(x, offsets, num_targets=targets))


def test_device_and_dtype_are_those_of_all_parameters():
    model = stack(device="meta", dtype=torch.bfloat16, group_norm=True, concat_ua=True)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    names = inspect.signature(HSTU).parameters
    assert list(names)[1:] == list(inspect.signature(HSTULayer).parameters)


def test_no_rows_at_all():
    for options in ({}, {"group_norm": True}, {"concat_ua": True}):
        assert stack(**options)(torch.zeros(0, 10), torch.tensor([0, 0])).shape == (0, 10)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (
            torch.zeros(14, 10, dtype=torch.float64),
            "x: got dtype torch.float64, needs torch.float32, that of the layer",
        ),
        (torch.zeros(14, 10, dtype=torch.int64), "x: got dtype torch.int64, needs torch.float32"),
        (torch.zeros(14, 9), r"x: got shape \[14, 9\], needs \[rows, 10\]"),
        (torch.zeros(1, 14, 10), r"x: got shape \[1, 14, 10\], needs \[rows, 10\]"),
        ([[0.0] * 10] * 14, "x: got a list, needs a tensor"),
    ],
)
def test_rows_of_another_kind_are_named(x, message):
    with pytest.raises(ValueError, match=message):
        stack()(x, torch.tensor([0, 4, 4, 5, 14]))
