"""What is no tensor, no switch or no limit is a ValueError that names the argument, what it got and what it needs."""

import math

import numpy as np
import pytest
import torch

from mamba_scan import (
    Mamba,
    Mamba2,
    causal_conv1d,
    causal_conv1d_update,
    causal_conv1d_varlen_states,
    mamba_inner_fn,
    selective_scan,
    selective_state_update,
    ssd_scan,
)

HALF = torch.zeros(2, 3, 4, dtype=torch.int64)
SCAN = {"u": torch.randn(2, 3, 4), "delta": torch.rand(2, 3, 4), "A": -torch.rand(3, 2)} | {
    k: torch.randn(2, 2, 4) for k in "BC"
}
CONV = {"x": torch.randn(2, 3, 4), "weight": torch.randn(3, 2)}
SSD = {"x": torch.randn(2, 4, 2, 3), "dt": torch.rand(2, 4, 2), "A": -torch.rand(2)} | {
    k: torch.randn(2, 4, 1, 2) for k in "BC"
}
STEP = {"state": torch.zeros(2, 3, 2), "x": torch.randn(2, 3), "dt": torch.rand(2, 3), "A": -torch.rand(3, 2)} | {
    k: torch.randn(2, 2) for k in "BC"
}
UPDATE = {"x": torch.randn(2, 3), "conv_state": torch.zeros(2, 3, 2), "weight": torch.randn(3, 3)}
STATES = {"x": torch.randn(5, 3), "cu_seqlens": torch.tensor([0, 2, 5]), "state_len": 3}
INNER = {
    "xz": torch.randn(2, 6, 5), "conv1d_weight": torch.randn(3, 1, 4), "conv1d_bias": None,
    "x_proj_weight": torch.randn(5, 3), "delta_proj_weight": torch.randn(3, 1), "out_proj_weight": torch.randn(4, 3),
    "out_proj_bias": None, "A": -torch.rand(3, 2),
}  # fmt: skip

CASES = [
    (selective_scan, SCAN, "u", SCAN["u"].numpy()),
    (selective_scan, SCAN, "u", [[1.0]]),
    (selective_scan, SCAN, "A", None),
    (selective_scan, SCAN, "D", 1.0),
    (selective_scan, SCAN, "delta_softplus", torch.ones(3)),
    (selective_scan, SCAN, "return_last_state", "yes"),
    (selective_scan, SCAN, "offsets", [0, 4]),
    (selective_scan, SCAN, "initial_state", 0),
    (selective_scan, SCAN, "backend", 3),
    (causal_conv1d, CONV, "x", CONV["x"].numpy()),
    (causal_conv1d, CONV, "bias", 0.0),
    (causal_conv1d, CONV, "bias", torch.ones(3, dtype=torch.int64)),
    (causal_conv1d, CONV, "weight", torch.ones(3, 2, dtype=torch.int64)),
    (causal_conv1d, CONV, "seq_idx", [0, 0]),
    (causal_conv1d, CONV, "initial_states", torch.zeros(2, 3, 1, dtype=torch.int64)),
    (causal_conv1d, CONV, "final_states_out", [1]),
    (causal_conv1d, CONV, "activation", True),
    (causal_conv1d, CONV, "return_final_states", torch.ones(2, 3, 1)),
    (causal_conv1d, CONV, "offsets", (0, 4)),
    (ssd_scan, SSD, "x", SSD["x"].int()),
    (ssd_scan, SSD, "dt", SSD["dt"].int()),
    (ssd_scan, SSD, "A", -1.0),
    (ssd_scan, SSD, "A", torch.ones(2, dtype=torch.int64)),
    (ssd_scan, SSD, "D", 1.0),
    (ssd_scan, SSD, "D", torch.ones(2, dtype=torch.int64)),
    (ssd_scan, SSD, "dt_bias", torch.ones(2, dtype=torch.int64)),
    (ssd_scan, SSD, "initial_states", torch.zeros(2, 2, 3, 2, dtype=torch.int64)),
    (ssd_scan, SSD, "chunk_size", 2.5),
    (ssd_scan, SSD, "chunk_size", 0),
    (ssd_scan, SSD, "dt_limit", (1.0, 0.5)),
    (ssd_scan, SSD, "dt_limit", (math.nan, 1.0)),
    (ssd_scan, SSD, "dt_limit", (0.0, math.nan)),
    (ssd_scan, SSD, "dt_limit", 1.0),
    (ssd_scan, SSD, "dt_limit", (0.0, 1.0, 2.0)),
    (ssd_scan, SSD, "dt_softplus", 1.0),
    (ssd_scan, SSD, "seq_idx", torch.zeros(2, 4)),
    (ssd_scan, SSD, "seq_idx", torch.zeros(2, 3, dtype=torch.int64)),
    (ssd_scan, SSD, "seq_idx", [0, 1]),
    (selective_state_update, STEP, "state", np.zeros((2, 3, 2))),
    (selective_state_update, STEP, "state", torch.zeros(2, 3, 2, dtype=torch.int64)),
    (selective_state_update, STEP, "x", torch.ones(2, 3, dtype=torch.int64)),
    (selective_state_update, STEP, "B", torch.ones(2, 2, dtype=torch.int64)),
    (selective_state_update, STEP, "dt", torch.rand(2, 2)),
    (selective_state_update, STEP, "D", torch.rand(2)),
    (selective_state_update, STEP, "z", 1.0),
    (selective_state_update, STEP, "state_batch_indices", [0, 1]),
    (causal_conv1d_update, UPDATE, "x", [1.0]),
    (causal_conv1d_update, UPDATE, "conv_state", torch.zeros(2, 3, 2, dtype=torch.int64)),
    (causal_conv1d_update, UPDATE, "weight", None),
    (causal_conv1d_update, UPDATE, "cache_seqlens", torch.ones(2)),
    (causal_conv1d_update, UPDATE, "conv_state_indices", [0, 1]),
    (causal_conv1d_varlen_states, STATES, "x", torch.randn(5)),
    (causal_conv1d_varlen_states, STATES, "cu_seqlens", [0, 2, 5]),
    (causal_conv1d_varlen_states, STATES, "cu_seqlens", torch.tensor([0, 2, 4])),
    (causal_conv1d_varlen_states, STATES, "state_len", 0),
    (causal_conv1d_varlen_states, STATES, "state_len", 2.0),
    (mamba_inner_fn, INNER, "xz", torch.randn(2, 5, 5)),
    (mamba_inner_fn, INNER, "conv1d_weight", torch.randn(3, 4)),
    (mamba_inner_fn, INNER, "x_proj_weight", torch.randn(4, 3)),
    (mamba_inner_fn, INNER, "delta_proj_weight", torch.randn(1, 3)),
    (mamba_inner_fn, INNER, "out_proj_weight", torch.randn(4, 2)),
    (mamba_inner_fn, INNER, "out_proj_bias", torch.randn(3)),
    (mamba_inner_fn, INNER, "B_proj_bias", torch.randn(3)),
    (mamba_inner_fn, INNER, "b_rms_weight", torch.randn(3)),
    (mamba_inner_fn, INNER, "checkpoint_lvl", 2),
    (mamba_inner_fn, INNER, "D", 1.0),
]


@pytest.mark.parametrize(("op", "arguments", "name", "value"), CASES, ids=lambda x: getattr(x, "__name__", None))
def test_a_wrong_type_is_named(op, arguments, name, value):
    op(**arguments)
    with pytest.raises(ValueError, match=rf"^{name}: got .*, needs "):
        op(**arguments | {name: value})


@pytest.mark.parametrize("make", [lambda: Mamba(8, 4), lambda: Mamba2(8, d_state=4, headdim=4)])
def test_a_wrong_type_for_a_block_is_named(make):
    block, x = make(), torch.randn(2, 3, 8)
    for name, arguments in {
        "x": (x.numpy(),),
        "x ": (x.double(),),
        "x  ": (x.int(),),
        "offsets": (x.flatten(0, 1), [0, 6]),
        "state": (x, None, torch.zeros(2)),
        "state.conv": (x, None, ([0], [0])),
    }.items():
        with pytest.raises(ValueError, match=rf"^{name.strip()}: got .*, needs "):
            block(*arguments)
    for name, arguments in {
        "x": (x[:, 0].double(),),
        "state": (x[:, 0], 3),
        "state.ssm": (x[:, 0], block.init_state(2)._replace(ssm=torch.zeros(1))),
    }.items():
        with pytest.raises(ValueError, match=rf"^{name}: got .*, needs "):
            block.step(*arguments)
