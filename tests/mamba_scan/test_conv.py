"""The causal convolution: against torch's own, against itself in pieces, and its gradients."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from mamba_scan import causal_conv1d, causal_conv1d_fn, causal_conv1d_update


def draw(seed, dtype=torch.float64):
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    d, width, packed = rng.choice((1, 3, 16, 21)), rng.choice((1, 2, 3, 4, 7)), rng.random() < 0.5
    args = {"weight": normal(d, width), "activation": rng.choice((None, "silu"))}
    if packed:
        lengths = [rng.choice((0, 1, 2, 3, 64, 67, 131)) for _ in range(rng.randint(1, 4))]
        args["offsets"] = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
        args["x"], segments, index_shape = normal(sum(lengths), d), len(lengths), (sum(lengths),)
    else:
        segments, length = rng.randint(1, 3), rng.choice((1, 2, 5, 64, 65, 130))
        args["x"] = normal(segments, d, length) if rng.random() < 0.5 else normal(segments, length, d).mT
        index_shape = (segments, length)
    if rng.random() < 0.6:
        args["bias"] = normal(d)
    if rng.random() < 0.5:
        args["initial_states"] = normal(segments, d, width - 1)
    if rng.random() < 0.4:
        args["seq_idx"] = torch.randint(-1, 2, index_shape, generator=generator).sort(-1)[0].to(torch.int32)
    return args


def run(args, backend):
    tensors = {
        k: x.detach().requires_grad_() for k, x in args.items() if k in ("x", "weight", "bias", "initial_states")
    }
    out, final = causal_conv1d(**{**args, **tensors}, return_final_states=True, backend=backend)
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype) for y in (out, final)]
    grads = torch.autograd.grad([out, final], list(tensors.values()), directions, allow_unused=True)
    return [out.detach(), final.detach(), *(g for g in grads if g is not None)]


@pytest.mark.parametrize("block", range(6))
def test_cpu_is_the_reference(block):
    for seed in range(block * 20, block * 20 + 20):
        dtype = (torch.float64, torch.float32, torch.bfloat16)[seed % 3]
        tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4e-2}[dtype]
        args = draw(seed, dtype)
        for got, want in zip(run(args, "cpu"), run(args, "reference"), strict=True):
            assert got.dtype == want.dtype and got.shape == want.shape
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * 10)


def test_it_is_torch_own_convolution_cut_to_the_past():
    x, weight, bias = torch.randn(2, 5, 19), torch.randn(5, 4), torch.randn(5)
    want = F.conv1d(x, weight[:, None], bias, padding=3, groups=5)[:, :, :19]
    torch.testing.assert_close(causal_conv1d(x, weight, bias), want)
    torch.testing.assert_close(causal_conv1d_fn(x, weight, bias, activation="swish"), F.silu(want))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_documents_do_not_mix_and_packing_is_the_same_thing(backend):
    torch.manual_seed(0)
    lengths, x, weight = [1, 5, 2, 7], torch.randn(15, 6), torch.randn(6, 4)
    offsets = torch.tensor([0, 1, 6, 8, 15])
    index = torch.repeat_interleave(torch.arange(4, dtype=torch.int32), torch.tensor(lengths))
    packed = causal_conv1d(x, weight, activation="silu", offsets=offsets, backend=backend)
    by_index = causal_conv1d(x.T[None], weight, seq_idx=index[None], activation="silu", backend=backend)
    torch.testing.assert_close(by_index[0].T, packed)
    alone = [causal_conv1d(part.T[None], weight, activation="silu", backend=backend)[0].T for part in x.split(lengths)]
    assert torch.equal(torch.cat(alone), packed)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradcheck(backend):
    for seed in range(12):
        args = draw(seed)
        if args["x"].numel() > 300:
            continue
        names = [k for k in ("x", "weight", "bias", "initial_states") if k in args and args[k].numel()]

        def conv(*xs, args=args, names=names):
            return causal_conv1d(
                **{**args, **dict(zip(names, xs, strict=True))}, return_final_states=True, backend=backend
            )

        assert torch.autograd.gradcheck(conv, [args[k].requires_grad_() for k in names])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_final_states_continue(backend):
    x, weight = torch.randn(2, 3, 11), torch.randn(3, 4)
    out, state = causal_conv1d(x, weight, return_final_states=True, backend=backend)
    first, middle = causal_conv1d(x[:, :, :1], weight, return_final_states=True, backend=backend)
    kept = torch.empty(2, 3, 3)
    rest = causal_conv1d(x[:, :, 1:], weight, initial_states=middle, final_states_out=kept, backend=backend)
    torch.testing.assert_close(torch.cat([first, rest], 2), out)
    assert torch.equal(kept, state) and torch.equal(state, x[:, :, -3:])


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("size", [3, 4, 7])
def test_updates_are_the_convolution(ring, size):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 5, 12), torch.randn(5, 4), torch.randn(5)
    want = causal_conv1d(x, weight, bias, activation="silu")
    state, seen, outs = torch.zeros(2, 5, size), 0, []
    for step in (1, 1, 3, 2, 4, 1):
        rows = x[:, :, seen : seen + step]
        lengths = torch.tensor([seen, seen], dtype=torch.int32) if ring else None
        out = causal_conv1d_update(
            rows[:, :, 0] if step == 1 else rows, state, weight, bias, "silu", cache_seqlens=lengths
        )
        outs.append(out[:, :, None] if step == 1 else out)
        seen += step
    torch.testing.assert_close(torch.cat(outs, 2), want)
    if not ring:
        assert torch.equal(state, x[:, :, -size:])


def test_updates_through_indices_touch_only_their_rows():
    x, weight, pool = torch.randn(2, 3), torch.randn(3, 4), torch.randn(5, 3, 3)
    before, index = pool.clone(), torch.tensor([4, 1])
    out = causal_conv1d_update(x, pool, weight, conv_state_indices=index)
    torch.testing.assert_close(out, (torch.cat([before[index], x[:, :, None]], 2) * weight).sum(-1))
    assert torch.equal(pool[[0, 2, 3]], before[[0, 2, 3]]) and torch.equal(pool[index][:, :, -1], x)


def test_threads_change_no_bit():
    args = draw(3, torch.float32) | {"x": torch.randn(3, 40, 500), "weight": torch.randn(40, 4)}
    args = {k: args[k] for k in ("x", "weight")}
    runs = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        runs.append(run(args, "cpu"))
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_opcheck(backend):
    for seed in (0, 4, 5):
        args = {"bias": None, "seq_idx": None, "initial_states": None, "offsets": None} | draw(seed, torch.float32)
        names = ("x", "weight", "bias", "seq_idx", "initial_states", "offsets")
        fields = [
            x.requires_grad_() if x is not None and x.is_floating_point() else x for x in (args[k] for k in names)
        ]
        opcheck(torch.ops.mamba_scan.conv.default, (*fields, True, True, backend))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x", {"x": torch.ones(3, 4)}),
        ("weight", {"weight": torch.ones(4, 4)}),
        ("bias", {"bias": torch.ones(4)}),
        ("seq_idx", {"seq_idx": torch.ones(2, 4)}),
        ("initial_states", {"initial_states": torch.ones(2, 3, 4)}),
        ("activation", {"activation": "relu"}),
        ("offsets", {"x": torch.ones(5, 3), "offsets": torch.tensor([0, 4])}),
    ],
)
def test_a_broken_argument_is_named(name, change):
    with pytest.raises(ValueError, match=rf"^{name}: got .*, needs "):
        causal_conv1d(**{"x": torch.ones(2, 3, 4), "weight": torch.ones(3, 4)} | change)
