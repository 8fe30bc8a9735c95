"""Every setting of the app."""

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Literal

from synthlogs.settings import PurchasesConfig

EVENTS = ("view", "cart", "purchase")


@dataclass
class Log:
    """The log: its files and columns, or a query.

    Args:
        folder: where the files lie
        files: Parquet or CSV files in the folder, a glob
        user: column of the user
        item: column of the item
        time: column of the time: a timestamp (UTC), text of one, or a whole number
        time_unit: unit of times that are whole numbers
        event: column of the event's type
        brand: column of the item's brand; empty = none
        category: column of the item's category; empty = none
        views: event types that are views
        carts: event types that put an item into the cart
        purchases: event types that are purchases
        ignored: event types that are left out; any other type is an error
        whole_ids: users and items are whole numbers; text otherwise
        catalogue: Parquet or CSV file in the folder with the items on sale, those nobody has looked at yet among them,
            under the same names of columns; empty = the items that the log has before the cutoff
        query: a DuckDB query in place of files, where {folder} is the folder; its columns are those named above
    """

    folder: str = "data/purchases"
    files: str = "log/*.parquet"
    user: str = "user_id"
    item: str = "product_id"
    time: str = "event_time"
    time_unit: Literal["s", "ms", "us"] = "s"
    event: str = "event_type"
    brand: str = "brand"
    category: str = "category_id"
    views: list[str] = field(default_factory=lambda: ["view"])
    carts: list[str] = field(default_factory=lambda: ["cart"])
    purchases: list[str] = field(default_factory=lambda: ["purchase"])
    ignored: list[str] = field(default_factory=list)
    whole_ids: bool = True
    catalogue: str = "items.parquet"
    query: str = ""


@dataclass
class Split:
    """The moments between past and future.

    Args:
        cutoff: what happens from here on is judged and never learnt from, UTC
        horizon_hours: how long after the cutoff is judged; the same time before it is for validation and the re-ranker
        target: event that is judged
    """

    cutoff: str = "2020-02-23"
    horizon_hours: float = 168.0
    target: Literal["view", "cart", "purchase"] = "purchase"

    @property
    def test_start(self) -> int:
        """Microseconds since 1970."""
        return int((datetime.fromisoformat(self.cutoff) - datetime(1970, 1, 1)) / timedelta(microseconds=1))

    @property
    def horizon(self) -> int:
        """Microseconds."""
        return round(self.horizon_hours * 3_600_000_000)

    @property
    def valid_start(self) -> int:
        """Microseconds since 1970; the network learns from what is before."""
        return self.test_start - self.horizon


@dataclass
class Model:
    """The network.

    Args:
        encoder: causal transformer on padded sequences, or HSTU on jagged ones
        width: of the vectors
        layers: of the encoder
        heads: of the attention
        dropout: of the encoder's layers
        id_dropout: how often an item of a history is its brand and category alone, so that those learn to stand for it
        max_len: last events of a user that are read
    """

    encoder: Literal["transformer", "hstu"] = "transformer"
    width: int = 64
    layers: int = 2
    heads: int = 2
    dropout: float = 0.1
    id_dropout: float = 0.1
    max_len: int = 100


@dataclass
class Train:
    """What is minimised, and how.

    Args:
        loss: softmax among sampled negatives, or a focal loss of yes and no on the same
        log_q: correct scores by how often an item is drawn as a negative
        negatives: items drawn for each batch
        sampling_power: items are drawn in proportion to (events before the validation window) to this power
        focal_gamma: focusing exponent of the focal loss
        focal_alpha: weight of its positives; 1 - alpha is that of negatives
        view_weight: factor of the term of views; 0 leaves it out
        cart_weight: factor of the term of carts; 0 leaves it out
        purchase_weight: factor of the term of purchases, and of nothing else; 0 leaves it out
        learning_rate: of the encoder and the heads
        embedding_factor: learning rate of the embeddings as a multiple of it
        weight_decay: of matrices; embeddings, norms and biases have none
        warmup_steps: steps in which the learning rate grows to its height
        ema: the weights that are judged and kept are a moving average with this factor; 0 = the last ones
        clip: largest norm of a gradient
        batch_events: events of a batch, at most
        max_epochs: passes over the users, at most
        patience: epochs without a better validation before training stops
        valid_users: users of the validation, at most
        accelerator: cpu, gpu or auto
    """

    loss: Literal["softmax", "focal"] = "softmax"
    log_q: bool = True
    negatives: int = 512
    sampling_power: float = 0.75
    focal_gamma: float = 2.0
    focal_alpha: float = 0.75
    view_weight: float = 1.0
    cart_weight: float = 10.0
    purchase_weight: float = 100.0
    learning_rate: float = 1e-3
    embedding_factor: float = 1.0
    weight_decay: float = 0.01
    warmup_steps: int = 100
    ema: float = 0.999
    clip: float = 1.0
    batch_events: int = 8192
    max_epochs: int = 10
    patience: int = 3
    valid_users: int = 5000
    accelerator: Literal["cpu", "gpu", "auto"] = "cpu"

    @property
    def weights(self) -> dict[str, float]:
        """Factor of each event's term, without those that are left out."""
        found = zip(EVENTS, (self.view_weight, self.cart_weight, self.purchase_weight), strict=True)
        return {event: weight for event, weight in found if weight > 0}


@dataclass
class Rules:
    """Which items are no candidates for a user.

    Args:
        exclude: items with which the user had such an event before the cutoff
    """

    exclude: list[Literal["view", "cart", "purchase"]] = field(default_factory=list)


@dataclass
class Evaluate:
    """What the network is compared with.

    Args:
        rankers: baselines: popularity, repeat, knn, ials, lmf, ease
        event_weights: what a view, a cart and a purchase count in the baselines
        factors: width of ials and lmf
        half_life_days: of popularity and repeat
        rerank: fit a re-ranker on the validation window, with the network among its sources and without it
        candidates: candidates of each source for the re-ranker
        rounds: trees of the re-ranker
        judged: users that are judged, at most, drawn by the seed; 0 = all
    """

    rankers: list[Literal["popularity", "repeat", "knn", "ials", "lmf", "ease"]] = field(
        default_factory=lambda: ["popularity", "repeat", "knn", "ials", "lmf"]
    )
    event_weights: list[float] = field(default_factory=lambda: [1.0, 5.0, 10.0])
    factors: int = 32
    half_life_days: float = 7.0
    rerank: bool = True
    candidates: int = 50
    rounds: int = 100
    judged: int = 0


@dataclass
class Predict:
    """The lists that are written.

    Args:
        users: CSV or Parquet file with the users that want a list, in the log's column of users; empty = all users of
            the log before the cutoff. Who is unknown gets the most popular items
        items: items of a list
        part_users: users of a part; a run that is resumed keeps finished parts
    """

    users: str = ""
    items: int = 10
    part_users: int = 20_000


@dataclass
class Tune:
    """Settings that are tried, each with each.

    Args:
        learning_rates: of the network
        purchase_weights: factor of the term of purchases
        losses: softmax, focal
    """

    learning_rates: list[float] = field(default_factory=lambda: [1e-3, 3e-3])
    purchase_weights: list[float] = field(default_factory=lambda: [1.0, 10.0, 100.0])
    losses: list[Literal["softmax", "focal"]] = field(default_factory=lambda: ["softmax"])


@dataclass
class Config:
    """All settings of a run.

    Args:
        run_dir: folder of everything that is written
        generate: a generated log
        log: the log
        split: past and future
        model: the network
        train: training
        rules: exclusion
        evaluate: the comparison
        predict: the lists
        tune: the search
        seed: of everything drawn
        resume: keep what is finished and go on
        progress: show bars
    """

    run_dir: str = "runs/purchase"
    generate: PurchasesConfig = field(default_factory=PurchasesConfig)
    log: Log = field(default_factory=Log)
    split: Split = field(default_factory=Split)
    model: Model = field(default_factory=Model)
    train: Train = field(default_factory=Train)
    rules: Rules = field(default_factory=Rules)
    evaluate: Evaluate = field(default_factory=Evaluate)
    predict: Predict = field(default_factory=Predict)
    tune: Tune = field(default_factory=Tune)
    seed: int = 0
    resume: bool = False
    progress: bool = True

    def check(self) -> None:
        """Raise ValueError for a setting without sense."""
        _check_cutoff(self.split.cutoff)
        _at_least(self, 1, "model.width", "model.layers", "model.heads", "model.max_len", "train.negatives")
        _at_least(self, 1, "train.batch_events", "train.max_epochs", "train.patience", "train.valid_users")
        _at_least(self, 1, "evaluate.candidates", "evaluate.rounds", "predict.items", "predict.part_users")
        _at_least(self, 0, "train.view_weight", "train.cart_weight", "train.purchase_weight", "train.warmup_steps")
        _at_least(self, 0, "train.weight_decay", "train.focal_gamma", "evaluate.judged", "seed")
        _above(self, "split.horizon_hours", "train.learning_rate", "train.embedding_factor", "train.clip")
        for name in ("model.dropout", "model.id_dropout", "train.ema"):
            if not 0 <= _value(self, name) < 1:
                raise ValueError(f"{name}: got {_value(self, name)}, needs a number in [0, 1)")
        if self.model.width % self.model.heads:
            raise ValueError(f"model.width: got {self.model.width}, needs a multiple of heads, {self.model.heads}")
        if self.train.batch_events < self.model.max_len:
            raise ValueError(f"train.batch_events: got {self.train.batch_events}, needs max_len or more")
        if self.split.target not in self.train.weights:
            raise ValueError(f"train.{self.split.target}_weight: got 0, needs a weight above 0: it is the target")
        if len(self.evaluate.event_weights) != 3 or not min(self.evaluate.event_weights) >= 0:
            raise ValueError(f"evaluate.event_weights: got {self.evaluate.event_weights}, needs three numbers >= 0")


def _check_cutoff(text: str) -> None:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is not None:
        raise ValueError(f"split.cutoff: got {text!r}, needs a moment in UTC as 2020-02-23 or 2020-02-23 05:00:00")


def _value(config: Config, name: str) -> float:
    group, _, key = name.rpartition(".")
    return getattr(getattr(config, group) if group else config, key)


def _at_least(config: Config, least: float, *names: str) -> None:
    for name in names:
        # Written so that NaN is refused.
        if not _value(config, name) >= least:
            raise ValueError(f"{name}: got {_value(config, name)}, needs {least} or more")


def _above(config: Config, *names: str) -> None:
    for name in names:
        if not _value(config, name) > 0:
            raise ValueError(f"{name}: got {_value(config, name)}, needs a number above 0")
