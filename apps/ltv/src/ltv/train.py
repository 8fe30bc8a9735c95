"""`ltv train`: fit the pipeline on the train window, save it, and score the validation window."""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import Any

from ltv.config import PACKAGES, Config, Slice
from ltv.evaluate import evaluate_split
from ltv.slices import closed_before, content_of, engine_of, features_of, horizon_days, open_train, schema_of
from ltv_stack import FeatureConfig, LTVConfig, LTVPipeline
from runkit.errors import SettingError
from runkit.files import atomic_folder, content_hash, read_json, write_json
from runkit.run import Run

log = logging.getLogger("ltv.train")


def train(config: Config, rows: Slice, resume: bool = False) -> dict[str, Any]:
    """Fit and save the models of ``<run_dir>/models``, then evaluate the validation window where one is set.

    Rows are streamed: one pass fits the feature builder, one writes the feature matrices to
    ``<run_dir>/processed``, and the trees are grown from those. Partitions of the validation window are never fitted
    on, whatever the train window says. With `resume`, models that the same settings and the
    same data already gave are kept; an interrupted fit starts again. The result is the same either way.

    Returns:
        the metrics of the validation window, empty where there is none.

    Raises:
        SettingError: if the split is not "train", or the window leaves nothing to fit on.
    """
    if rows.split != "train":
        raise SettingError(
            f"split: got {rows.split}, needs train: models are fitted on the train window; --start-dt moves it"
        )
    run = Run(config.run_dir)
    models = run.folder / "models"
    with run.command("train", config, PACKAGES) as facts:
        data = open_train(config, rows)
        settings = {k: v for k, v in asdict(config).items() if k not in ("run_dir", "inference", "engine", "features")}
        identity = {
            "config": content_hash(settings | {"features": features_of(config)}),
            "data": content_of(data),
            "slice": content_hash(asdict(rows) | {"chunk_size": None}),
            "partitions": [p.name for p in data.partitions if p.rows],
        }
        if resume and read_json(models / "trained.json") == identity:
            log.info("models in %s are from these settings and data: kept", models)
            facts["resumed"] = "models"
        else:
            pipe = LTVPipeline(schema_of(config), ltv_config(config, run))
            _warn_of_open_labels(config)
            with atomic_folder(models, "ltv models") as folder:
                with engine_of(config) as engine:
                    pipe.fit(data, engine=engine)
                pipe.save(folder)
                write_json(folder / "trained.json", identity)
            facts["fit"] = pipe.report_
        facts |= {"rows": data.num_rows, "partitions": len(data.partitions), "data_fingerprint": identity["data"]}
        facts["skipped_files"] = list(data.skipped)
    if config.data.val_start is None:
        log.info("data.val_start is not set: nothing is held out, no metrics")
        return {}
    return evaluate_split(config, Slice("val", chunk_size=rows.chunk_size), resume)


def ltv_config(config: Config, run: Run) -> LTVConfig:
    """Return the pipeline's settings: those of ``models`` under their own names, and how rows are split and read.

    Raises:
        SettingError: if the pipeline refuses one.
    """
    training = config.training
    try:
        return LTVConfig(
            **vars(config.models),
            split=training.split.strategy,
            calibration_frac=training.split.val_share,
            embargo=f"{training.split.embargo_hours}h",
            folds=training.n_folds,
            max_rows=training.max_rows,
            seed=config.seed,
            features=FeatureConfig.from_dict(features_of(config)),
            cache_dir=str(run.folder / "processed") if training.cache_features else None,
            keep_cache=training.cache_features,
        )
    except (TypeError, ValueError) as error:
        raise SettingError(str(error)) from error


def _warn_of_open_labels(config: Config) -> None:
    """Say so when train labels reach into the hours the validation rows come from."""
    data = config.data
    end = data.model_end if config.training.split.strategy == "stratified_random" else data.train_end
    if data.val_start is None:
        return
    longest = max(horizon_days(config).values())
    if end is None or end > closed_before(data.val_start, longest):
        log.warning(
            "train rows up to %s have d%d labels that end after the time of the validation rows (%s): fine to compare "
            "models, but a live system could not know them; closed labels need an end <= %s",
            min(end or data.val_start, data.val_start),
            longest,
            data.val_start,
            closed_before(data.val_start, longest),
        )
