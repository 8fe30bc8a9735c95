"""Does training keep its fair share of a busy machine? An HSTU step on all cores beside K processes that only compute.

    python benchmarks/bench_load.py            # K = 0 and 6, on an otherwise idle machine

With t threads and K busy processes on c cores, fair is c * t / (t + K) cores, and the share is the rate of steps under
load over the idle rate, divided by the same quotient of cores. OpenMP's threads wait for each other by spinning; one
that spins while its partner does not run wastes the time that the partner needs. Each row is a process of its own with
its own waiting: "as imported" is what ``import hstu_kernels`` sets (see ``hstu_kernels.waiting``).
"""

import argparse
import os
import subprocess
import sys
import time

WAITING = {
    "as imported": {},
    "libgomp's own": {"GOMP_SPINCOUNT": "300000"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
}


def main() -> None:
    """Print a table of rates and shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--busy", type=int, nargs="+", default=[0, 6], help="numbers of busy processes, the first is idle"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="of each measurement, after as much again to warm up"
    )
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(steps_per_second(arguments.seconds))
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    print(f"{cores} cores, {arguments.threads} threads, load {os.getloadavg()[0]:.1f} at the start\n")
    print("| waiting | busy | steps/s | of idle | fair | share of fair |\n|---|---|---|---|---|---|")
    for _ in range(arguments.rounds):
        for name, environment in WAITING.items():
            idle = None
            for busy in arguments.busy:
                rate = measure(environment, arguments.threads, busy, arguments.seconds)
                idle = rate if idle is None else idle
                fair = fair_cores(cores, arguments.threads, busy) / fair_cores(
                    cores, arguments.threads, arguments.busy[0]
                )
                shares = f"{rate / idle:.2f} | {fair:.2f} | {rate / idle / fair:.2f}"
                print(f"| {name} | {busy} | {rate:.2f} | {shares} |", flush=True)


def fair_cores(cores: int, threads: int, busy: int) -> float:
    """Return the cores that t threads have beside K processes, each runnable one with the same share."""
    return min(threads, cores * threads / (threads + busy))


def measure(environment: dict[str, str], threads: int, busy: int, seconds: float) -> float:
    """Return the steps per second of a training process beside ``busy`` others."""
    own = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    own |= environment | {"OMP_NUM_THREADS": str(threads)}
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        command = [sys.executable, __file__, "--child", "--seconds", str(seconds)]
        return float(subprocess.run(command, env=own, check=True, stdout=subprocess.PIPE, text=True).stdout)
    finally:
        for other in others:
            other.kill()
            other.wait()


def steps_per_second(seconds: float) -> float:
    """Train a small stack on ragged sequences, as the demo of the user model does, and count."""
    # The package first: it says how OpenMP waits, which torch's library reads when it is loaded.
    from hstu_kernels import HSTU  # isort: skip
    import torch

    torch.manual_seed(0)
    model = HSTU(2, 64, 2, 32, 32, max_seqlen=200)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    lengths = (20 * (1 - torch.rand(64)).pow(-1 / 1.2)).clamp(max=200).long()
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    x, stamps = torch.randn(int(offsets[-1]), 64), torch.arange(int(offsets[-1])) * 3600

    def run(until: float) -> int:
        count = 0
        while time.monotonic() < until:
            optimizer.zero_grad()
            model(x, offsets, timestamps=stamps).square().mean().backward()
            optimizer.step()
            count += 1
        return count

    run(time.monotonic() + min(seconds, 5.0))
    begin = time.monotonic()
    count = run(begin + seconds)
    return count / (time.monotonic() - begin)


if __name__ == "__main__":
    main()
