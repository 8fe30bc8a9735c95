"""Every setting of the app, in dataclasses that the command line, the YAML files and Python callers share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from synthlogs.settings import ShopConfig

TASKS = ("churn", "category_propensity", "product_propensity", "price", "name")
WEIGHTINGS = ("static", "uncertainty", "dwa", "gradnorm")
BLOCKS = ("hstu", "aggregates", "cf")


@dataclass
class GenerateConfig(ShopConfig):
    """Size and seed of a generated log, and whether `ubt run` writes one.

    Args:
        if_missing: `ubt run` writes the log itself where data_dir holds none, or one with other settings
    """

    if_missing: bool = False

    def check(self) -> None:
        """Raise ValueError for a log without clients, history or targets."""
        try:
            super().check()
        except ValueError as error:
            raise ValueError(f"generate.{error}") from None


@dataclass
class LogConfig:
    """How a log that is not in the challenge layout is laid out; leave `files` empty for the challenge layout.

    Args:
        files: file name, glob or list of them below the data directory (Parquet or CSV), one table with all events
        user: column of the user
        time: column of the time (UTC)
        event: column of the event type
        item: column of the item, or null
        category: column of the item's category, or null
        price: column of the price, or null; becomes 100 quantile buckets fitted before train_start
        url: column of the URL, or null
        name: column of the item's name vector, text like "[109 77 31]" or a list of numbers 0..255, or null
        query: column of the search query's vector, likewise, or null
        label_events: event types that count as the outcome in the label windows; empty = all
        active_events: a user with one of these before train_start takes part in the churn task; empty = all
        target_categories: number of categories of the propensity task, the most frequent before train_start
        target_skus: number of skus of the propensity task, likewise
        train_start: end of the history and start of the train window, UTC
        valid_start: end of the train window and start of the scored window, UTC
        end: end of the scored window, UTC; null = the last event
    """

    files: str | list[str] = field(default_factory=list)
    user: str = "user_id"
    time: str = "event_time"
    event: str = "event_type"
    item: str | None = None
    category: str | None = None
    price: str | None = None
    url: str | None = None
    name: str | None = None
    query: str | None = None
    label_events: list[str] = field(default_factory=list)
    active_events: list[str] = field(default_factory=list)
    target_categories: int = 100
    target_skus: int = 100
    train_start: str | None = None
    valid_start: str | None = None
    end: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.files, str):
            self.files = [self.files]


@dataclass
class PrepareConfig:
    """How events become the store.

    Args:
        memory_limit: bound for the building engine's buffers
    """

    memory_limit: str = "1GB"


@dataclass
class ModelConfig:
    """Size of the network.

    Args:
        hidden_size: width of the event vectors and of the HSTU layers
        num_layers: number of HSTU layers
        num_heads: attention heads; each has hidden_size / num_heads dims
        max_seq_length: newest events of a user that are read
        id_size: width of each feature family's embedding
        max_ids: most frequent skus and URLs that have a vector of their own; rarer ones share one
        embedding_size: width of the user vector that is written, at most 2048
        half_lives_days: for each of them, the mean of every family over the events that have it, weighed by age, is
            part of what the user vector is made of
        time_buckets: buckets of the relative time bias, 1 or more
        dropout: dropout in feature encoder, layers and heads
        id_dropout: share of the skus and URLs that training replaces by "unknown"
    """

    hidden_size: int = 256
    num_layers: int = 3
    num_heads: int = 4
    max_seq_length: int = 300
    id_size: int = 64
    max_ids: int = 100_000
    embedding_size: int = 512
    half_lives_days: list[float] = field(default_factory=lambda: [2.0, 14.0, 60.0])
    time_buckets: int = 128
    dropout: float = 0.1
    id_dropout: float = 0.1

    def check(self) -> None:
        """Raise ValueError for a size without sense."""
        sizes = ("hidden_size", "num_layers", "num_heads", "max_seq_length", "id_size", "max_ids", "embedding_size")
        _at_least("model", self, **dict.fromkeys((*sizes, "time_buckets"), 1))
        for name in ("dropout", "id_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"model.{name}: got {getattr(self, name)}, needs a share from 0 to below 1")


@dataclass
class TrainConfig:
    """How the network is trained.

    Args:
        task_weights: weight of each task's loss, as "task:weight,task:weight"; a task that is not named is not trained,
            the first one is the main task
        weighting: what the weights are multiplied by: "static" by 1; "uncertainty", "dwa" and "gradnorm" by a weight
            that is learned while training
        loss: loss of churn and category_propensity, "focal" or "bce"
        focal_alpha: weight of the rarer class of a label in the focal loss, the other one weighs 1 - focal_alpha
        focal_gamma: how much less easy labels count in the focal loss
        balance: in [0, 1): how far rare categories outweigh frequent ones; 0 = not at all, towards 1 = by 1 / frequency
        num_negatives: skus drawn anew for every batch that product_propensity tells the bought ones from
        novelty_weight: weight of the popularity of the predicted categories and skus
        num_epochs: epochs at most
        batch_size: users per batch, of all processes together
        learning_rate: initial learning rate of Adam
        weight_decay: decoupled weight decay of the dense weights
        gradient_clip: largest norm of the gradient
        cutoffs: moments from which a user's outcomes are learned: train_start, and cutoffs - 1 moments before it, one
            window apart
        span: windows that the outcomes seen from an earlier moment cover. What is scored lies one window later than
            what the probe is fitted on, so 2 keeps what lasts in the user vector
        hold_out_newest: learn from the earlier moments only. A network that has fitted the vectors as of train_start
            themselves to their labels promises more on those labels than it keeps on later ones, and whatever is
            fitted on vectors and labels believes it
        valid_share: share of the users whose labels of the train window are kept for early stopping
        patience: epochs without a better validation loss before training stops
        lr_patience: epochs without a better validation loss before the learning rate is halved
        threads: CPU threads; 0 = torch's own choice
        processes: processes that train together, on this machine (gloo on CPUs, nccl on GPUs)
        precision: "32" or "bf16", in which matrices are multiplied
    """

    task_weights: str = "churn:1.0,category_propensity:0.5"
    weighting: str = "static"
    loss: str = "focal"
    focal_alpha: float = 0.75
    focal_gamma: float = 2.0
    balance: float = 0.999
    num_negatives: int = 400
    novelty_weight: float = 0.01
    num_epochs: int = 10
    batch_size: int = 256
    learning_rate: float = 5e-5
    weight_decay: float = 0.01
    gradient_clip: float = 1.0
    cutoffs: int = 1
    span: int = 1
    hold_out_newest: bool = False
    valid_share: float = 0.1
    patience: int = 3
    lr_patience: int = 1
    threads: int = 0
    processes: int = 1
    precision: str = "32"

    def check(self) -> None:
        """Raise ValueError for a size or a share without sense."""
        counts = ("num_epochs", "batch_size", "cutoffs", "span", "num_negatives", "patience", "processes")
        _at_least("train", self, **dict.fromkeys(counts, 1))
        _at_least("train", self, lr_patience=0, threads=0, focal_gamma=0, weight_decay=0, novelty_weight=0)
        for name in ("learning_rate", "gradient_clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"train.{name}: got {getattr(self, name)}, needs a number above 0")
        if not 0 < self.valid_share < 1:
            raise ValueError(f"train.valid_share: got {self.valid_share}, needs a share between 0 and 1")
        if not 0 <= self.focal_alpha <= 1:
            raise ValueError(f"train.focal_alpha: got {self.focal_alpha}, needs a share from 0 to 1")
        if not 0 <= self.balance < 1:
            raise ValueError(f"train.balance: got {self.balance}, needs a number from 0 to below 1")


@dataclass
class EmbedConfig:
    """What `ubt embed` keeps for `ubt update`.

    Args:
        cache_gb: gigabytes of keys and values of past events that are kept on disk, 8 bytes x layers x hidden_size an
            event; users beyond it are embedded from all their events when they have new ones
    """

    cache_gb: float = 2.0


@dataclass
class UpdateConfig:
    """New days of a log.

    Args:
        new_data: folder with files of the new days, laid out as data_dir is; null = the prepared log has them already
        until: events before this moment are embedded, UTC; null = all of them
    """

    new_data: str | None = None
    until: str | None = None


@dataclass
class FeaturesConfig:
    """The blocks of user vectors beside the network's own.

    Args:
        windows_days: windows before train_start in which aggregates count, in days; the longest is also the half-life
            of an event in the collaborative block
        cf_size: width of the collaborative block
        cf_values: most frequent skus, categories and URLs, of each so many, that the collaborative block knows
        cf_users: users that the collaborative block is fitted on, at most
    """

    windows_days: list[float] = field(default_factory=lambda: [1.0, 7.0, 30.0])
    cf_size: int = 64
    cf_values: int = 100_000
    cf_users: int = 500_000

    def check(self) -> None:
        """Raise ValueError for no window, or one without length."""
        if not self.windows_days or min(self.windows_days) <= 0:
            raise ValueError(f"features.windows_days: got {self.windows_days}, needs lengths in days above 0")
        _at_least("features", self, cf_size=1, cf_values=1, cf_users=1)


@dataclass
class ScoreConfig:
    """How representations are compared: one network, trained in the same way, serves all of them.

    Args:
        scorer: "official": the challenge's network (2048 wide, 3 blocks) on all clients, hours on a CPU; "sampled": the
            same code on `sample` of them, with a network of `width` and `layers`
        sample: clients drawn for "sampled"; 0 = all
        width: width of the network of "sampled"
        layers: residual blocks of the network of "sampled"
        seeds: networks whose scores are averaged; the first has the challenge's seed
        trees: boosting rounds of LightGBM on the aggregates, one model a label; 0 = without this rival
    """

    scorer: str = "sampled"
    sample: int = 20_000
    width: int = 256
    layers: int = 1
    seeds: int = 1
    trees: int = 100

    def check(self) -> None:
        """Raise ValueError for a scorer that does not exist or a size without sense."""
        if self.scorer not in ("official", "sampled"):
            raise ValueError(f"score.scorer: got {self.scorer!r}, needs official or sampled")
        _at_least("score", self, sample=0, width=1, layers=0, seeds=1, trees=0)


@dataclass
class Config:
    """All settings of a run.

    Args:
        data_dir: folder of the raw log; "$NAME/..." is filled from the environment
        run_dir: folder of everything that is written
        embeddings_dir: folder of embeddings.npy and client_ids.npy; null = <run_dir>/embeddings
        generate: size and seed of a generated log
        log: layout of a log that is not in the challenge layout
        prepare: how events become the store
        model: size of the network
        train: how the network is trained
        embed: what is kept for later updates
        update: new days of a log
        features: the blocks beside the network's
        score: how representations are compared
        blocks: blocks that are written, scored and put side by side, as "hstu,aggregates,cf"
        seed: seed of weights, shuffling, dropout, the collaborative block and the clients of a sample
        resume: continue an interrupted run in run_dir
        progress: show progress bars
    """

    data_dir: str = "data"
    run_dir: str = "runs/ubt"
    embeddings_dir: str | None = None
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    log: LogConfig = field(default_factory=LogConfig)
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    embed: EmbedConfig = field(default_factory=EmbedConfig)
    update: UpdateConfig = field(default_factory=UpdateConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    blocks: str = "hstu,aggregates,cf"
    seed: int = 42
    resume: bool = False
    progress: bool = True

    def check(self) -> None:
        """Raise ValueError for the first setting without sense, in any section."""
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed: got {self.seed}, needs a whole number from 0 to {2**32 - 1}")
        for section in (self.generate, self.model, self.train, self.features, self.score):
            section.check()

    @property
    def embeddings(self) -> Path:
        """Folder of embeddings.npy and client_ids.npy."""
        return Path(self.embeddings_dir or Path(self.run_dir) / "embeddings")

    @property
    def prepared(self) -> Path:
        """Folder of the prepared log."""
        return Path(self.run_dir) / "prepared"


def _at_least(section: str, settings: object, **least: int) -> None:
    for name, number in least.items():
        # Written so that NaN is refused.
        if not getattr(settings, name) >= number:
            raise ValueError(f"{section}.{name}: got {getattr(settings, name)}, needs at least {number}")
