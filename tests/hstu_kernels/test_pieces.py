"""LayerNorm times gate, LayerNorm to projection to SiLU: every backend against torch's own, odd widths, and
recomputation in the layer."""

import pytest
import torch
from torch.nn import functional as F

from hstu_kernels import HSTU, dispatch, ops

# On a CPU torch's own LayerNorm adds up the gradient of its weight in half precision, in as many parts as threads.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 1e-2}
TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(rows, width, dtype, device="cpu"):
    generator = torch.Generator().manual_seed(rows * 1000 + width)
    # The gate is a slice of something wider, as in the layer; the mean is far from 0.
    x = 3 + 2 * torch.randn(rows, width, generator=generator, dtype=torch.float64)
    wide = torch.randn(rows, 2 * width + 3, generator=generator, dtype=torch.float64)
    weight, bias = torch.randn(2, width, generator=generator, dtype=torch.float64)
    grad = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return [y.to(device, dtype) for y in (x, wide, weight, bias, grad)]


def found_by(function, x, wide, weight, bias, grad):
    leaves = [y.clone().requires_grad_() for y in (x, wide, weight, bias)]
    out = function(leaves[0], leaves[1][:, 1 : 1 + x.shape[1]], leaves[2], leaves[3])
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def close(found, expected, dtype):
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype and a.shape == b.shape
        if a.numel():
            scale = b.abs().max().clamp(min=1.0)
            assert float((a.double() - b).abs().max() / scale) <= TOLERANCE[dtype]


def device_of(backend, dtype):
    if backend != "triton":
        return "cpu"
    pytest.importorskip("triton")
    if dtype == torch.float64:
        pytest.skip("Triton takes no float64")
    return TRITON_DEVICE


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("shape", [(1, 4), (3, 7), (70, 50), (130, 256), (0, 5)])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_equals_layer_norm_times_gate(backend, shape, dtype):
    tensors = inputs(*shape, dtype, device_of(backend, dtype))
    found = found_by(lambda x, g, w, b: ops.norm_gate(x, g, w, b, 1e-6, backend), *tensors)
    wide = [y.double() for y in tensors]
    expected = found_by(lambda x, g, w, b: F.layer_norm(x, x.shape[1:], w, b, 1e-6) * g, *wide)
    close(found, expected, dtype)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_norm_gate_passes_opcheck_and_gradcheck(backend):
    x, wide, weight, bias, _ = (y.requires_grad_() for y in inputs(4, 5, torch.float64))
    gate = wide[:, :5].detach().requires_grad_()
    arguments = (x, gate, weight, bias, 1e-5, backend)
    torch.library.opcheck(torch.ops.hstu_kernels.norm_gate.default, arguments)
    detached = tuple(y.detach() for y in (x, gate, weight, bias))
    torch.library.opcheck(torch.ops.hstu_kernels.norm_gate_backward.default, (detached[0], *detached, 1e-5, backend))
    assert torch.autograd.gradcheck(lambda *leaves: ops.norm_gate(*leaves, 1e-5, backend), (x, gate, weight, bias))


def projection(rows, width, wide, dtype, device="cpu"):
    x, _, weight, bias, _ = inputs(rows, width, dtype, device)
    generator = torch.Generator().manual_seed(wide)
    # Columns of a wider tensor, rows that are not next to one another: what a slice hands in.
    x = F.pad(x, (2, 3))[:, 2 : 2 + width]
    matrix = torch.randn(wide, width, generator=generator, dtype=torch.float64) * width**-0.5
    grad = torch.randn(rows, wide, generator=generator, dtype=torch.float64)
    return x, weight, bias, matrix.to(device, dtype), grad.to(device, dtype)


def projected_by(function, *tensors):
    *leaves, grad = tensors
    leaves = [y.clone().requires_grad_() for y in leaves]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def by_torch(x, weight, bias, matrix):
    return F.silu(F.linear(F.layer_norm(x, x.shape[1:], weight, bias, 1e-6), matrix))


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("shape", [(1, 4, 3), (3, 7, 20), (70, 50, 65), (130, 96, 130), (0, 5, 8)])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_equals_layer_norm_projection_and_silu(backend, shape, dtype):
    tensors = projection(*shape, dtype, device_of(backend, dtype))
    found = projected_by(lambda *leaves: ops.norm_project_silu(*leaves, 1e-6, backend), *tensors)
    expected = projected_by(by_torch, *(y.double() for y in tensors))
    close(found, expected, dtype)


def test_norm_project_silu_passes_opcheck():
    *leaves, grad = projection(4, 5, 6, torch.float32, device_of("triton", torch.float32))
    for keep in (True, False):
        fixed = [y.detach().requires_grad_(keep) for y in leaves]
        torch.library.opcheck(torch.ops.hstu_kernels.norm_project_silu.default, (*fixed, 1e-5, keep))
    backward = (grad, torch.randn_like(grad), *leaves, 1e-5)
    torch.library.opcheck(torch.ops.hstu_kernels.norm_project_silu_backward.default, backward)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_under_autocast_the_projection_has_its_type_and_the_norm_has_not(backend):
    *leaves, grad = projection(9, 8, 12, torch.float32, device_of(backend, torch.float32))
    leaves = [y.requires_grad_() for y in leaves]
    with torch.autocast(grad.device.type, dtype=torch.bfloat16):
        out = ops.norm_project_silu(*leaves, 1e-6, backend)
    assert out.dtype == torch.bfloat16
    grads = torch.autograd.grad(out, leaves, grad.bfloat16())
    assert all(y.dtype == torch.float32 for y in grads)
    expected = projected_by(by_torch, *(y.detach().double() for y in leaves), grad.double())
    for a, b in zip([out, *grads], expected, strict=True):
        assert float((a.detach().double() - b).abs().max() / b.abs().max()) < 4e-2


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_strided_parameters_are_read_as_they_are_and_wrong_shapes_named(backend):
    x, weight, bias, matrix, _ = projection(9, 8, 12, torch.float32, device_of(backend, torch.float32))
    wide = [y.repeat_interleave(2)[::2] for y in (weight, bias)]
    expected = by_torch(x, weight, bias, matrix)
    torch.testing.assert_close(ops.norm_project_silu(x, *wide, matrix, 1e-6, backend), expected)
    gate = torch.randn_like(x)
    expected = F.layer_norm(x, x.shape[1:], weight, bias, 1e-6) * gate
    torch.testing.assert_close(ops.norm_gate(x, gate, *wide, 1e-6, backend), expected)
    with pytest.raises(ValueError, match=r"weight of the norm: got shape \[7\], needs \[8\]"):
        ops.norm_project_silu(x, weight[:7], bias, matrix, 1e-6, backend)
    with pytest.raises(ValueError, match=r"weight: got shape \[12, 7\], needs \[W, 8\]"):
        ops.norm_project_silu(x, weight, bias, matrix[:, :7], 1e-6, backend)
    with pytest.raises(ValueError, match=r"gate: got shape \[9, 7\]"):
        ops.norm_gate(x, gate[:, :7], weight, bias, 1e-6, backend)


def test_triton_does_not_keep_the_norm_for_backward():
    x, weight, bias, matrix, _ = projection(64, 32, 48, torch.float32, device_of("triton", torch.float32))
    leaves = [y.contiguous().requires_grad_() for y in (x, weight, bias, matrix)]

    def kept(function):
        sizes = {}
        note = torch.autograd.graph.saved_tensors_hooks(
            lambda y: (sizes.update({y.untyped_storage().data_ptr(): y.untyped_storage().nbytes()}), y)[1], lambda y: y
        )
        with note:
            out = function(*leaves)
        assert out.requires_grad
        return sum(sizes.values())

    ours = kept(lambda *ys: ops.norm_project_silu(*ys, 1e-6, "triton"))
    assert ours <= kept(by_torch) - 64 * 32 * 4


def model(recompute):
    torch.manual_seed(0)
    return HSTU(2, 16, 2, 8, 8, max_seqlen=40, dropout=0.3, attention_dropout=0.2, recompute=recompute)


def gradients(stack, x, offsets, stamps):
    torch.manual_seed(1)
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    x = x.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = stack(x, offsets, timestamps=stamps)
        storages = {y.untyped_storage().data_ptr(): y.untyped_storage().nbytes() for y in saved}
        kept = sum(storages.values())
        out.square().sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in stack.parameters())], kept


def test_recomputation_changes_memory_and_nothing_else(monkeypatch):
    x, offsets, stamps = torch.randn(60, 16), torch.tensor([0, 40, 60]), torch.arange(60)
    plain, kept = gradients(model(False), x, offsets, stamps)
    # The attention itself must not run again.
    calls, implementation = [], dispatch.implementation("cpu").forward
    monkeypatch.setattr(dispatch.implementation("cpu"), "forward", lambda p: calls.append(1) or implementation(p))
    again, kept_again = gradients(model(True), x, offsets, stamps)
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a, b)
    assert len(calls) == 2
    assert kept_again < 0.5 * kept
