"""Bad input and missing backends: each a clear error or one warning, never a silent wrong answer."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from hstu_kernels import available_backends, dispatch, hstu_attention, native
from hstu_kernels.impl import cpu


def good():
    torch.manual_seed(0)
    return {
        "q": torch.randn(6, 2, 4),
        "k": torch.randn(6, 2, 4),
        "v": torch.randn(6, 2, 3),
        "offsets": torch.tensor([0, 2, 6]),
        "max_seqlen": 4,
    }


BAD = {
    "falling offsets": ({"offsets": torch.tensor([0, 4, 3, 6])}, "offsets: got a fall from 4 to 3 at index 2"),
    "offsets from 1": ({"offsets": torch.tensor([1, 6])}, "offsets: got 1 as first element, needs 0"),
    "offsets too short": ({"offsets": torch.tensor([0, 4])}, "offsets: got 4 as last element, needs .* 6"),
    "float offsets": ({"offsets": torch.tensor([0.0, 6.0])}, "offsets: got dtype torch.float32, needs int32 or int64"),
    "offsets of two dimensions": ({"offsets": torch.tensor([[0, 6]])}, "offsets: got shape"),
    "no offsets": ({"offsets": torch.empty(0, dtype=torch.int64)}, "offsets: got no element"),
    "sequence too long": ({"max_seqlen": 3}, "sequence 1 has length 4, needs at most max_seqlen, 3"),
    "dtypes mixed": ({"k": torch.randn(6, 2, 4).double()}, "k: got dtype torch.float64, needs the dtype of q"),
    "integer q": ({"q": torch.ones(6, 2, 4, dtype=torch.int64)}, "q: got dtype torch.int64"),
    "other device": ({"v": torch.randn(6, 2, 3, device="meta")}, "v: got device meta, needs the device of q, cpu"),
    "heads differ": ({"v": torch.randn(6, 1, 3)}, "v: got 1 heads"),
    "widths differ": ({"k": torch.randn(6, 2, 5)}, "k: got width 5, needs the width of q, 4"),
    "rows differ": ({"v": torch.randn(5, 2, 3)}, "v: got 5 rows"),
    "q of fewer rows": ({"q": torch.randn(5, 2, 4)}, "q: got 5 rows, needs as many as k, 6, or q_offsets"),
    "two dimensions": ({"q": torch.randn(6, 4)}, "q: got shape"),
    "new rows exceed old": (
        {"q": torch.randn(4, 2, 4), "q_offsets": torch.tensor([0, 3, 4])},
        "q_offsets: sequence 0 has 3 rows of q, needs at most its 2 rows of k",
    ),
    "q_offsets too short": ({"q_offsets": torch.tensor([0, 6])}, "q_offsets: got 2 elements, needs 3"),
    "too many targets": ({"num_targets": torch.tensor([3, 0])}, "num_targets: got 3 for sequence 0"),
    "targets too few": ({"num_targets": torch.tensor([1])}, "num_targets: got 1 elements, needs 2"),
    "negative contextual": ({"num_contextual": -1}, "num_contextual: got -1"),
    "negative contextual tensor": ({"num_contextual": torch.tensor([0, -2])}, "num_contextual: got -2"),
    "table too small": ({"position_weight": torch.randn(1, 5)}, "position_weight: got width 5, .* at least 7"),
    "even table": ({"position_weight": torch.randn(1, 8)}, "position_weight: got width 8"),
    "table of three heads": ({"position_weight": torch.randn(3, 7)}, r"position_weight: got shape \[3, 7\]"),
    "table of one dimension": ({"position_weight": torch.randn(7)}, "position_weight: got shape"),
    "table dtype": ({"position_weight": torch.randn(1, 7).double()}, "position_weight: got dtype"),
    "no timestamps": ({"time_weight": torch.randn(1, 9)}, "timestamps: got None"),
    "float timestamps": (
        {"time_weight": torch.randn(1, 9), "timestamps": torch.zeros(6)},
        "timestamps: got dtype torch.float32, needs int64",
    ),
    "too few timestamps": (
        {"time_weight": torch.randn(1, 9), "timestamps": torch.zeros(5, dtype=torch.int64)},
        r"timestamps: got shape \[5\], needs \[6\]",
    ),
    "empty time table": (
        {"time_weight": torch.randn(1, 0), "timestamps": torch.zeros(6, dtype=torch.int64)},
        "time_weight: got width 0",
    ),
    "time shift": ({"time_shift": 2}, "time_shift: got 2, needs 0 or 1"),
    "dropout of 1": ({"dropout": 1.0}, "dropout: got 1.0"),
    "divisor 0": ({"divisor": 0.0}, "divisor: got 0"),
    "divisor shape": ({"divisor": torch.ones(5)}, r"divisor: got shape \[5\], needs \[6\]"),
    "divisor with grad": ({"divisor": torch.ones(6, requires_grad=True)}, "divisor: got a tensor that requires grad"),
    "negative window": ({"max_attn_len": -1}, "max_attn_len: got -1"),
    "no heads": ({"q": torch.randn(6, 0, 4)}, r"q: got shape \[6, 0, 4\], needs a head or more"),
    "offsets as a list": ({"offsets": [0, 2, 6]}, "offsets: got a list, needs a tensor"),
    "fractional max_seqlen": ({"max_seqlen": 7.0}, "max_seqlen: got 7.0, needs an integer"),
    "divisor of nan": ({"divisor": float("nan")}, "divisor: got nan"),
    "seed too large": ({"seed": 2**63, "dropout": 0.5}, "seed: got 9223372036854775808"),
    "fractional seed": ({"seed": torch.tensor(1.5), "dropout": 0.5}, "seed: got dtype torch.float32"),
    "numpy q": ({"q": torch.randn(6, 2, 4).numpy()}, "q: got a ndarray, needs a tensor"),
    "a list as k": ({"k": [[1.0]]}, "k: got a list, needs a tensor"),
    "fractional window": ({"max_attn_len": 2.5}, "max_attn_len: got 2.5, needs an integer"),
    "fractional full rows": ({"min_full_attn_len": 2.5}, "min_full_attn_len: got 2.5, needs an integer"),
    "fractional time shift": ({"time_shift": 0.5}, "time_shift: got 0.5, needs an integer"),
    "seed of 1.5": ({"seed": 1.5, "dropout": 0.1}, "seed: got 1.5, needs an integer"),
    "fractional seed without dropout": ({"seed": 1.5}, "seed: got 1.5, needs an integer"),
    "two seeds": (
        {"seed": torch.tensor([1, 2]), "dropout": 0.1},
        r"seed: got dtype torch.int64 and shape \[2\], needs one integer",
    ),
    "a text as alpha": ({"alpha": "big"}, "alpha: got a str, needs a number"),
    "alpha not finite": ({"alpha": float("nan")}, "alpha: got nan, needs a finite number"),
    "a list as divisor": ({"divisor": [1.0] * 6}, "divisor: got a list, needs a number"),
    "zero among divisors": ({"divisor": torch.tensor([1.0, 1, 0, 1, 1, 1])}, "divisor: got a zero .* needs finite"),
    "nan among divisors": (
        {"divisor": torch.tensor([1, 1, torch.nan, 1, 1, 1])},
        "divisor: got a zero or a number that",
    ),
    "lists with contextual rows": ({"offsets": [0, 6], "num_contextual": 1}, "offsets: got a list, needs a tensor"),
    "fractional contextual rows": ({"num_contextual": 1.5}, "num_contextual: got 1.5, needs an integer"),
    "a list of targets": ({"num_targets": [1, 0]}, "num_targets: got a list, needs a tensor"),
    "a list as table": ({"position_weight": [0.0]}, "position_weight: got a list, needs a tensor"),
    "a list of timestamps": ({"timestamps": [0] * 6}, "timestamps: got a list, needs a tensor"),
    "bias too long": ({"bias": torch.zeros(1, 21)}, "bias: got width 21, needs 20, the sum of query rows times keys"),
    "bias of three heads": (
        {"bias": torch.zeros(3, 20)},
        r"bias: got shape \[3, 20\], needs \[1, width\] or \[2, width\]",
    ),
    "groups of no targets": ({"target_group_size": 0}, "target_group_size: got 0, needs 1"),
    "groups on both sides": ({"target_group_size": 2, "causal": False}, "target_group_size: got 2 and causal=False"),
    "unknown backend": ({"backend": "gpu"}, "backend: got 'gpu', needs None or one of 'reference', 'cpu', 'triton'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    changes, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        hstu_attention(**(good() | changes))


def test_integers_of_any_kind_are_taken():
    expected = hstu_attention(**good(), dropout=0.5, seed=3)
    for longest, seed in ((np.int64(4), torch.tensor(3, dtype=torch.int32)), (torch.tensor(4), torch.tensor(3))):
        assert torch.equal(hstu_attention(**(good() | {"max_seqlen": longest}), dropout=0.5, seed=seed), expected)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_nothing_in_nothing_out(backend):
    for offsets, batch in ((torch.tensor([0]), 0), (torch.tensor([0, 0, 0]), 2)):
        q, k, v = (torch.randn(0, 2, width, requires_grad=True) for width in (4, 4, 3))
        tables = [torch.randn(1, 7, requires_grad=True), torch.randn(2, 9, requires_grad=True)]
        out = hstu_attention(
            q,
            k,
            v,
            offsets,
            4,
            num_targets=torch.zeros(batch, dtype=torch.int64),
            position_weight=tables[0],
            timestamps=torch.empty(0, dtype=torch.int64),
            time_weight=tables[1],
            backend=backend,
        )
        assert out.shape == (0, 2, 3)
        out.sum().backward()
        assert all(not table.grad.any() for table in tables)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_nan_in_nan_out(backend):
    arguments = good()
    arguments["q"][3] = float("nan")
    out = hstu_attention(**arguments, backend=backend)
    assert out[3].isnan().all() and not out[[0, 1, 2, 4, 5]].isnan().any()


def test_views_of_a_projection_need_no_copy():
    wide = torch.randn(6, 2, 20)
    q, k, v = wide[..., :4], wide[..., 5:9], wide[..., 10:17]
    expected = hstu_attention(q.contiguous(), k.contiguous(), v.contiguous(), torch.tensor([0, 6]), 6)
    torch.testing.assert_close(hstu_attention(q, k, v, torch.tensor([0, 6]), 6), expected)
    columns = wide.transpose(0, 2).contiguous().transpose(0, 2)
    found = hstu_attention(columns[..., :4], columns[..., 5:9], columns[..., 10:17], torch.tensor([0, 6]), 6)
    torch.testing.assert_close(found, expected)


def test_without_the_native_module_the_reference_runs_and_says_so_once(monkeypatch, recwarn):
    def fail(*_):
        raise native.BuildError("no C++ compiler found")

    monkeypatch.setattr(native, "load", fail)
    cpu._load.cache_clear()
    dispatch._warn_once.cache_clear()
    try:
        assert available_backends()["cpu"] == "no C++ compiler found"
        with pytest.warns(RuntimeWarning, match="slow reference path.*no C\\+\\+ compiler found") as caught:
            first = hstu_attention(**good())
            hstu_attention(**good())
        assert len(caught) == 1
        torch.testing.assert_close(first, hstu_attention(**good(), backend="reference"))
        with pytest.raises(RuntimeError, match='backend="cpu" cannot run here: no C\\+\\+ compiler found'):
            hstu_attention(**good(), backend="cpu")
    finally:
        cpu._load.cache_clear()
        dispatch._warn_once.cache_clear()


def test_import_needs_neither_compiler_nor_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import hstu_kernels\n"
        "assert 'hstu_kernels._cpu' not in sys.modules\n"
        "assert 'triton' in hstu_kernels.available_backends()['triton']"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_triton_refuses_float64():
    pytest.importorskip("triton")
    arguments = {name: x.double() if name in "qkv" else x for name, x in good().items()}
    with pytest.raises(ValueError, match="needs float32, bfloat16 or float16"):
        hstu_attention(**arguments, backend="triton")


def test_unknown_instruction_set(monkeypatch):
    monkeypatch.setenv("FOOTFALL_ISA", "sse9")
    with pytest.raises(RuntimeError, match="FOOTFALL_ISA=sse9 cannot run here, needs one of portable"):
        hstu_attention(**good(), backend="cpu")
