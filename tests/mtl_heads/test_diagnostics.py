import pytest
import torch

from mtl_heads import CAGrad, GradientMonitor, MultiTaskHeads, SharedBottom, StaticWeighting, TaskLosses, TaskSpec


def test_cosines_and_norms_by_hand():
    w = torch.zeros(2, requires_grad=True)
    losses = TaskLosses(
        ("a", "b", "c"), torch.stack([3 * w[0], 4 * w[1] - 3 * w[0], w.sum() * 0]), torch.tensor([1.0, 1, 0])
    )
    monitor = GradientMonitor(("a", "b", "c"))
    got = monitor.measure(10, losses, [w], {"a": 1.0, "b": 0.5})
    assert got == pytest.approx(
        {"gradient_cosine/a.b": -0.6, "gradient_conflict": 1.0, "gradient_norm/a": 3.0, "gradient_norm/b": 5.0,
         "weight/a": 1.0, "weight/b": 0.5}
    )  # fmt: skip
    history = monitor.history()
    assert history["cosines"].shape == (1, 3, 3) and history["cosines"][0, 2].isnan().all()
    assert w.grad is None


def test_measuring_leaves_the_graph_for_backward_and_an_aggregator_can_be_recorded(tmp_path):
    torch.manual_seed(0)
    trunk = SharedBottom(4, ("a", "b"), [5])
    heads = MultiTaskHeads(5, [TaskSpec("a", "binary"), TaskSpec("b", "regression")])
    x = torch.randn(8, 4)
    targets = {"a": (x[:, 0] > 0).float(), "b": x[:, 1]}
    monitor, weighting, aggregator = GradientMonitor(("a", "b")), StaticWeighting(("a", "b")), CAGrad(("a", "b"))
    for step in range(3):
        losses = heads.losses(trunk(x), targets)
        total = weighting(losses)
        monitor.measure(step, losses, trunk.shared_parameters(), weighting.effective_weights())
        total.backward()
    aggregator.backward(heads.losses(trunk(x), targets), shared=trunk.shared_parameters())
    recorded = monitor.record_aggregator(3, aggregator)
    assert recorded["gradient_cosine/a.b"] == pytest.approx(float(monitor.history()["cosines"][2, 0, 1]), abs=1e-5)
    assert monitor.history()["steps"].tolist() == [0, 1, 2, 3]

    torch.save(monitor.state_dict(), tmp_path / "monitor.pt")
    again = GradientMonitor(("a", "b"))
    again.load_state_dict(torch.load(tmp_path / "monitor.pt", weights_only=True))
    assert again.metrics() == monitor.metrics()

    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    written = again.plot(tmp_path / "gradients.png")
    assert written.read_bytes()[:4] == b"\x89PNG" and len(list(tmp_path.iterdir())) == 2


def test_errors():
    with pytest.raises(ValueError, match="nothing to plot"):
        GradientMonitor(("a",)).plot("x.png")
    with pytest.raises(ValueError, match=r"gramian must be \[2, 2\], got \(3, 3\)"):
        GradientMonitor(("a", "b")).record(0, torch.eye(3))
