"""All backends give one answer: drawn configurations of the whole contract, inputs of scale 1, every gradient."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from hstu_kernels import available_backends, dispatch, hstu_attention
from hstu_kernels.impl import reference

OUT_TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
GRAD_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
NAMES = ("out", "dq", "dk", "dv", "d_position", "d_time", "d_bias")
TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# What the CUDA kernels lack, and refuse.
CUDA_LACKS = ("bias", "target_group_size")


class Drawn:
    """One configuration: arguments in float64 and the keywords that go with them."""

    def __init__(self, draw, longest, max_batch):
        def pick(*options):
            return draw(st.sampled_from(options))

        lengths = draw(st.lists(st.integers(0, longest) | st.sampled_from([0, 1]), max_size=max_batch))
        batch = len(lengths)
        delta = pick(False, False, True)
        new = [draw(st.integers(0, n)) for n in lengths] if delta else lengths
        heads, d_qk, d_v = pick(1, 2, 3), pick(1, 8, 16, 25, 50, 64), pick(1, 5, 16, 25, 32, 50, 70)
        total, total_q = sum(lengths), sum(new)
        self.max_seqlen = max([1, *lengths]) + pick(0, 3)
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.leaves = {
            "q": normal(total_q, heads, d_qk),
            "k": normal(total, heads, d_qk),
            "v": normal(total, heads, d_v),
        }
        if pick(True, True, False):
            width = 2 * (self.max_seqlen + pick(0, 2)) - 1
            self.leaves["position_weight"] = normal(pick(1, heads), width)
        self.constants = {"offsets": torch.tensor([0, *lengths]).cumsum(0).to(pick(torch.int32, torch.int64))}
        if pick(True, True, False):
            self.leaves["time_weight"] = normal(pick(1, heads), pick(1, 13, 129, 180))
            span = pick(3, 10**4, 10**9, 10**12, 10**17, 2**63 - 1)
            stamps = torch.randint(-span, span, (total,), generator=generator)
            self.constants["timestamps"] = stamps.sort().values if pick(True, False) else stamps
        if pick(True, False, False):
            pairs = sum(rows * keys for rows, keys in zip(new, lengths, strict=True))
            self.leaves["bias"] = normal(pick(1, heads), pairs)
        if delta:
            self.constants["q_offsets"] = torch.tensor([0, *new]).cumsum(0)
        if pick(True, False):
            targets = [draw(st.integers(0, min(n, 6))) for n in lengths]
            self.constants["num_targets"] = torch.tensor(targets, dtype=torch.int64)
        contextual = pick("none", "int", "tensor")
        if contextual == "tensor":
            counts = [draw(st.integers(0, 4)) for _ in range(batch)]
            self.constants["num_contextual"] = torch.tensor(counts, dtype=torch.int32)
        if pick(True, False, False):
            self.constants["divisor"] = 0.5 + 3 * torch.rand(total_q, generator=generator)
        self.options = {
            "causal": pick(True, True, False),
            "alpha": pick(None, 1.0),
            "max_attn_len": pick(0, 0, 1, 4, 33),
            "min_full_attn_len": pick(0, 0, 2, 9),
            "time_shift": pick(0, 1),
            "dropout": pick(0.0, 0.0, 0.3),
            "seed": draw(st.integers(-(2**63), 2**63 - 1)),
        }
        if self.options["causal"]:
            self.options["target_group_size"] = pick(1, 1, 2, 3)
        if contextual == "int":
            self.options["num_contextual"] = draw(st.integers(0, 4))
        self.grad = normal(total_q, heads, d_v)

    def run(self, backend, dtype, device="cpu"):
        leaves = {name: x.to(device, dtype, copy=True).requires_grad_() for name, x in self.leaves.items()}
        constants = {name: x.to(device) for name, x in self.constants.items()}
        out = hstu_attention(**leaves, **constants, **self.options, max_seqlen=self.max_seqlen, backend=backend)
        gradients = torch.autograd.grad(out, list(leaves.values()), self.grad.to(device, dtype))
        return {name: x.detach().cpu() for name, x in zip(["out", *leaves], (out, *gradients), strict=True)}

    def check(self, backend, dtype, device="cpu"):
        if backend == "cuda":
            self.leaves = {name: x for name, x in self.leaves.items() if name not in CUDA_LACKS}
            self.options = {name: x for name, x in self.options.items() if name not in CUDA_LACKS}
        # The reference sees the same rounded inputs.
        rounded = object.__new__(Drawn)
        rounded.__dict__.update(self.__dict__)
        rounded.leaves = {name: x.to(dtype).double() for name, x in self.leaves.items()}
        rounded.grad = self.grad.to(dtype).double()
        expected, found = rounded.run("reference", torch.float64), self.run(backend, dtype, device)
        for name, x in found.items():
            tolerance = (OUT_TOLERANCE if name == "out" else GRAD_TOLERANCE)[dtype]
            assert x.dtype == dtype
            assert relative_error(x, expected[name]) <= tolerance, (backend, dtype, name)


def relative_error(found, expected):
    if found.numel() == 0:
        return 0.0
    # NaN fails the comparison that this number goes into.
    return float((found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


@st.composite
def configurations(draw, longest, max_batch):
    return Drawn(draw, longest, max_batch)


def drawn(examples):
    return settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@drawn(100)
@given(config=configurations(longest=100, max_batch=4), dtype=st.sampled_from(list(OUT_TOLERANCE)))
def test_cpu_equals_reference(config, dtype):
    config.check("cpu", dtype)


@drawn(300)
@given(
    config=configurations(longest=20, max_batch=2) | configurations(longest=70, max_batch=1),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]),
)
def test_triton_and_cpu_equal_reference(config, dtype):
    pytest.importorskip("triton")
    config.check("cpu", dtype)
    config.check("triton", dtype, TRITON_DEVICE)


HALF_OR_SINGLE = [torch.float32, torch.bfloat16, torch.float16]


def test_cuda_sources_on_a_cpu_equal_reference(cuda_on_host):
    @drawn(60)
    @given(config=configurations(longest=100, max_batch=2), dtype=st.sampled_from(HALF_OR_SINGLE))
    def compare(config, dtype):
        config.check("cuda", dtype)

    compare()


@pytest.mark.gpu
@drawn(200)
@given(config=configurations(longest=300, max_batch=4), dtype=st.sampled_from(HALF_OR_SINGLE))
def test_cuda_on_a_card_equals_reference(config, dtype):
    config.check("cuda", dtype, "cuda")


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
@drawn(20)
@given(config=configurations(longest=70, max_batch=3), dtype=st.sampled_from(list(OUT_TOLERANCE)))
def test_other_instruction_sets_equal_reference(isa, config, dtype):
    before = os.environ.get("FOOTFALL_ISA")
    os.environ["FOOTFALL_ISA"] = isa
    try:
        config.check("cpu", dtype)
    except RuntimeError as error:
        if "FOOTFALL_ISA" in str(error):
            pytest.skip(str(error))
        raise
    finally:
        os.environ.pop("FOOTFALL_ISA")
        if before is not None:
            os.environ["FOOTFALL_ISA"] = before


@pytest.mark.parametrize("lengths", [[700, 3], [1300]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sequences_that_are_split_into_pieces(lengths, dtype):
    total = sum(lengths)
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(total, 2, 8, generator=generator, dtype=torch.float64) for _ in range(3)]
    tables = [torch.randn(1, 2 * 1300 - 1, generator=generator), torch.randn(2, 129, generator=generator)]
    stamps = torch.randint(0, 10**9, (total,), generator=generator).sort().values
    results = []
    for backend, kind in (("reference", torch.float64), ("cpu", dtype)):
        q, k, v, position, times = (x.to(kind, copy=True).requires_grad_() for x in (*leaves, *tables))
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        out = hstu_attention(
            q,
            k,
            v,
            offsets,
            1300,
            position_weight=position,
            timestamps=stamps,
            time_weight=times,
            num_contextual=3,
            backend=backend,
        )
        out.square().sum().backward()
        results.append([x.detach() for x in (out, *(leaf.grad for leaf in (q, k, v, position, times)))])
    for expected, found in zip(*results, strict=True):
        assert relative_error(found, expected) <= GRAD_TOLERANCE[dtype]


def test_backward_is_bitwise_equal_over_runs_and_threads():
    generator = torch.Generator().manual_seed(1)
    lengths = [640, 5, 77, 0, 130, 1]
    total = sum(lengths)
    leaves = [torch.randn(total, 2, 24, generator=generator).requires_grad_() for _ in range(3)]
    tables = [torch.randn(1, 2 * 640 - 1).requires_grad_(), torch.randn(1, 129).requires_grad_()]
    stamps = torch.randint(0, 10**7, (total,), generator=generator)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (2, 2, 2, 1, 3):
            torch.set_num_threads(threads)
            out = hstu_attention(
                *leaves,
                torch.tensor([0, *lengths]).cumsum(0),
                640,
                position_weight=tables[0],
                timestamps=stamps,
                time_weight=tables[1],
                dropout=0.1,
                seed=4,
                backend="cpu",
            )
            results.append((out, *torch.autograd.grad(out.sin().sum(), leaves + tables)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_any_layout_of_the_other_tensors_is_read_as_it_is(backend):
    if backend == "triton":
        pytest.importorskip("triton")
    device = TRITON_DEVICE if backend == "triton" else "cpu"
    generator = torch.Generator().manual_seed(3)
    leaves = [torch.randn(7, 2, 4, generator=generator, device="cpu").to(device) for _ in range(3)]
    stamps = torch.randint(0, 10**6, (7,), generator=generator).sort().values.to(device)
    divisor = (1 + torch.rand(7, generator=generator)).to(device)
    offsets = torch.tensor([0, 3, 7], device=device)

    def attend(spread):
        return hstu_attention(
            *leaves,
            spread(offsets),
            4,
            q_offsets=spread(offsets),
            timestamps=spread(stamps),
            time_weight=torch.linspace(-1, 1, 40, device=device)[None],
            divisor=spread(divisor),
            backend=backend,
        )

    plain = attend(lambda x: x)
    torch.testing.assert_close(attend(lambda x: torch.stack([x, -x], 1)[:, 0]), plain)
    one = hstu_attention(*leaves, offsets, 4, divisor=torch.tensor(2.5, device=device).expand(7), backend=backend)
    torch.testing.assert_close(one, hstu_attention(*leaves, offsets, 4, divisor=2.5, backend=backend))


@pytest.mark.parametrize("size", [1e-6, 1e-27, float("nan")])
def test_triton_tables_do_not_depend_on_order_in_deterministic_mode(size):
    pytest.importorskip("triton")
    assert available_backends()["triton"] == "ok"
    generator = torch.Generator().manual_seed(2)
    leaves = [torch.randn(30, 2, 8, generator=generator).to(TRITON_DEVICE) for _ in range(3)]
    position = torch.randn(1, 39, generator=generator).to(TRITON_DEVICE).requires_grad_()
    times = torch.randn(2, 40, generator=generator).to(TRITON_DEVICE).requires_grad_()
    stamps = torch.arange(30, device=TRITON_DEVICE) * 100
    found = {}
    for backend in ("reference", "triton"):
        torch.use_deterministic_algorithms(True)
        try:
            out = hstu_attention(
                *leaves,
                torch.tensor([0, 20, 30], device=TRITON_DEVICE),
                20,
                position_weight=position,
                timestamps=stamps,
                time_weight=times,
                backend=backend,
            )
            found[backend] = torch.autograd.grad(size * out.sum(), [position, times])
        finally:
            torch.use_deterministic_algorithms(False)
    for a, b in zip(*found.values(), strict=True):
        if size != size:
            assert b.isnan().all()
        else:
            assert relative_error(b, a.double()) < 1e-5


def test_memory_is_linear_in_rows():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("no /proc/self/clear_refs to measure with")
    code = """
import torch
from hstu_kernels import hstu_attention

def attend(n):
    q, k, v = (torch.randn(n, 1, 16).requires_grad_() for _ in range(3))
    tables = [torch.randn(1, 2 * n - 1).requires_grad_(), torch.randn(1, 129).requires_grad_()]
    out = hstu_attention(q, k, v, torch.tensor([0, n]), n, position_weight=tables[0], timestamps=torch.arange(n),
                         time_weight=tables[1], backend="cpu")
    out.sum().backward()

def peak():
    return int(next(l.split()[1] for l in open("/proc/self/status").read().splitlines() if l.startswith("VmHWM")))

attend(64)
open("/proc/self/clear_refs", "w").write("5")
before = peak()
attend(8192)
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # One [n, n] matrix of float32 would be 256 MB.
    assert int(done.stdout) < 40 * 1024


# Each is the reference with one mistake; the comparison above must notice it.
MUTANTS = {
    "x/2 for SiLU": ("sigmoid = torch.sigmoid(s.scores)", "sigmoid = torch.full_like(s.scores, 0.5)"),
    "x/2 for SiLU, forward": ("torch.sigmoid(s.scores) * s.scale, s.v", "0.5 * s.scale, s.v"),
    "mask off by one": ("(distance > 0)", "(distance > 1)"),
    "history sees targets": ("(distance > 0) & (col < last_id)", "distance > 0"),
    "diagonal left out": ("mask = mask | (i[:, None] == j[None, :])", "pass"),
    "window off by one": ("distance <= p.max_attn_len", "distance < p.max_attn_len"),
    "full rows off by one": ("last_id - p.min_full_attn_len)", "last_id - p.min_full_attn_len + 1)"),
    "ignored target mask": ("int(p.num_targets[b])", "0"),
    "ignored contextual rows": ("int(p.num_contextual[b])", "0"),
    "bias scaled like q·k": ("self.scores + p.position_weight", "self.scores + p.alpha * p.position_weight"),
    "table gradient of the wrong sign": ("index.flatten(), summed", "index.flatten(), -summed"),
    "time shift ignored": ("i + p.time_shift", "i"),
    "bucket edge on the wrong side": ("edges, right=True", "edges, right=False"),
    "dropout without its scale": ("/ (1.0 - p.dropout)", ""),
    "divisor of the wrong rows": ("p.row_divisor[rows]", "p.row_divisor[rows].flip(0)"),
    "bias scaled by alpha": ("self.scores + p.bias.to", "self.scores + p.alpha * p.bias.to"),
    "bias of the wrong sequence": ("p.bias_begin[b]", "p.bias_begin[0]"),
    "target groups ignored": ("if p.target_group_size > 1", "if False"),
    "target groups see what comes": ("mate & (j[None, :] < i[:, None])", "mate"),
    "time differences that wrap": ("difference(ts_row[:, None], ts[None, :])", "(ts_row[:, None] - ts[None, :]).abs()"),
    "head forgotten in dropout": ("heads[:, None, None]", "0 * heads[:, None, None]"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_noticed(name, monkeypatch):
    right, wrong = MUTANTS[name]
    source = Path(reference.__file__).read_text()
    assert right in source
    mutant = ModuleType("mutant")
    exec(compile(source.replace(right, wrong), "mutant", "exec"), mutant.__dict__)
    implementation = dispatch.implementation
    monkeypatch.setattr(
        dispatch, "implementation", lambda backend: mutant if backend == "cpu" else implementation(backend)
    )

    @settings(drawn(150), phases=[Phase.generate])
    @given(config=configurations(longest=20, max_batch=3))
    def compare(config):
        config.check("cpu", torch.float32)

    with pytest.raises(AssertionError):
        compare()
