"""Time differences at the ends of int64, where subtraction wraps around and some edges are no numbers any more."""

import math

import pytest
import torch

from hstu_kernels import hstu_attention
from hstu_kernels.impl import cuda, reference

MOST, LEAST = 2**63 - 1, -(2**63)
PAIRS = [
    (0, MOST),
    (0, MOST - 1),
    (LEAST, 0),
    (LEAST, MOST),
    (LEAST, LEAST),
    (-(2**62), 2**62),
    (-1, MOST),
    (LEAST, -1),
]


def bucket_by_formula(a, b, last):
    return min(math.floor(math.log(max(min(abs(a - b), 2**63 - 2), 1)) / 0.301), last)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton", "cuda"])
@pytest.mark.parametrize("last", [4, 128, 145, 146, 200])
@pytest.mark.parametrize("pair", PAIRS)
def test_long_differences_fall_into_the_bucket_of_the_formula(backend, last, pair, request):
    if backend == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("the tensors of this test are on the CPU")
    if backend == "cuda":
        request.getfixturevalue("cuda_on_host")
    # Two heads, each bucket of each with a score of its own: reading or writing beside a head's row is seen.
    q, v = torch.zeros(2, 2, 1), torch.tensor([1.0, 0.0])[:, None, None].expand(2, 2, 1).contiguous()
    table = (1 + torch.arange(2.0 * (last + 1))).view(2, last + 1).requires_grad_()
    stamps = torch.tensor(pair)
    out = hstu_attention(
        q, q, v, torch.tensor([0, 2]), 2, divisor=1.0, timestamps=stamps, time_weight=table, backend=backend
    )
    out[1].sum().backward()
    bucket = bucket_by_formula(*pair, last)
    torch.testing.assert_close(out[1, :, 0], torch.nn.functional.silu(table.detach()[:, bucket]))
    assert table.grad.nonzero().tolist() == [[0, bucket], [1, bucket]]


def test_all_backends_have_one_rule():
    assert reference.difference(torch.tensor(LEAST), torch.tensor(MOST)) == MOST - 1
    assert reference.difference(torch.tensor(5), torch.tensor(-7)) == 12
    assert cuda.bucket_edges is reference.bucket_edges
