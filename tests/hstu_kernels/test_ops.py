"""The registered ops under torch's own checks: opcheck, gradcheck, torch.compile."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from hstu_kernels import hstu_attention

LENGTHS = [3, 0, 1, 7]


def problem(dtype=torch.float64, d_qk=5, d_v=3, heads=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    total = sum(LENGTHS)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    arguments = {
        "q": draw(total, heads, d_qk),
        "k": draw(total, heads, d_qk),
        "v": draw(total, heads, d_v),
        "position_weight": draw(1, 2 * 8 - 1),
        "time_weight": draw(heads, 21),
    }
    constants = {
        "offsets": torch.tensor([0, *LENGTHS]).cumsum(0),
        "max_seqlen": 8,
        "timestamps": torch.randint(0, 10**6, (total,), generator=generator).sort().values,
    }
    return arguments, constants


def op_arguments(arguments, constants, backend, dropout=0.0, extra=True):
    batch = len(LENGTHS)
    return (
        arguments["q"],
        arguments["k"],
        arguments["v"],
        constants["offsets"],
        constants["offsets"] if extra else None,
        torch.tensor([1, 0, 0, 2]) if extra else None,
        torch.ones(batch, dtype=torch.int64) if extra else None,
        arguments["position_weight"] if extra else None,
        constants["timestamps"] if extra else None,
        arguments["time_weight"] if extra else None,
        torch.full((sum(LENGTHS),), 3.0) if extra else None,
        torch.tensor(7) if dropout else None,
        constants["max_seqlen"],
        0.7,
        8.0,
        True,
        0,
        0,
        1,
        dropout,
        backend,
    )


@pytest.fixture(params=["reference", "cpu", "auto", "triton"])
def any_backend(request):
    if request.param == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("the tensors of these tests are on the CPU")
    return request.param


@pytest.mark.parametrize("extra", [True, False])
def test_opcheck_forward(any_backend, extra):
    arguments, constants = problem(torch.float32)
    backend = any_backend
    torch.library.opcheck(
        torch.ops.hstu_kernels.attention.default, op_arguments(arguments, constants, backend, dropout=0.25, extra=extra)
    )


@pytest.mark.parametrize("extra", [True, False])
def test_opcheck_backward(any_backend, extra):
    arguments, constants = problem(torch.float32)
    backend = any_backend
    arguments = {name: x.detach() for name, x in arguments.items()}
    grad = torch.randn(arguments["v"].shape)
    needs = [True, True, True, extra, extra]
    torch.library.opcheck(
        torch.ops.hstu_kernels.attention_backward.default,
        (grad, *op_arguments(arguments, constants, backend, extra=extra), needs),
    )


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck(backend, dropout):
    arguments, constants = problem()

    def attend(q, k, v, position_weight, time_weight):
        return hstu_attention(
            q,
            k,
            v,
            constants["offsets"],
            constants["max_seqlen"],
            alpha=0.9,
            num_targets=torch.tensor([1, 0, 0, 2]),
            num_contextual=1,
            position_weight=position_weight,
            timestamps=constants["timestamps"],
            time_weight=time_weight,
            time_shift=1,
            dropout=dropout,
            seed=3,
            backend=backend,
        )

    assert torch.autograd.gradcheck(attend, tuple(arguments.values()))


def test_compile_fullgraph_equals_eager(any_backend):
    arguments, constants = problem(torch.float32)
    backend = None if any_backend == "auto" else any_backend

    def loss(q, k, v, position_weight, time_weight):
        out = hstu_attention(
            q * 1.5,
            k,
            v,
            constants["offsets"],
            constants["max_seqlen"],
            position_weight=position_weight,
            timestamps=constants["timestamps"],
            time_weight=time_weight,
            num_contextual=1,
            dropout=0.2,
            seed=5,
            backend=backend,
        )
        return (out * out.cos()).sum()

    eager = torch.autograd.grad(loss(*arguments.values()), tuple(arguments.values()))
    compiled_loss = torch.compile(loss, fullgraph=True, backend="aot_eager")
    compiled = torch.autograd.grad(compiled_loss(*arguments.values()), tuple(arguments.values()))
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradients_that_nobody_needs_are_left_out(backend):
    arguments, constants = problem()
    leaves = {name: x.detach() for name, x in arguments.items()}
    leaves["time_weight"].requires_grad_()
    out = hstu_attention(
        leaves["q"],
        leaves["k"],
        leaves["v"],
        constants["offsets"],
        constants["max_seqlen"],
        timestamps=constants["timestamps"],
        time_weight=leaves["time_weight"],
        position_weight=leaves["position_weight"],
        backend=backend,
    )
    out.sum().backward()
    assert leaves["time_weight"].grad.abs().sum() > 0
    assert leaves["q"].grad is None and leaves["position_weight"].grad is None


@pytest.mark.parametrize("dynamic", [None, True])
def test_one_graph_serves_all_sizes(dynamic):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(q, k, v, offsets, longest):
        return hstu_attention(q, k, v, offsets, longest, divisor=50, dropout=0.5, seed=1, backend="cpu")

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=counter)
    for i in range(10):
        total = 20 + 3 * i
        q, k, v = (torch.randn(total, 2, 4, requires_grad=True) for _ in range(3))
        offsets = torch.tensor([0, 5, total])
        out = compiled(q, k, v, offsets, total + i)
        torch.testing.assert_close(out, step(q, k, v, offsets, total + i))
        out.sum().backward()
    assert counter.frame_count <= 2


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_second_derivatives_are_refused(backend):
    arguments, constants = problem()
    out = hstu_attention(*(arguments[x] for x in "qkv"), constants["offsets"], 8, backend=backend)
    (grad,) = torch.autograd.grad(out.square().sum(), arguments["q"], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        grad.sum().backward()
