"""The network: families that may be missing, moments that see only their past, users without events."""

from dataclasses import replace

import pytest
import torch

from mtl_heads import TaskSpec
from ubt.config import ModelConfig
from ubt.encoder import EnhancedFeatureEncoder, Family, Sequences
from ubt.model import UniversalBehavioralTransformer

FAMILIES = {
    "event_type": Family("id", 7),
    "category": Family("id", 9),
    "price": Family("id", 102),
    "item": Family("id", 11),
    "url": Family("id", 13),
    "name": Family("vector", 16),
    "query": Family("vector", 5),
}
SIZES = ModelConfig(
    hidden_size=12,
    num_layers=2,
    num_heads=3,
    max_seq_length=9,
    id_size=4,
    embedding_size=10,
    dropout=0.0,
    id_dropout=0.0,
)


def users(lengths: list[int], seed: int = 0) -> Sequences:
    generator = torch.Generator().manual_seed(seed)
    events = sum(lengths)
    features: dict[str, torch.Tensor] = {}
    for name, family in FAMILIES.items():
        if family.kind == "id":
            features[name] = torch.randint(0, family.size, (events,), generator=generator)
        else:
            features[name] = torch.rand((events, family.size), generator=generator) * 2 - 1
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    gaps = torch.randint(0, 5000, (events,), generator=generator)
    return Sequences(features, 1_600_000_000 + gaps.cumsum(0), offsets)


def part(sequences: Sequences, rows: torch.Tensor, offsets: list[int]) -> Sequences:
    features = {name: value[rows] for name, value in sequences.features.items()}
    return Sequences(features, sequences.timestamps[rows], torch.tensor(offsets))


def network(**sizes: object) -> UniversalBehavioralTransformer:
    torch.manual_seed(1)
    tasks = [
        TaskSpec("churn", "binary", hidden=(10,)),
        TaskSpec("category_propensity", "multilabel", 3, hidden=(10,)),
        TaskSpec("product_propensity", "retrieval", 11, hidden=(10,), head_options={"num_negatives": 5}, missing=0),
        TaskSpec("price", "regression", hidden=(10,)),
        TaskSpec("name", "vector", 16, hidden=(10,)),
    ]
    values = {"category_propensity": ("category", [2, 5, 8]), "product_propensity": ("item", [3, 4])}
    model = UniversalBehavioralTransformer(FAMILIES, tasks, values, replace(SIZES, **sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Tables start near zero, where a wrong look-up would not show.
            parameter.add_(0.3 * torch.randn_like(parameter))
        model.nobody.normal_()
    return model


@pytest.mark.parametrize("missing", FAMILIES)
def test_a_family_that_the_log_lacks_is_left_out(missing: str) -> None:
    families = {name: family for name, family in FAMILIES.items() if name != missing}
    encoder = EnhancedFeatureEncoder(families, 12, 4, 0.0)
    vectors, weighted, present = encoder(users([3, 0, 2]))
    assert vectors.shape == (5, 12) and weighted.shape == (5, 6, 4) and present.shape == (5, 6)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_changes_the_event_vector(family: str) -> None:
    encoder = network().encoder
    events = users([4, 3])
    before = encoder(events)[0]
    value = events.features[family]
    changed = dict(events.features)
    changed[family] = value % (FAMILIES[family].size - 1) + 1 if FAMILIES[family].kind == "id" else value.flip(1)
    after = encoder(Sequences(changed, events.timestamps, events.offsets))[0]
    assert ((after - before).abs().amax(1) > 1e-4).all()


def test_a_missing_value_weighs_nothing_and_the_rest_weigh_the_same_in_total() -> None:
    encoder = network().encoder
    events = users([5])
    events.features["url"][2] = 0
    events.features["query"][3] = 0
    events.features["event_type"].clamp_(min=1)
    weights = encoder.weights(events)
    names = list(FAMILIES)
    assert weights[2, names.index("url")] == 0
    assert weights[3, names.index("query")] == 0
    torch.testing.assert_close(weights.sum(1), torch.full((5,), 7.0))
    assert weights.std(0).max() > 1e-3


def test_vectors_of_several_moments_are_those_of_the_history_before_each() -> None:
    model, events = network(), users([6, 0, 1, 9])
    moments = torch.tensor([int(events.timestamps[3]), int(events.timestamps[9]), int(events.timestamps[-1]) + 60])
    together = model(events, moments)
    assert together.shape == (4, 3, 10)
    owner = torch.repeat_interleave(torch.arange(4), events.offsets.diff())
    for k, moment in enumerate(moments):
        rows = (events.timestamps < moment).nonzero()[:, 0]
        lengths = torch.bincount(owner[rows], minlength=4)
        alone = model(part(events, rows, [0, *lengths.cumsum(0).tolist()]), moment[None])
        torch.testing.assert_close(together[:, k], alone[:, 0], rtol=1e-4, atol=1e-5)
    assert (together[0, 0] - together[0, 1]).abs().max() > 1e-3


def test_a_user_does_not_depend_on_the_batch() -> None:
    model, events = network(), users([4, 7, 2])
    now = events.timestamps[-1:] + 1
    alone = model(part(events, torch.arange(4, 11), [0, 7]), now)
    torch.testing.assert_close(model(events, now)[1], alone[0], rtol=1e-4, atol=1e-5)


def test_users_without_events_get_the_learned_vector() -> None:
    model = network()
    nobody = part(users([3]), torch.arange(0), [0, 0, 0])
    vectors = model(nobody, torch.tensor([1_700_000_000]))
    assert vectors.shape == (2, 1, 10)
    assert torch.isfinite(vectors).all()
    torch.testing.assert_close(vectors[0], vectors[1])
    mixed = model(users([0, 3]), torch.tensor([1_700_000_000]))
    torch.testing.assert_close(mixed[0], vectors[0])


def test_recency_enters_the_vector() -> None:
    model, events = network(), users([4])
    soon, late = (model(events, events.timestamps[-1:] + delay) for delay in (1, 10_000_000))
    assert (soon - late).abs().max() > 1e-3


def test_every_parameter_learns() -> None:
    model = network().train()
    events = users([9, 0, 5])
    heads = model.logits(model(events, events.timestamps[-1:] + 5))
    assert {task: value.shape[-1] for task, value in heads.items()} == {
        "churn": 1,
        "category_propensity": 3,
        "product_propensity": 2,
        "price": 1,
        "name": 16,
    }
    sum(value.square().sum() for value in heads.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    ("sizes", "message"),
    [({"hidden_size": 10}, "hidden_size: got 10"), ({"embedding_size": 4096}, "embedding_size: got 4096")],
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        network(**sizes)
