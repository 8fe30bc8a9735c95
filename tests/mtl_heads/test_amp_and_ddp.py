"""Mixed precision, loss scaling, and two processes on CPU."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mtl_heads import AGGREGATORS, FAMO, WEIGHTINGS, MultiTaskHeads, SharedBottom, TaskLosses, TaskSpec
from mtl_heads.metrics import AUROC, CalibrationError, MeanLosses, PropensityScore, RankingMetrics

NAMES = ("a", "b", "c")


class _Model(nn.Module):
    """Trunk and heads in one module, as DDP wants it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = SharedBottom(5, NAMES, [8])
        options = {"num_negatives": 4, "negatives": "all"}
        tasks = [
            TaskSpec("a", "binary", loss="focal"),
            TaskSpec("b", "regression"),
            TaskSpec("c", "retrieval", 6, head_options=options),
        ]
        self.heads = MultiTaskHeads(8, tasks)

    def forward(self, x, targets):
        return self.heads.losses(self.trunk(x), targets)


def _batch(n=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=g)
    targets = {"a": (x[:, 0] > 0).float(), "b": 3 * x[:, 1], "c": torch.randint(6, (n,), generator=g).float()}
    # Uneven: the first half has few labels of b and none of c.
    targets["b"][: n // 2 - 1] = float("nan")
    targets["c"][: n // 2] = float("nan")
    return x, targets


@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weightings_work_under_autocast_and_a_loss_scaler(name, dtype):
    model = _Model()
    weighting = WEIGHTINGS[name](NAMES)
    optimiser = torch.optim.Adam([*model.parameters(), *weighting.parameters()], 0.03)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16, init_scale=2.0**10)
    x, targets = _batch()
    history = []
    for _ in range(30):
        optimiser.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            losses = model(x, targets)
        assert losses.values.dtype == torch.float32
        shared = model.trunk.shared_parameters()[-2:]
        scaler.scale(weighting(losses, shared=shared, scaler=scaler)).backward()
        scaler.step(optimiser)
        scaler.update()
        if isinstance(weighting, FAMO):
            with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
                weighting.update(model(x, targets))
        history.append(losses.values.detach())
    assert torch.stack(history).isfinite().all() and (history[-1] < history[0]).all()


@pytest.mark.parametrize("name", AGGREGATORS)
def test_aggregators_work_under_autocast_and_a_loss_scaler(name):
    model = _Model()
    aggregator = AGGREGATORS[name](NAMES)
    optimiser = torch.optim.Adam(model.parameters(), 0.03)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    x, targets = _batch()
    history = []
    for _ in range(30):
        optimiser.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            losses = model(x, targets)
        own = model.heads.task_parameters()
        aggregator.backward(losses, shared=model.trunk.parameters(), task_parameters=own, scaler=scaler)
        scaler.step(optimiser)
        scaler.update()
        history.append(losses.values.detach())
    assert torch.stack(history).isfinite().all() and history[-1].sum() < history[0].sum()


def test_the_scale_does_not_change_an_aggregators_step():
    grads = []
    for scale in (1.0, 2.0**12):
        model = _Model()
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        optimiser = torch.optim.SGD(model.parameters(), 0.1)
        x, targets = _batch()
        AGGREGATORS["cagrad"](NAMES).backward(model(x, targets), shared=model.trunk.parameters(), scaler=scaler)
        scaler.unscale_(optimiser)
        grads.append([p.grad.clone() for p in model.trunk.parameters()])
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two)


def test_an_overflow_is_skipped_and_poisons_no_statistic():
    for name in WEIGHTINGS:
        model, weighting = _Model(), WEIGHTINGS[name](NAMES)
        optimiser = torch.optim.SGD(model.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for spoil in (False, True, False):
            x, targets = _batch()
            if spoil:
                x[0] = float("inf")
            optimiser.zero_grad()
            losses = model(x, targets)
            shared = model.trunk.shared_parameters()[-2:]
            scaler.scale(weighting(losses, shared=shared, scaler=scaler)).backward()
            scaler.step(optimiser)
            scaler.update()
            if isinstance(weighting, FAMO):
                with torch.no_grad():
                    weighting.update(model(x, targets))
        weighting.end_epoch()
        assert all(p.isfinite().all() for p in model.parameters()), name
        persistent = {
            key: v for key, v in weighting.state_dict().items() if isinstance(v, torch.Tensor) and key != "before"
        }
        assert all(v.isfinite().all() for v in persistent.values()), (name, persistent)


def _port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _two_processes(rank, port, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    x, targets = _batch()
    half = slice(rank * 8, rank * 8 + 8)
    x, targets = x[half], {name: t[half] for name, t in targets.items()}
    result = {}
    for name in WEIGHTINGS:
        model, weighting = DistributedDataParallel(_Model()), WEIGHTINGS[name](NAMES)
        optimiser = torch.optim.SGD([*model.parameters(), *weighting.parameters()], 0.05)
        for _ in range(4):
            optimiser.zero_grad()
            losses = model(x, targets)
            weighting(losses, shared=model.module.trunk.shared_parameters()[-2:]).backward()
            if list(weighting.parameters()):
                dist.all_reduce(weighting.log_variance.grad)
                weighting.log_variance.grad /= 2
            optimiser.step()
            if isinstance(weighting, FAMO):
                weighting.update(model(x, targets))
        weighting.end_epoch()
        result[name] = [model.module.state_dict(), weighting.state_dict(), losses.counts]
    for name in AGGREGATORS:
        model, aggregator = DistributedDataParallel(_Model()), AGGREGATORS[name](NAMES)
        optimiser = torch.optim.SGD(model.parameters(), 0.05)
        for _ in range(3):
            optimiser.zero_grad()
            losses = model(x, targets)
            trunk, heads = model.module.trunk, model.module.heads
            aggregator.backward(losses, shared=trunk.parameters(), task_parameters=heads.task_parameters())
            optimiser.step()
        result[name] = [model.module.state_dict(), aggregator.state_dict(), losses.counts]
    result["metrics"] = _metrics(slice(rank * 10, rank * 10 + 10))
    torch.save(result, f"{folder}/{rank}.pt")
    dist.barrier()
    # Leaves at once: gloo's threads now and then outlive an orderly shutdown on a busy machine and abort the process.
    os._exit(0)


def _metrics(rows):
    g = torch.Generator().manual_seed(0)
    scores, labels = torch.randn(20, 6, generator=g), torch.rand(20, 6, generator=g) < 0.3
    metrics = RankingMetrics((2,)), CalibrationError(), PropensityScore(torch.ones(6), k=2)
    metrics[0].update(scores[rows], labels[rows])
    metrics[1].update(scores[rows].sigmoid(), labels[rows])
    metrics[2].update(scores[rows], labels[rows])
    areas, means = AUROC(6), MeanLosses("ab")
    areas.update(scores[rows], labels[rows], mask=torch.arange(20)[rows] % 3 > 0)
    for row in range(20)[rows]:
        means.update(TaskLosses(("a", "b"), scores[row, :2], torch.tensor([float(row % 3), 2.0])))
    return [*(metric.compute() for metric in metrics), areas.compute()["macro"], means.compute()]


def _one_process():
    x, targets = _batch()
    result = {}
    for name in WEIGHTINGS:
        model, weighting = _Model(), WEIGHTINGS[name](NAMES)
        optimiser = torch.optim.SGD([*model.parameters(), *weighting.parameters()], 0.05)
        for _ in range(4):
            optimiser.zero_grad()
            losses = model(x, targets)
            weighting(losses, shared=model.trunk.shared_parameters()[-2:]).backward()
            optimiser.step()
            if isinstance(weighting, FAMO):
                weighting.update(model(x, targets))
        weighting.end_epoch()
        result[name] = [model.state_dict(), weighting.state_dict(), losses.counts]
    for name in AGGREGATORS:
        model, aggregator = _Model(), AGGREGATORS[name](NAMES)
        optimiser = torch.optim.SGD(model.parameters(), 0.05)
        for _ in range(3):
            optimiser.zero_grad()
            losses = model(x, targets)
            own = model.heads.task_parameters()
            aggregator.backward(losses, shared=model.trunk.parameters(), task_parameters=own)
            optimiser.step()
        result[name] = [model.state_dict(), aggregator.state_dict(), losses.counts]
    result["metrics"] = _metrics(slice(0, 20))
    return result


def test_two_processes_train_like_one_on_the_union_of_their_batches(tmp_path):
    """One process has no label of one task and few of another: gradients and statistics are still those of all."""
    mp.spawn(_two_processes, (_port(), str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    whole = _one_process()
    for name in (*WEIGHTINGS, *AGGREGATORS):
        model, state, counts = whole[name]
        for rank in ranks:
            for key, value in model.items():
                torch.testing.assert_close(rank[name][0][key], value, rtol=1e-4, atol=1e-5, msg=f"{name} {key}")
            for key, value in state.items():
                if isinstance(value, torch.Tensor):
                    got = rank[name][1][key].double()
                    torch.testing.assert_close(
                        got, value.double(), rtol=1e-4, atol=1e-5, msg=f"{name} {key}", equal_nan=True
                    )
            assert torch.equal(rank[name][2], counts)
        for key, value in ranks[0][name][0].items():
            assert torch.equal(value, ranks[1][name][0][key]), f"{name}: processes drift apart in {key}"
    for rank in ranks:
        for got, expected in zip(rank["metrics"], whole["metrics"], strict=True):
            assert got == pytest.approx(expected)
