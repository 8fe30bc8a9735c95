"""A scan whose sequences hold several documents, as a packed scan in which every document is a segment."""

from dataclasses import replace

import torch
from torch import Tensor

from mamba_scan.problem_ssd import SSDProblem

_ROWS = ("x", "dt", "B", "C", "z")


class Documents:
    """The packed problem, and which of its segments begin and end the sequences.

    Attributes:
        problem: every document a segment; only the first one of a sequence has an initial state.
        first: [S], the first document of each sequence.
        last: [S], the last one.

    Args:
        p: a checked problem with seq_idx.
    """

    def __init__(self, p: SSDProblem) -> None:
        assert p.seq_idx is not None
        self.given = p
        index = p.seq_idx.flatten()
        length = 0 if p.offsets is not None else p.x.shape[1]
        offsets = p.offsets
        if offsets is None:
            offsets = torch.arange(p.x.shape[0] + 1, device=p.device) * length
        changes = (index[1:] != index[:-1]).nonzero().flatten() + 1
        changes = changes[~torch.isin(changes, offsets)]
        bounds, _ = torch.cat([offsets.to(torch.int64), changes]).sort()
        # A sequence begins as many documents later as there are changes before it.
        places = torch.arange(len(offsets), device=p.device) + torch.searchsorted(changes, offsets.to(torch.int64))
        self.first, self.last = places[:-1], places[1:] - 1
        states = p.initial_states
        if states is not None:
            states = states.new_zeros(len(bounds) - 1, *states.shape[1:]).index_copy_(0, self.first, states)
        rows = {name: self._flat(x) for name in _ROWS if (x := getattr(p, name)) is not None}
        self.problem = replace(p, **rows, offsets=bounds, seq_idx=None, initial_states=states)  # type: ignore[arg-type]

    def directions(self, dout: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of the outputs as those of the packed problem's.

        Args:
            dout: of the output, shaped as x; None for none.
            dfinal: of the final states [S, h, p, n]; None for none.
        """
        dout = None if dout is None else self._flat(dout)
        if dfinal is not None:
            dfinal = dfinal.new_zeros(self.problem.segments, *dfinal.shape[1:]).index_copy_(0, self.last, dfinal)
        return dout, dfinal

    def gradients(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gradients of the packed problem's arguments as those of the arguments given.

        Args:
            grads: by argument name.
        """
        whole = grads | {name: grads[name].view(getattr(self.given, name).shape) for name in _ROWS if name in grads}
        if "initial_states" in grads:
            whole["initial_states"] = grads["initial_states"][self.first]
        return {name: torch.empty_like(getattr(self.given, name)).copy_(grad) for name, grad in whole.items()}

    def _flat(self, x: Tensor) -> Tensor:
        return x if self.given.offsets is not None else x.flatten(0, 1).contiguous()
