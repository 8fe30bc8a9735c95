"""How OpenMP waits is settled at import, before torch, unless somebody has settled it."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("package", ["hstu_kernels", "mamba_scan"])
@pytest.mark.parametrize(
    ("first", "given", "expected"),
    [
        ("", {}, ("2000", None)),
        ("import torch", {}, (None, None)),
        ("", {"GOMP_SPINCOUNT": "7"}, ("7", None)),
        ("", {"OMP_WAIT_POLICY": "ACTIVE"}, (None, "ACTIVE")),
    ],
)
def test_a_short_spin_unless_it_is_settled(package, first, given, expected):
    own = {name: x for name, x in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    code = f"import os; {first or 'pass'}; import {package}; print(tuple(map(os.environ.get, {names})))"
    done = subprocess.run([sys.executable, "-c", code], env=own | given, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(expected)
