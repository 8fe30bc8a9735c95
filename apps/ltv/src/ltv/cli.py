"""The command line ``ltv``: a command is a class of settings, the call of a module that works, a line of `APP`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar

from ltv.config import Config, ImportConfig, Slice, Split, Submission
from runkit.cli import App, Command
from synthlogs.settings import AdsConfig

Part = TypeVar("Part")
ABOUT = "Predict what a user will spend: in 1, 7, 14 and 28 days, in order, with intervals."
EXAMPLES = """\
  ltv generate --data-dir data/raw                                  a log in the published 84-column layout
  ltv train --config config/config_test.yaml --data.root data/raw   fit, save, score the validation window
  ltv predict --config config/config_test.yaml --data.root data/raw stream the test window, write submission.csv
  ltv dashboard --runs runs                                         look at the runs in a browser

config/config.yaml (production) and config/config_test.yaml (minutes) are shipped; a file of your own holds what
differs from the defaults."""
SPLITS = (
    "--split, --start-dt, --end-dt, --sample-frac, --max-partitions, --limit-rows and --chunk-size choose the rows."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    files = [file for word, file in pairwise([*words, ""]) if word == "--config"]
    files += [word.partition("=")[2] for word in words if word.startswith("--config=")]
    if words[:1] == ["validate"] and files:
        # The log is called after the settings file, which the settings themselves do not know.
        words.insert(1, f"--name={Path(files[0]).stem}")
    return APP.main(words)


@dataclass
class Generate(AdsConfig):
    """Where the log goes, its size, drift and seed.

    Args:
        data_dir: folder to write; only a log that was written here before is replaced
    """

    data_dir: str = "data/raw"


def generate(given: Generate) -> str:
    from synthlogs.ads import generate

    return "\n".join(f"{key:20} {value:.6g}" for key, value in generate(given.data_dir, part(AdsConfig, given)).items())


@dataclass(kw_only=True)
class Import(ImportConfig):
    """Which transactions become rows, and where they go.

    Args:
        source: whose file it is
        path: the published file, or the folder that holds it
        data_dir: folder to write; must be empty or missing
    """

    source: Literal["cdnow", "online_retail"]
    path: str
    data_dir: str


def import_(given: Import) -> str:
    from ltv.transactions import import_transactions

    facts = import_transactions(given.source, given.path, given.data_dir, part(ImportConfig, given))
    return "\n".join(f"{key:30} {value}" for key, value in facts.items())


@dataclass
class Train(Slice, Config):
    """What is written where, and the rows to fit on.

    Args:
        split: models are fitted on "train"; start_dt and end_dt move its window
        resume: keep what an interrupted run finished
    """

    split: Split = "train"
    resume: bool = False


def train(given: Train) -> None:
    from ltv.train import train

    train(part(Config, given), part(Slice, given), given.resume)


@dataclass
class Predict(Slice, Config):
    """What is written where, and the rows to predict.

    Args:
        split: "train", "val" or "test"
        resume: keep what an interrupted run finished
    """

    split: Split = "test"
    resume: bool = False


def predict(given: Predict) -> str:
    from ltv.predict import predict

    return str(predict(part(Config, given), part(Slice, given), given.resume))


@dataclass
class Evaluate(Slice, Config):
    """What is written where, and the rows to score."""


def evaluate(given: Evaluate) -> None:
    from ltv.evaluate import evaluate_split

    evaluate_split(part(Config, given), part(Slice, given))


@dataclass
class Validate(Slice, Config):
    """What is written where, and the rows to check.

    Args:
        name: what the report and its log, validation_<name>.log, are called; null = the name of the settings file
    """

    name: str | None = None


def validate(given: Validate) -> None:
    from ltv.evaluate import validate

    validate(part(Config, given), part(Slice, given), given.name or "default")


@dataclass
class Compare(Slice, Config):
    """What is lined up, and on which rows.

    Args:
        variants: models to fit on the same rows, each below <run_dir>/<variant>: log1p, tweedie, two_stage, document,
            document_sampled, stack, ziln, odmn, optdist, and for transactions btyd and btyd_recalibrated
        runs: finished run directories to read instead
        resume: keep what an interrupted run finished
    """

    variants: list[str] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)
    resume: bool = False


def compare(given: Compare) -> str:
    from ltv.compare import compare

    return compare(part(Config, given), part(Slice, given), given.variants, given.runs, given.resume)


@dataclass
class Submit(Submission, Slice, Config):
    """What is handed in, and the rows that are asked for."""

    split: Split = "test"


def submit(given: Submit) -> str:
    from ltv.submit import submit

    return str(submit(part(Config, given), part(Submission, given), part(Slice, given)))


@dataclass
class Dashboard:
    """What is looked at, and where.

    Args:
        runs: folder of run directories, or one run directory
        port: port on localhost
    """

    runs: str = "runs"
    port: int = 8501


def dashboard(given: Dashboard) -> None:
    from ltv.dashboard import serve

    serve(given.runs, given.port)


def part(kind: Callable[..., Part], given: Any) -> Part:
    """Return the settings of a command that belong to one of the dataclasses it is made of."""
    return kind(**{one.name: getattr(given, one.name) for one in fields(kind)})  # type: ignore[arg-type]


APP = App(
    "ltv",
    ABOUT,
    {
        "generate": Command(
            generate,
            Generate,
            "Write a log in the published 84-column layout, with planted truth.\n\n"
            "train/train and test/test hold hourly partitions datetime=YYYY-MM-DD-HH-MM; truth/ holds every row's\n"
            "labels and the best predictions anyone could make. 2 million rows take minutes and little memory.",
        ),
        "import": Command(
            import_,
            Import,
            "Turn CDNOW or Online Retail into daily partitions for `data.layout: transactions`.\n\n"
            "One row per customer: features of the first days, ordered labels of the horizons after them.",
        ),
        "train": Command(
            train,
            Train,
            "Fit the pipeline on the train window, save it, score the validation window.\n\n"
            f"Models go below <run_dir>/models. {SPLITS}",
        ),
        "predict": Command(
            predict,
            Predict,
            "Stream a slice through the saved pipeline; write predictions per partition and submission.csv."
            f"\n\n{SPLITS}",
        ),
        "evaluate": Command(
            evaluate,
            Evaluate,
            f"Score a slice with known outcome: metrics, report.html, plots, predictions.\n\n{SPLITS}",
        ),
        "validate": Command(
            validate, Validate, f"Check the data for leaks and every stage on train and validation rows.\n\n{SPLITS}"
        ),
        "compare": Command(
            compare,
            Compare,
            "Fit several models on the same rows, or line up finished runs; write compare.md.\n\n"
            "--variants log1p ziln two_stage ... fits each below <run_dir>/<variant>; --runs A B only reads metrics.\n"
            f"{SPLITS}",
        ),
        "submit": Command(
            submit,
            Submit,
            "Check submission.csv against the ids that are asked for and hand it in with the kaggle command.",
        ),
        "dashboard": Command(dashboard, Dashboard, "Look at runs in a browser (needs the extra `dashboard`)."),
    },
    presets=Path(__file__).with_name("config"),
    examples=EXAMPLES,
    loggers=("ltv_stack",),
)


if __name__ == "__main__":
    sys.exit(main())
