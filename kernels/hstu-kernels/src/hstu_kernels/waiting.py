"""How OpenMP's threads wait for each other: a short spin, then sleep. Imported before torch, which brings OpenMP.

The same text in every kernel package (``python kernels/native.py --sync``). libgomp spins 300,000 rounds by default,
many milliseconds: beside other processes the thread that is waited for does not run meanwhile, and a training on two
cores fell to a quarter of the rate that it has when waiting threads go to sleep. 2,000 rounds are some tens of
microseconds, longer than the gaps between the parallel parts of one step. The variables are read once, when the library
is loaded: what somebody set stays, and after torch it is too late, so that an app sets it first.
"""

import os
import sys

SPIN = "2000"


def spin_shortly() -> bool:
    """Set ``GOMP_SPINCOUNT`` unless waiting is settled already; return whether it was set.

    It is settled where ``GOMP_SPINCOUNT`` or ``OMP_WAIT_POLICY`` are set, and when torch has been imported.
    """
    settled = "torch" in sys.modules or any(name in os.environ for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"))
    if not settled:
        os.environ["GOMP_SPINCOUNT"] = SPIN
    return not settled


spin_shortly()
