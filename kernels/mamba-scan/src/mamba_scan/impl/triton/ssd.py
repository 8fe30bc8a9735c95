# mypy: allow-untyped-defs, allow-incomplete-defs
"""The scan of Mamba-2 in Triton: matrix products within chunks of steps, one product with the state that enters them.

Forward: what every chunk adds to the state; the states passed from chunk to chunk of a segment; the outputs. Backward:
the first two again, then once more against time for the gradients of the states, then the gradients of each chunk's
inputs. Sums over heads and chunks are taken afterwards by torch in a fixed order: no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mamba_scan.pointers import as_like
from mamba_scan.problem_ssd import SSDProblem

# Heads whose gradients of B and C one program adds up.
_HEADS = 4


def ssd_forward(p: SSDProblem) -> tuple[Tensor, Tensor]:
    """As ``cpu.ssd_forward``."""
    chunks = _Chunks(p, p.steps())
    states, final = chunks.states(chunks.x, chunks.B, p.initial_states)
    return torch.empty_like(p.x).copy_(p.finished(chunks.outputs(states))), final


def ssd_backward(p: SSDProblem, dout: Tensor | None, dfinal: Tensor | None) -> dict[str, Tensor]:
    """As ``cpu.ssd_backward``; autograd for what comes before the scan and after it."""
    tensors = p.leaves()
    with torch.enable_grad():
        steps = p.replaced(tensors).steps()
    chunks = _Chunks(p, steps.detach())
    states, _ = chunks.states(chunks.x, chunks.B, p.initial_states)
    # Of what comes after the scan only the gate needs the scan's output.
    y = chunks.outputs(states) if p.z is not None else torch.zeros_like(p.x, dtype=p.dtype)
    with torch.enable_grad():
        out = p.replaced(tensors).finished(y.requires_grad_())
    dout = torch.zeros_like(out) if dout is None else dout
    dy, *direct = torch.autograd.grad(out, [y, *tensors.values()], dout, allow_unused=True)
    dy = chunks.rows(dy)
    ends, dinitial = chunks.states(dy, chunks.C, dfinal, reverse=True)
    grads = chunks.gradients(dy, states, ends) | {"initial_states": dinitial}
    before = torch.autograd.grad(steps, list(tensors.values()), grads.pop("steps"), allow_unused=True)
    parts = zip(tensors.items(), direct, before, strict=True)
    found = {name: [g for g in (grads.get(name), *autograd) if g is not None] for (name, _), *autograd in parts}
    return {name: as_like(sum(found[name], x.new_zeros(())), x) for name, x in tensors.items()}


class _Chunks:
    """A problem cut into chunks that begin with every segment, and the kernels that run over them.

    Rows are [T, h, p] in either layout; states are [K, h, p, n], one for each of K chunks.
    """

    def __init__(self, p: SSDProblem, steps: Tensor) -> None:
        def rows(x: Tensor) -> Tensor:
            return x if p.offsets is not None else x.flatten(0, 1)

        self.p = p
        self.x, self.B, self.C, self.dt = rows(p.x), rows(p.B), rows(p.C), rows(steps).contiguous()
        self.A = p.A.to(torch.float32).contiguous()
        self.heads, self.width = p.x.shape[-2:]
        device, segments = p.device, p.segments
        longest = p.chunk_size if p.offsets is not None else min(p.chunk_size, p.x.shape[1])
        steps_of_chunk = _block(longest)
        if p.offsets is None:
            bounds = torch.arange(segments + 1, device=device) * p.x.shape[1]
            self.count = segments * triton.cdiv(p.x.shape[1], steps_of_chunk)
        else:
            # An upper bound, because to ask for the number itself would wait for the device; the last ones are empty.
            bounds = p.offsets.to(torch.int64)
            self.count = p.x.shape[0] // steps_of_chunk + segments
        self.chunks_of = (bounds.diff() + steps_of_chunk - 1) // steps_of_chunk
        ends = self.chunks_of.cumsum(0)
        self.first_of = ends - self.chunks_of
        if self.count:
            k = torch.arange(self.count, device=device)
            segment = torch.searchsorted(ends, k, right=True).clamp(max=segments - 1)
            self.first = bounds[segment] + (k - self.first_of[segment]) * steps_of_chunk
            self.size = (bounds[segment + 1] - self.first).clamp(0, steps_of_chunk)
        self.options = {
            "PER_GROUP": self.heads // p.B.shape[-2],
            "T": steps_of_chunk,
            "P": _block(self.width),
            "N": _block(p.states),
            # The products of half-precision inputs need no more bits than theirs.
            "PRECISION": "ieee" if p.x.dtype == torch.float32 else "tf32",
        }

    def states(self, x: Tensor, B: Tensor, start: Tensor | None, reverse: bool = False) -> tuple[Tensor, Tensor]:
        """The state that enters every chunk, and those after the last chunks [S, h, p, n].

        With reverse, x = dy and B = C: gradients of the states that leave the chunks, and of the initial states.
        """
        p, cells = self.p, self.width * self.p.states
        states = x.new_empty(self.count, self.heads, self.width, p.states, dtype=torch.float32)
        totals = x.new_empty(self.count, self.heads, dtype=torch.float32)
        blocks = triton.cdiv(self.width, self.options["P"]) * triton.cdiv(p.states, self.options["N"])
        if states.numel():
            _chunk_states_kernel[(self.count, self.heads, blocks)](
                states, totals, x, B, *self._shared(), *x.stride(), *B.stride(), REVERSE=reverse, **self.options
            )
        final = x.new_empty(p.segments, self.heads, self.width, p.states, dtype=torch.float32)
        if final.numel():
            start = None if start is None else start.to(torch.float32).contiguous()
            _pass_states_kernel[(p.segments, self.heads, triton.cdiv(cells, 256))](
                states, totals, start, final, self.first_of, self.chunks_of, self.heads, cells,
                REVERSE=reverse, CELLS=256,
            )  # fmt: skip
        return states, final

    def outputs(self, states: Tensor) -> Tensor:
        """y = H C in float32, shaped as x, before skip connection and gate."""
        y = torch.empty(self.x.shape, dtype=torch.float32, device=self.x.device)
        if y.numel():
            _chunk_outputs_kernel[(self.count, self.heads, triton.cdiv(self.width, self.options["P"]))](
                y, states, self.x, self.B, self.C, *self._shared(), *self._strides(), **self.options
            )
        return y.view(self.p.x.shape)

    def gradients(self, dy: Tensor, states: Tensor, ends: Tensor) -> dict[str, Tensor]:
        """Gradients of x, the step sizes "steps", A, B and C, of what enters and what is to leave every chunk."""
        p, groups = self.p, self.p.B.shape[-2]
        parts = triton.cdiv(self.options["PER_GROUP"], _HEADS)
        dx = torch.empty(self.x.shape, dtype=torch.float32, device=p.device)
        ddt = torch.empty_like(self.dt)
        dA = self.dt.new_zeros(self.count, self.heads)
        dB, dC = self.dt.new_zeros(2, parts, *self.B.shape)
        if self.count and self.heads:
            _chunk_inputs_kernel[(self.count, self.heads)](
                dx, ddt, dA, dy, states, ends, self.x, self.B, self.C, *self._shared(), *self._strides(), **self.options
            )
            _chunk_coefficients_kernel[(self.count, groups * parts, triton.cdiv(p.states, self.options["N"]))](
                dB, dC, dy, states, ends, self.x, self.B, self.C, *self._shared(), *self._strides(), self.dt.shape[0],
                groups, HEADS=_HEADS, **self.options,
            )  # fmt: skip
        whole = {"x": (dx, p.x), "steps": (ddt, p.dt), "B": (dB.sum(0), p.B), "C": (dC.sum(0), p.C)}
        return {name: grad.view(x.shape) for name, (grad, x) in whole.items()} | {"A": dA.sum(0)}

    def rows(self, x: Tensor) -> Tensor:
        """A tensor shaped as x as contiguous rows."""
        return x.reshape(self.x.shape).contiguous()

    def _shared(self) -> tuple:
        return self.dt, self.A, self.first, self.size, self.heads, self.width, self.p.states

    def _strides(self) -> tuple[int, ...]:
        return *self.x.stride(), *self.B.stride(), *self.C.stride()


def _block(size: int) -> int:
    """Powers of two that matrix products take."""
    return max(16, min(64, triton.next_power_of_2(size)))


@triton.jit
def _steps(dt, A, first, size, head, heads, T: tl.constexpr):
    """Step sizes of a chunk, zero past its end, and logarithms of the decay from its start through each of them."""
    t = tl.arange(0, T)
    step = tl.load(dt + (first + t) * heads + head, mask=t < size, other=0.0)
    return step, tl.cumsum(step * tl.load(A + head), 0)


@triton.jit
def _last(decay, T: tl.constexpr):
    """The logarithm of the decay through a whole chunk."""
    return tl.sum(tl.where(tl.arange(0, T) == T - 1, decay, 0.0), 0)


@triton.jit
def _tile(x, first, size, column, width, row_stride, column_stride, T: tl.constexpr):
    """Some columns of a chunk's rows [T, columns], zero outside."""
    t = tl.arange(0, T)
    inside = (t < size)[:, None] & (column < width)[None, :]
    at = (first + t)[:, None] * row_stride + column[None, :] * column_stride
    return tl.load(x + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _pairs(
    a, b, first, size, width, a_row, a_column, b_row, b_column, T: tl.constexpr, W: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Products a_i . b_j of all rows of a chunk [T, T]."""
    total = tl.zeros((T, T), tl.float32)
    for start in range(0, width, W):
        column = start + tl.arange(0, W)
        left = _tile(a, first, size, column, width, a_row, a_column, T)
        right = _tile(b, first, size, column, width, b_row, b_column, T)
        total += tl.dot(left, tl.trans(right), input_precision=PRECISION)
    return total


@triton.jit
def _through(
    a, first, size, width, a_row, a_column, state, stride, other, other_width, other_stride, T: tl.constexpr,
    W: tl.constexpr, V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows of a chunk times a state, summed over the state's dimension of this width and stride: [T, V]."""
    total = tl.zeros((T, V), tl.float32)
    for start in range(0, width, W):
        column = start + tl.arange(0, W)
        rows = _tile(a, first, size, column, width, a_row, a_column, T)
        inside = (column < width)[:, None] & (other < other_width)[None, :]
        values = tl.load(state + column[:, None] * stride + other[None, :] * other_stride, mask=inside, other=0.0)
        total += tl.dot(rows, values, input_precision=PRECISION)
    return total


@triton.jit
def _between(decay, T: tl.constexpr):
    """Decay from after step j through step i [T, T], zero where j comes later."""
    t = tl.arange(0, T)
    return tl.exp(tl.where(t[:, None] >= t[None, :], decay[:, None] - decay[None, :], float("-inf")))


@triton.jit
def _chunk_states_kernel(
    states, totals, x, B, dt, A, firsts, sizes, heads, width, n_states, x_row, x_head, x_column, B_row, B_group,
    B_column, REVERSE: tl.constexpr, PER_GROUP: tl.constexpr, T: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What a chunk adds to the state after it; in reverse, what its outputs give the gradient of the one before it."""
    k, head, block = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    p_blocks = (width + P - 1) // P
    p = (block % p_blocks) * P + tl.arange(0, P)
    n = (block // p_blocks) * N + tl.arange(0, N)
    first, size = tl.load(firsts + k), tl.load(sizes + k)
    step, decay = _steps(dt, A, first, size, head, heads, T)
    total = _last(decay, T)
    weight = tl.exp(decay) if REVERSE else step * tl.exp(total - decay)
    rows = _tile(x + head * x_head, first, size, p, width, x_row, x_column, T)
    b = _tile(B + head // PER_GROUP * B_group, first, size, n, n_states, B_row, B_column, T)
    added = tl.dot(tl.trans(rows * weight[:, None]), b, input_precision=PRECISION)
    at = (k * heads + head) * width * n_states + p[:, None] * n_states + n[None, :]
    tl.store(states + at, added, mask=(p < width)[:, None] & (n < n_states)[None, :])
    if block == 0:
        tl.store(totals + k * heads + head, total)


@triton.jit
def _pass_states_kernel(
    states, totals, start, final, first_of, chunks_of, heads, cells, REVERSE: tl.constexpr, CELLS: tl.constexpr
):
    """From chunk to chunk of a segment: takes what each adds and leaves what enters it."""
    s, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cell = tl.program_id(2) * CELLS + tl.arange(0, CELLS)
    inside = cell < cells
    state_at = (s * heads + head) * cells + cell
    if start is not None:  # noqa: SIM108
        state = tl.load(start + state_at, mask=inside, other=0.0)
    else:
        state = tl.zeros((CELLS,), tl.float32)
    first, count = tl.load(first_of + s), tl.load(chunks_of + s)
    for i in range(0, count):
        k = first + (count - 1 - i if REVERSE else i)
        at = (k * heads + head) * cells + cell
        added = tl.load(states + at, mask=inside, other=0.0)
        tl.store(states + at, state, mask=inside)
        state = tl.exp(tl.load(totals + k * heads + head)) * state + added
    tl.store(final + state_at, state, mask=inside)


@triton.jit
def _chunk_outputs_kernel(
    y, states, x, B, C, dt, A, firsts, sizes, heads, width, n_states, x_row, x_head, x_column, B_row, B_group, B_column,
    C_row, C_group, C_column, PER_GROUP: tl.constexpr, T: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    k, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    p = tl.program_id(2) * P + tl.arange(0, P)
    first, size = tl.load(firsts + k), tl.load(sizes + k)
    step, decay = _steps(dt, A, first, size, head, heads, T)
    b, c = B + head // PER_GROUP * B_group, C + head // PER_GROUP * C_group
    scores = _pairs(c, b, first, size, n_states, C_row, C_column, B_row, B_column, T, N, PRECISION)
    rows = _tile(x + head * x_head, first, size, p, width, x_row, x_column, T)
    own = tl.dot(scores * _between(decay, T) * step[None, :], rows, input_precision=PRECISION)
    state = states + (k * heads + head) * width * n_states
    entered = _through(c, first, size, n_states, C_row, C_column, state, 1, p, width, n_states, T, N, P, PRECISION)
    t = tl.arange(0, T)
    at = ((first + t)[:, None] * heads + head) * width + p[None, :]
    tl.store(y + at, own + tl.exp(decay)[:, None] * entered, mask=(t < size)[:, None] & (p < width)[None, :])


@triton.jit
def _chunk_inputs_kernel(
    dx, ddt, dA, dy, states, ends, x, B, C, dt, A, firsts, sizes, heads, width, n_states, x_row, x_head, x_column,
    B_row, B_group, B_column, C_row, C_group, C_column, PER_GROUP: tl.constexpr, T: tl.constexpr, P: tl.constexpr,
    N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of x, dt and A; ``ends`` are those of the states that leave the chunks."""
    k, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    t = tl.arange(0, T)
    first, size = tl.load(firsts + k), tl.load(sizes + k)
    step, decay = _steps(dt, A, first, size, head, heads, T)
    total = _last(decay, T)
    b, c = B + head // PER_GROUP * B_group, C + head // PER_GROUP * C_group
    state_at = (k * heads + head) * width * n_states
    between, behind = _between(decay, T), tl.exp(total - decay)
    scores = _pairs(c, b, first, size, n_states, C_row, C_column, B_row, B_column, T, N, PRECISION) * between
    products = tl.zeros((T, T), tl.float32)
    arrived, entered, kept = tl.zeros((T,), tl.float32), tl.zeros((T,), tl.float32), 0.0
    for start in range(0, width, P):
        p = start + tl.arange(0, P)
        rows = _tile(x + head * x_head, first, size, p, width, x_row, x_column, T)
        g = _tile(dy + head * width, first, size, p, width, heads * width, 1, T)
        to_end = _through(b, first, size, n_states, B_row, B_column, ends + state_at, 1, p, width, n_states, T, N, P,
            PRECISION)  # fmt: skip
        of_start = _through(c, first, size, n_states, C_row, C_column, states + state_at, 1, p, width, n_states, T, N,
            P, PRECISION)  # fmt: skip
        products += tl.dot(g, tl.trans(rows), input_precision=PRECISION)
        arrived += tl.sum(rows * to_end, 1)
        entered += tl.sum(g * of_start, 1)
        grad = tl.dot(tl.trans(scores), g, input_precision=PRECISION) + behind[:, None] * to_end
        at = ((first + t)[:, None] * heads + head) * width + p[None, :]
        tl.store(dx + at, step[:, None] * grad, mask=(t < size)[:, None] & (p < width)[None, :])
    for start in range(0, width * n_states, 1024):
        cell = start + tl.arange(0, 1024)
        inside = cell < width * n_states
        state = tl.load(states + state_at + cell, mask=inside, other=0.0)
        kept += tl.sum(state * tl.load(ends + state_at + cell, mask=inside, other=0.0), 0)
    # A step weighs its own input, once for each output and once for the end; and it is part of the decays.
    within = scores * products
    weighing = tl.sum(within, 0) + behind * arrived
    decays = tl.sum(within * step[None, :], 1) + tl.exp(decay) * entered - step * weighing
    whole = tl.sum(step * behind * arrived, 0) + tl.exp(total) * kept
    # A decay through step i holds all steps before i.
    held = tl.cumsum(decays, 0, reverse=True) + whole
    tl.store(ddt + (first + t) * heads + head, weighing + tl.load(A + head) * held, mask=t < size)
    tl.store(dA + k * heads + head, tl.sum(step * held, 0))


@triton.jit
def _chunk_coefficients_kernel(
    dB, dC, dy, states, ends, x, B, C, dt, A, firsts, sizes, heads, width, n_states, x_row, x_head, x_column, B_row,
    B_group, B_column, C_row, C_group, C_column, row_count, groups, HEADS: tl.constexpr, PER_GROUP: tl.constexpr,
    T: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of B and C, summed over a few heads of a group."""
    k, group, part = tl.program_id(0).to(tl.int64), tl.program_id(1) % groups, tl.program_id(1) // groups
    n = tl.program_id(2) * N + tl.arange(0, N)
    t = tl.arange(0, T)
    first, size = tl.load(firsts + k), tl.load(sizes + k)
    b = _tile(B + group * B_group, first, size, n, n_states, B_row, B_column, T)
    c = _tile(C + group * C_group, first, size, n, n_states, C_row, C_column, T)
    grad_b, grad_c = tl.zeros((T, N), tl.float32), tl.zeros((T, N), tl.float32)
    for i in range(part * HEADS, tl.minimum(part * HEADS + HEADS, PER_GROUP)):
        head = group * PER_GROUP + i
        step, decay = _steps(dt, A, first, size, head, heads, T)
        g, rows = dy + head * width, x + head * x_head
        state_at = (k * heads + head) * width * n_states
        products = _pairs(g, rows, first, size, width, heads * width, 1, x_row, x_column, T, P, PRECISION)
        products = products * _between(decay, T) * step[None, :]
        of_start = _through(g, first, size, width, heads * width, 1, states + state_at, n_states, n, n_states, 1, T, P,
            N, PRECISION)  # fmt: skip
        to_end = _through(rows, first, size, width, x_row, x_column, ends + state_at, n_states, n, n_states, 1, T, P,
            N, PRECISION)  # fmt: skip
        grad_c += tl.dot(products, b, input_precision=PRECISION) + tl.exp(decay)[:, None] * of_start
        grad_b += tl.dot(tl.trans(products), c, input_precision=PRECISION)
        grad_b += (step * tl.exp(_last(decay, T) - decay))[:, None] * to_end
    at = ((part * row_count + first + t)[:, None] * groups + group) * n_states + n[None, :]
    inside = (t < size)[:, None] & (n < n_states)[None, :]
    tl.store(dB + at, grad_b, mask=inside)
    tl.store(dC + at, grad_c, mask=inside)
