"""The console script."""

from pathlib import Path

from purchase.config import Config
from runkit.cli import App, Command


def _generate(config: Config) -> str:
    from purchase.generate import generate

    return generate(config)


def _prepare(config: Config) -> str:
    from purchase.prepare import prepare

    return prepare(config)


def _train(config: Config) -> str:
    from purchase.train import train

    return train(config)


def _evaluate(config: Config) -> str:
    from purchase.evaluate import evaluate

    return evaluate(config)


def _predict(config: Config) -> str:
    from purchase.predict import predict

    return predict(config)


def _tune(config: Config) -> str:
    from purchase.tune import tune

    return tune(config)


SHARED = ("run_dir", "seed", "resume", "progress")
app = App(
    "purchase",
    "Rank the few items a shopper will buy among the thousands looked at.",
    {
        "generate": Command(
            _generate, Config, "write a log with propensities planted in it, and its items", ("generate", "log.folder")
        ),
        "prepare": Command(_prepare, Config, "read the log into timelines of users", ("log", "split", *SHARED)),
        "train": Command(_train, Config, "train the network", ("split", "model", "train", *SHARED)),
        "evaluate": Command(
            _evaluate, Config, "judge the network beside the baselines", ("evaluate", "rules", "split", *SHARED)
        ),
        "predict": Command(_predict, Config, "write a list of items for every user", ("predict", "rules", *SHARED)),
        "tune": Command(_tune, Config, "try settings on the validation window", ("tune", "train", *SHARED)),
    },
    presets=Path(__file__).parent / "configs",
    examples="""\
  purchase generate --config demo && purchase prepare --config demo && purchase train --config demo
  purchase evaluate --config demo && purchase predict --config demo
  purchase prepare --config rees46 --folder ~/data/rees46 --run-dir runs/rees46""",
)
entry = app.entry
