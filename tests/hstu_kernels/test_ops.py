"""The registered ops under torch's own checks: opcheck, gradcheck, torch.compile."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from hstu_kernels import HSTU, hstu_attention

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
        "bias": draw(1, sum(n * n for n in LENGTHS)),
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
        arguments.get("bias") if extra else None,
        None,
        constants["max_seqlen"],
        0.7,
        8.0,
        True,
        0,
        0,
        1,
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
    needs = [True, True, True, extra, extra, extra]
    torch.library.opcheck(
        torch.ops.hstu_kernels.attention_backward.default,
        (grad, *op_arguments(arguments, constants, backend, extra=extra), needs),
    )


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck(backend, dropout):
    arguments, constants = problem()

    def attend(q, k, v, position_weight, time_weight, bias):
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
            bias=bias,
            dropout=dropout,
            seed=3,
            backend=backend,
        )

    assert torch.autograd.gradcheck(attend, tuple(arguments.values()))


def test_compile_fullgraph_equals_eager(any_backend):
    arguments, constants = problem(torch.float32)
    backend = None if any_backend == "auto" else any_backend

    def loss(q, k, v, position_weight, time_weight, bias):
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
            bias=bias,
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


@pytest.mark.parametrize("transform", ["grad", "vjp", "jacrev", "vmap"])
def test_func_transforms_are_refused_by_name(transform):
    x, offsets = torch.randn(3, 1, 2), torch.tensor([0, 3])

    def loss(q):
        return hstu_attention(q, x, x, offsets, 3).sum()

    calls = {
        "grad": lambda: torch.func.grad(loss)(x),
        "vjp": lambda: torch.func.vjp(loss, x),
        "jacrev": lambda: torch.func.jacrev(loss)(x),
        "vmap": lambda: torch.vmap(loss)(x[None]),
    }
    with pytest.raises(NotImplementedError, match=r"hstu_attention: torch.func transforms .* not supported"):
        calls[transform]()
    with pytest.raises(NotImplementedError, match=r"HSTU: torch\.func transforms"):
        rows = torch.randn(3, 4)
        model = HSTU(1, 4, 1, 2, 2, max_seqlen=4)
        torch.func.grad(lambda y: model(y, offsets).sum())(rows)


def test_a_penalty_on_the_gradient_of_a_layer_is_refused():
    model = HSTU(1, 4, 1, 2, 2, max_seqlen=4)
    x = torch.randn(3, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(model(x, torch.tensor([0, 3])).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        grad.square().sum().backward()


@pytest.mark.parametrize("grad", [True, False])
def test_export_with_a_dynamic_number_of_rows(grad):
    model = HSTU(2, 8, 2, 4, 4, max_seqlen=50, time_buckets=20).eval()
    x, offsets, stamps = torch.randn(7, 8), torch.tensor([0, 3, 7]), torch.arange(7)
    rows, batch = torch.export.Dim("rows", min=2, max=400), torch.export.Dim("batch", min=2, max=60)
    with torch.set_grad_enabled(grad):
        exported = torch.export.export(
            model,
            (x, offsets),
            {"timestamps": stamps},
            dynamic_shapes={"x": {0: rows}, "offsets": {0: batch}, "timestamps": {0: rows}},
        )
    for lengths in ([5, 9], [50], [2, 0, 1, 13]):
        x, stamps = torch.randn(sum(lengths), 8), torch.arange(sum(lengths))
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        found = exported.module()(x, offsets, timestamps=stamps)
        torch.testing.assert_close(found, model(x, offsets, timestamps=stamps))
