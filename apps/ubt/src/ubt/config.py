"""Every setting of the app, in dataclasses that the command line, the YAML files and Python callers share."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from inspect import cleandoc
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    OpenUnitInterval,
    PositiveFloat,
    PositiveInt,
    restricted_number_type,
)

from runkit.settings import SettingError, settings_of
from synthlogs.settings import ShopConfig

TASKS = ("churn", "category_propensity", "product_propensity", "price", "name")
BLOCKS = ("hstu", "aggregates", "cf")
if TYPE_CHECKING:
    Share = float
    Seed = int
else:
    Share = restricted_number_type("Share", float, [(">=", 0), ("<", 1)], docstring="a share from 0 to below 1")
    seeds = f"a whole number from 0 to {2**32 - 1}"
    Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**32)], docstring=seeds)


class _Plain:
    """Settings whose numbers are plain ones: no file and no checkpoint shall hold those of jsonargparse's types."""

    def __post_init__(self) -> None:
        for one in fields(self):  # type: ignore[arg-type]
            setattr(self, one.name, _plain(getattr(self, one.name)))


@dataclass
class GenerateConfig(_Plain, ShopConfig):
    # The settings of synthlogs, documented there, and one more.
    __doc__ = f"""{cleandoc(ShopConfig.__doc__ or "")}
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
class LogConfig(_Plain):
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
    target_categories: NonNegativeInt = 100
    target_skus: NonNegativeInt = 100
    train_start: str | None = None
    valid_start: str | None = None
    end: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.files, str):
            self.files = [self.files]


@dataclass
class PrepareConfig(_Plain):
    """How events become the store.

    Args:
        memory_limit: bound for the building engine's buffers
    """

    memory_limit: str = "1GB"


@dataclass
class ModelConfig(_Plain):
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

    hidden_size: PositiveInt = 256
    num_layers: PositiveInt = 3
    num_heads: PositiveInt = 4
    max_seq_length: PositiveInt = 300
    id_size: PositiveInt = 64
    max_ids: PositiveInt = 100_000
    embedding_size: PositiveInt = 512
    half_lives_days: list[PositiveFloat] = field(default_factory=lambda: [2.0, 14.0, 60.0])
    time_buckets: PositiveInt = 128
    dropout: Share = 0.1
    id_dropout: Share = 0.1


@dataclass
class TrainConfig(_Plain):
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
    weighting: Literal["static", "uncertainty", "dwa", "gradnorm"] = "static"
    loss: Literal["focal", "bce"] = "focal"
    focal_alpha: ClosedUnitInterval = 0.75
    focal_gamma: NonNegativeFloat = 2.0
    balance: Share = 0.999
    num_negatives: PositiveInt = 400
    novelty_weight: NonNegativeFloat = 0.01
    num_epochs: PositiveInt = 10
    batch_size: PositiveInt = 256
    learning_rate: PositiveFloat = 5e-5
    weight_decay: NonNegativeFloat = 0.01
    gradient_clip: PositiveFloat = 1.0
    cutoffs: PositiveInt = 1
    span: PositiveInt = 1
    hold_out_newest: bool = False
    valid_share: OpenUnitInterval = 0.1
    patience: PositiveInt = 3
    lr_patience: NonNegativeInt = 1
    threads: NonNegativeInt = 0
    processes: PositiveInt = 1
    precision: Literal["32", "bf16"] = "32"


@dataclass
class EmbedConfig(_Plain):
    """What `ubt embed` keeps for `ubt update`.

    Args:
        cache_gb: gigabytes of keys and values of past events that are kept on disk, 8 bytes x layers x hidden_size an
            event; users beyond it are embedded from all their events when they have new ones
    """

    cache_gb: NonNegativeFloat = 2.0


@dataclass
class UpdateConfig(_Plain):
    """New days of a log.

    Args:
        new_data: folder with files of the new days, laid out as data_dir is; null = the prepared log has them already
        until: events before this moment are embedded, UTC; null = all of them
    """

    new_data: str | None = None
    until: str | None = None


@dataclass
class FeaturesConfig(_Plain):
    """The blocks of user vectors beside the network's own.

    Args:
        windows_days: windows before train_start in which aggregates count, in days; the longest is also the half-life
            of an event in the collaborative block
        cf_size: width of the collaborative block
        cf_values: most frequent skus, categories and URLs, of each so many, that the collaborative block knows
        cf_users: users that the collaborative block is fitted on, at most
    """

    windows_days: list[PositiveFloat] = field(default_factory=lambda: [1.0, 7.0, 30.0])
    cf_size: PositiveInt = 64
    cf_values: PositiveInt = 100_000
    cf_users: PositiveInt = 500_000


@dataclass
class ScoreConfig(_Plain):
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

    scorer: Literal["official", "sampled"] = "sampled"
    sample: NonNegativeInt = 20_000
    width: PositiveInt = 256
    layers: NonNegativeInt = 1
    seeds: PositiveInt = 1
    trees: NonNegativeInt = 100


@dataclass
class Config(_Plain):
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
    seed: Seed = 42
    resume: bool = False
    progress: bool = True

    def check(self) -> None:
        """Raise SettingError for the first setting without sense, in any section."""
        for one in settings_of(Config).values():
            one.checked(attrgetter(one.name)(self))
        self.generate.check()
        if not self.features.windows_days:
            raise SettingError("features.windows_days: got none, needs one length in days or more")
        parse_blocks(self.blocks)

    @property
    def data(self) -> Path:
        """Folder of the raw log."""
        path = os.path.expandvars(os.path.expanduser(self.data_dir))
        if "$" in path:
            raise SettingError(
                f"data_dir: {path} names an environment variable that is not set; set it or give --data-dir"
            )
        return Path(path)

    @property
    def embeddings(self) -> Path:
        """Folder of embeddings.npy and client_ids.npy."""
        return Path(self.embeddings_dir or Path(self.run_dir) / "embeddings")

    @property
    def prepared(self) -> Path:
        """Folder of the prepared log."""
        return Path(self.run_dir) / "prepared"

    @property
    def checkpoint(self) -> Path:
        """The network of the best epoch."""
        return Path(self.run_dir) / "checkpoints" / "best.ckpt"

    @property
    def cache(self) -> Path:
        """Folder of what is kept of users' events for updates."""
        return Path(self.run_dir) / "cache"


def parse_blocks(text: str) -> list[str]:
    """Return the blocks named in "hstu,aggregates,cf".

    Raises:
        SettingError: if a block is unknown or named twice, or none is named
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or len(set(names)) < len(names) or not set(names) <= set(BLOCKS):
        raise SettingError(f"blocks: got {text!r}, needs some of {', '.join(BLOCKS)}, each once, with commas")
    return names


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(one) for one in value]
    kind = next((kind for kind in (bool, int, float) if isinstance(value, kind)), None)
    return value if kind is None else kind(value)
