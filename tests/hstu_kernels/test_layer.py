"""Layers: shapes, state, properties that follow from the masks."""

import pytest
import torch

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
