"""What torch does with functions: second derivatives, torch.func, forward mode, export."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.export import Dim

from mamba_scan import Mamba, Mamba2, causal_conv1d, causal_conv1d_update, selective_scan, ssd_scan

BACKENDS = ["reference", "cpu"]


def ops(backend):
    """Every op as a function of one tensor [2, 4, 5]."""
    torch.manual_seed(0)
    A, B = -torch.rand(4, 3, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    weight, rows = torch.randn(4, 3, dtype=torch.float64), torch.randn(2, 5, 1, 3, dtype=torch.float64)
    block = Mamba(4, 3, backend=backend, dtype=torch.float64)
    return {
        "scan": lambda x: selective_scan(x, x.abs(), A, B, B, backend=backend),
        "conv": lambda x: causal_conv1d(x, weight, backend=backend, activation="silu"),
        "conv_update": lambda x: causal_conv1d_update(x, torch.zeros(2, 4, 2).double(), weight, backend=backend),
        "ssd": lambda x: ssd_scan(
            x.mT.unflatten(-1, (2, 2)), x.mT[..., :2].abs(), A[:2, 0], rows, rows, backend=backend
        ),
        "block": lambda x: block(x.mT),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", list(ops(None)))
def test_second_derivatives_are_refused(name, backend):
    x = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    out = ops(backend)[name](x).pow(2).sum()
    (grad,) = torch.autograd.grad(out, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        (out + grad.pow(2).sum()).backward()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("name", list(ops(None)))
def test_transforms_of_functions_say_that_they_are_not_supported(name):
    f, x = ops(None)[name], torch.randn(2, 4, 5, dtype=torch.float64)
    for transformed in (
        torch.func.grad(lambda x: f(x).sum()),
        lambda x: torch.func.vmap(f)(x[None]),
        lambda x: torch.func.jvp(f, (x,), (x,)),
        torch.func.jacrev(f),
    ):
        with pytest.raises(NotImplementedError, match=r"mamba_scan::.*torch\.func"):
            transformed(x)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode"):
        f(forward_ad.make_dual(x, x))


BLOCKS = {"Mamba": lambda: Mamba(8, 4), "Mamba2": lambda: Mamba2(8, d_state=4, headdim=4)}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", list(BLOCKS))
def test_export_with_any_length_and_any_batch(name, train):
    block = BLOCKS[name]()
    with torch.set_grad_enabled(train):
        shapes = {"x": {0: Dim("b", min=1, max=9), 1: Dim("l", min=1, max=500)}}
        program = torch.export.export(block, (torch.randn(3, 70, 8),), dynamic_shapes=shapes).module()
        for shape in ((1, 1, 8), (2, 63, 8), (3, 200, 8)):
            x = torch.randn(shape)
            torch.testing.assert_close(program(x), block(x))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", list(BLOCKS))
def test_export_packed_with_any_number_of_sequences(name, train):
    block = BLOCKS[name]()
    with torch.set_grad_enabled(train):
        shapes = {"x": {0: Dim("T", min=1, max=900)}, "offsets": {0: Dim("S", min=2, max=50)}}
        program = torch.export.export(
            block, (torch.randn(14, 8), torch.tensor([0, 3, 5, 14])), dynamic_shapes=shapes
        ).module()
        for offsets in ([0, 1], [0, 200], [0, 64, 64, 70, 300]):
            x, offsets = torch.randn(offsets[-1], 8), torch.tensor(offsets)
            torch.testing.assert_close(program(x, offsets), block(x, offsets))


def test_export_packed_with_states():
    block, count = Mamba(8, 4), Dim("s", min=1, max=50)
    shapes = {"x": {0: Dim("T", min=1, max=900)}, "offsets": {0: count + 1}, "state": ({0: count}, {0: count})}
    example = (torch.randn(14, 8), torch.tensor([0, 3, 5, 14]), tuple(block.init_state(3)))
    program = torch.export.export(block, example, dynamic_shapes=shapes).module()
    for bounds in ([0, 5], [0, 64, 64, 70]):
        x, offsets, state = torch.randn(bounds[-1], 8), torch.tensor(bounds), tuple(block.init_state(len(bounds) - 1))
        for got, want in zip(
            torch.utils._pytree.tree_leaves(program(x, offsets, state)),
            torch.utils._pytree.tree_leaves(block(x, offsets, state)),
            strict=True,
        ):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", list(BLOCKS))
def test_an_exported_block_trains(name):
    block, x = BLOCKS[name](), torch.randn(2, 130, 8)
    program = torch.export.export(block, (x,), dynamic_shapes={"x": {1: Dim("l", min=2, max=500)}}).module()
    want = torch.autograd.grad(block(x).square().sum(), list(block.parameters()))
    weights = dict(program.named_parameters())
    got = torch.autograd.grad(program(x).square().sum(), [weights[k] for k, _ in block.named_parameters()])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
