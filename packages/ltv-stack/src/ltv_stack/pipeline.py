"""The pipeline: fit on a stream, predict on a stream, every output in order over horizons."""

import json
import logging
import shutil
import tempfile
import time as clock
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import lightgbm as lgb
import numpy as np
import pandas as pd
import pyarrow as pa

from .cache import FeatureCache, Ints, build_cache
from .columns import Floats, as_text
from .config import DEEP, LTVConfig
from .data import Dataset, drawn, row_hashes
from .drift import Reference
from .engine import Engine, LocalEngine
from .features import FeatureBuilder, Matrix
from .guard import audit, refuse
from .kinds import check_types
from .labels import Labels
from .metrics import buyer_metrics
from .models import Models
from .outputs import FEWEST_HELD_OUT_BUYERS, Outputs, converts
from .schema import Horizon, Schema
from .split import folds_of, split_rows
from .training import Trainer

log = logging.getLogger(__name__)

Part = TypeVar("Part")

# Of a saved pipeline; rises with every change that an older reader or an older folder cannot follow.
FORMAT = 3
_FEWEST_BUYERS = 10


class LTVPipeline:
    """Customer revenue at every horizon of a schema.

    `fit` streams the training data once to fit the features and once to write a narrow feature cache, holds out the
    newest rows for calibration, and trains from the cache. `predict` streams batches; a row's prediction depends on
    that row and the fitted state alone, so it is the same bit by bit whatever the chunk size or engine.

    Args:
        schema: declared columns and horizons.
        config: settings.
    """

    def __init__(self, schema: Schema, config: LTVConfig | None = None) -> None:
        self.schema = schema
        self.config = config or LTVConfig()
        horizons = [horizon.name for horizon in schema.horizons]
        strangers = sorted(set(self.config.order_weights) - set(horizons))
        if strangers:
            raise ValueError(f"order_weights: got {strangers}, needs names out of {horizons}")
        self.builder = FeatureBuilder(schema, self.config.features, seed=self.config.seed)
        self.horizons: list[str] = []
        self.skipped_horizons: dict[str, str] = {}
        self.main = ""
        self.report_: dict[str, Any] = {}
        self.models: Models | None = None
        self.outputs = Outputs(self.config, [], "")
        self.reference: Reference | None = None

    @property
    def fitted(self) -> bool:
        """Whether `fit` or `load` has run."""
        return self.models is not None

    @property
    def output_columns(self) -> list[str]:
        """Names of the predicted columns, without the id."""
        return self.outputs.columns

    def fit(self, dataset: Dataset, *, engine: Engine | None = None) -> "LTVPipeline":
        """Learn from a dataset of rows with labels.

        Args:
            dataset: training rows, in order of time.
            engine: where features are fitted; here when None.

        Returns:
            the pipeline itself.

        Raises:
            LeakageError: a column leaks and the guard is strict.
            ValueError: no rows, no horizon with amounts, or too few buyers; says what it got.
        """
        if self.config.model in DEEP:
            _require_torch(self.config.model)
        try:
            self._fit_stream(dataset, engine, clock.perf_counter())
        except BaseException:
            # A fit that failed leaves nothing half fitted behind.
            self.horizons, self.models = [], None
            raise
        return self

    def predict(
        self, dataset: Dataset, *, engine: Engine | None = None, keep: Sequence[str] = ()
    ) -> Iterator[pa.RecordBatch]:
        """Predictions in the order of the rows, one record batch a chunk.

        Args:
            dataset: rows to predict; labels are not read unless kept.
            engine: where the work runs.
            keep: columns of the input to pass on.

        Returns:
            batches of the id (where the data has it), `output_columns`, and the kept columns.
        """
        self.check(dataset)
        task = _PredictPartition(self, dataset, tuple(keep))
        if engine is None or isinstance(engine, LocalEngine):
            for number in range(len(dataset.partitions)):
                yield from task.batches(number)
            return
        for batches in engine.map(task, list(range(len(dataset.partitions)))):
            yield from batches

    def check(self, dataset: Dataset) -> None:
        """Look whether a dataset can be predicted.

        A partition may lack the column that calibration is split by; its rows are of no known segment.

        Args:
            dataset: rows to predict.

        Raises:
            ValueError: a column has another type in a file, or there is no column to segment by.
        """
        self._fitted()
        self.builder.check(dataset)
        by = self.config.calibrate_by
        if by and by not in dataset.column_names:
            raise ValueError(f"calibrate_by: the data has no column {by!r}")

    def predict_batch(self, batch: pa.RecordBatch, keep: Sequence[str] = ()) -> pa.RecordBatch:
        """Predictions of one record batch.

        Args:
            batch: rows of the training data's columns.
            keep: columns of the batch to pass on.

        Returns:
            the id (where the data has it), `output_columns`, and the kept columns.

        Raises:
            ValueError: a kept column is not there, or has the name of a predicted one.
        """
        self._fitted()
        absent = [name for name in keep if name not in batch.schema.names]
        if absent:
            raise ValueError(f"keep: the data has no columns {absent}")
        clash = [name for name in keep if name in self.output_columns]
        if clash:
            raise ValueError(f"keep: {clash} are names of predicted columns too")
        segment = None
        if self.config.calibrate_by:
            there = self.config.calibrate_by in batch.schema.names
            segment = as_text(batch.column(self.config.calibrate_by)).to_pylist() if there else [None] * batch.num_rows
        columns = self.outputs.apply(self._fitted().scores(self.builder.transform(batch)), segment)
        arrays: dict[str, pa.Array] = {}
        if self.schema.id and self.schema.id in batch.schema.names:
            arrays[self.schema.id] = batch.column(self.schema.id)
        arrays |= {name: pa.array(column) for name, column in columns.items()}
        arrays |= {name: batch.column(name) for name in keep}
        return pa.RecordBatch.from_arrays(list(arrays.values()), names=list(arrays))

    def explain(self, batch: pa.RecordBatch, horizon: str | None = None) -> tuple[list[str], Floats]:
        """Exact SHAP values of every row from LightGBM, on the model's own scale.

        The models explained: the one-model booster of the horizon where there is one, else the booster of the buyers'
        amount; with horizon None the buyer classifier (log odds).

        Args:
            batch: rows of the training data's columns [N].
            horizon: name of a horizon, or None.

        Returns:
            feature names and the constant's name "(base)", and contributions [N, F + 1] that sum to the raw score.
        """
        booster = self._fitted().explained(horizon)
        contributions = booster.predict(self.builder.transform(batch), pred_contrib=True)
        return [*self.builder.names, "(base)"], np.asarray(contributions, dtype=np.float64)

    def importance(self, dataset: Dataset | None = None, rows: int = 2000) -> pd.DataFrame:
        """Gain of every feature in every model and, with data, its mean absolute SHAP value over the first rows.

        Args:
            dataset: rows to explain; without them the gain alone.
            rows: most rows explained.
        """
        models = self._fitted()
        matrix = None
        if dataset is not None:
            batches = replace(dataset, chunk_size=min(rows, dataset.chunk_size or rows)).batches(self.builder.columns)
            parts: list[Matrix] = []
            for batch in batches:
                parts.append(self.builder.transform(batch.slice(0, rows - sum(map(len, parts)))))
                if sum(map(len, parts)) >= rows:
                    break
            matrix = np.concatenate(parts) if parts else None
        frames = []
        for horizon in (None, *self.horizons):
            booster = models.explained(horizon)
            frame = pd.DataFrame(
                {
                    "model": "buyer" if horizon is None else horizon,
                    "feature": self.builder.names,
                    "group": [self.builder.groups[name] for name in self.builder.names],
                    "source": [self.builder.source[name] for name in self.builder.names],
                    "gain": booster.feature_importance("gain"),
                }
            )
            if matrix is not None:
                shap = np.asarray(booster.predict(matrix, pred_contrib=True))
                frame["shap"] = np.abs(shap[:, :-1]).mean(axis=0)
            frames.append(frame.sort_values("gain", ascending=False, kind="stable"))
        return pd.concat(frames, ignore_index=True)

    def drift(self, dataset: Dataset, rows: int = 50_000) -> pd.DataFrame:
        """How far each feature of a dataset lies from the training rows: PSI, Kolmogorov-Smirnov distance, means.

        Args:
            dataset: rows to compare with the training rows.
            rows: most rows looked at.

        Raises:
            ValueError: there are no rows.
        """
        self._fitted()
        assert self.reference is not None
        share = min(1.0, rows / max(dataset.num_rows, 1))
        parts = []
        for partition in dataset.partitions:
            start = 0
            for batch in dataset.partition_batches(partition, self.builder.columns):
                hashes = row_hashes(self.config.seed + 3, partition.name, start, batch.num_rows)
                start += batch.num_rows
                kept = batch.filter(pa.array(drawn(hashes, share)))
                parts.append(self.builder.transform(kept))
        if not parts or not sum(map(len, parts)):
            raise ValueError("dataset: got no rows, needs at least one to compare")
        return self.reference.compare(np.concatenate(parts), self.builder.names)

    def save(self, folder: str | Path) -> Path:
        """Write the fitted pipeline as text files and JSON (no pickles); an existing folder is replaced as a whole.

        Args:
            folder: where to; its parents are made.

        Returns:
            the folder.
        """
        models = self._fitted()
        folder = Path(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            models.save(temporary)
            _write_json(temporary / "features.json", self.builder.to_json())
            assert self.reference is not None
            _write_json(temporary / "reference.json", self.reference.to_json())
            _write_json(temporary / "calibration.json", self.outputs.to_json())
            state = {
                "format": FORMAT,
                "version": _version(),
                "schema": self.schema.to_dict(),
                "config": self.config.to_dict(),
                "horizons": self.horizons,
                "skipped_horizons": self.skipped_horizons,
                "main": self.main,
                "class_weights": list(models.class_weights),
                "report": self.report_,
            }
            _write_json(temporary / "pipeline.json", state)
            temporary.chmod(0o755)
            if folder.exists():
                old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
                folder.rename(old / folder.name)
                temporary.rename(folder)
                shutil.rmtree(old)
            else:
                temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> "LTVPipeline":
        """The pipeline `save` wrote.

        Args:
            folder: what `save` wrote.

        Raises:
            ValueError: another format, or a file that is missing or damaged; names it and says what to do.
        """
        folder = Path(folder)
        if not (folder / "pipeline.json").is_file():
            raise ValueError(f"folder: {folder} holds no pipeline.json; needs what LTVPipeline.save wrote")
        state = _read_json(folder / "pipeline.json")
        if state.get("format") != FORMAT:
            raise ValueError(
                f"folder: {folder / 'pipeline.json'} has format {state.get('format')}, written by ltv-stack "
                f"{state.get('version', 'of an unknown version')}; this version ({_version()}) reads format {FORMAT}: "
                "fit and save the model again, or load it with the version that wrote it"
            )
        try:
            return cls._restored(folder, state)
        except (KeyError, FileNotFoundError, lgb.basic.LightGBMError) as error:
            raise ValueError(
                f"folder: {folder} says format {FORMAT} but is not complete ({error}); fit and save the model again"
            ) from error

    @classmethod
    def _restored(cls, folder: Path, state: dict[str, Any]) -> "LTVPipeline":
        pipe = cls(Schema.from_dict(state["schema"]), LTVConfig.restore(state["config"]))
        pipe.builder = _read_part(folder / "features.json", FeatureBuilder.from_json)
        pipe.reference = _read_part(folder / "reference.json", Reference.from_json)
        pipe.horizons, pipe.skipped_horizons = state["horizons"], state["skipped_horizons"]
        pipe.main, pipe.report_ = state["main"], state["report"]
        buyers, others = state["class_weights"]
        pipe.models = Models.load(
            folder, pipe.config.model, pipe.horizons, pipe.main, (buyers, others), pipe.config.threads
        )
        outputs = Outputs(pipe.config, pipe.horizons, pipe.main)
        pipe.outputs = _read_part(folder / "calibration.json", outputs.restore)
        return pipe

    def _fit_stream(self, dataset: Dataset, engine: Engine | None, started: float) -> None:
        config = self.config
        self._choose_horizons(dataset)
        self.report_ = {"rows": dataset.num_rows, "skipped_horizons": self.skipped_horizons}
        check_types(dataset, self.schema, config.features.exclude)
        self._guard(dataset)
        self.builder = FeatureBuilder(self.schema, config.features, seed=config.seed)
        self.builder.fit(dataset, engine=engine)
        self._time("features", started)
        folder = Path(config.cache_dir) if config.cache_dir else Path(tempfile.mkdtemp(prefix="ltv-"))
        folder = folder / "features"
        try:
            cache = self._build_cache(dataset, folder, engine)
            self._time("cache", started)
            self._fit(cache, started)
        finally:
            if not config.cache_dir:
                shutil.rmtree(folder.parent, ignore_errors=True)
            elif not config.keep_cache:
                shutil.rmtree(folder, ignore_errors=True)
        self._time("total", started)

    def _choose_horizons(self, dataset: Dataset) -> None:
        names = set(dataset.column_names)
        self.skipped_horizons = {}
        for horizon in self.schema.horizons:
            if horizon.revenue is None:
                self.skipped_horizons[horizon.name] = "no column of amounts is declared"
            elif horizon.revenue not in names:
                self.skipped_horizons[horizon.name] = f"the data has no column {horizon.revenue}"
        self.horizons = [h.name for h in self.schema.horizons if h.name not in self.skipped_horizons]
        for name, reason in self.skipped_horizons.items():
            log.info("horizon %s skipped: %s", name, reason)
        if not self.horizons:
            reasons = "; ".join(f"{n}: {r}" for n, r in self.skipped_horizons.items())
            raise ValueError(f"dataset: no horizon has amounts ({reasons})")

    def _guard(self, dataset: Dataset) -> None:
        if self.config.guard == "off":
            return
        findings = audit(
            dataset, self.schema, self.config.features, seed=self.config.seed, num_threads=self.config.threads
        )
        self.report_["leaks"] = [str(finding) for finding in findings]
        if self.config.guard == "strict":
            refuse(findings)
        for finding in findings:
            log.warning("leak: %s", finding)

    def _build_cache(self, dataset: Dataset, folder: Path, engine: Engine | None) -> FeatureCache:
        by = self.config.calibrate_by
        if by and by not in dataset.column_names:
            raise ValueError(f"calibrate_by: the data has no column {by!r}")
        columns = [h.revenue for h in self._wanted() if h.revenue]
        columns += [h.buyer for h in self._wanted() if h.buyer and h.buyer in dataset.column_names]
        return build_cache(
            self.builder,
            dataset,
            folder,
            label_columns=columns,
            segment=by,
            sample_rows=self.config.sample_rows,
            seed=self.config.seed,
            engine=engine,
        )

    def _wanted(self) -> list[Horizon]:
        return [h for h in self.schema.horizons if h.name in self.horizons]

    def _fit(self, cache: FeatureCache, started: float) -> None:
        config = self.config
        labels = Labels.of(cache, self._wanted(), self.report_)
        self.main = self._main_horizon()
        train, held_out = split_rows(cache, config, labels.buyers(self.main), self.report_)
        self._drop_thin_horizons(cache, labels, train, held_out)
        self.main = self._main_horizon()
        log.info("training on %d rows, calibrating on %d", len(train), len(held_out))
        sizes = self.builder.category_sizes
        done = partial(self._time, started=started)
        trainer = Trainer(config, cache, labels, self.horizons, self.main, sizes, done)
        if config.split == "cross_fit":
            self.models, scores = trainer.cross_fit(train)
        else:
            self.models = trainer.fit(train, held_out)
            scores = self.models.scores_of(cache, held_out)
        self.reference = Reference.fit(cache.sample_matrix)
        buyers = np.nan_to_num(labels.buyers(self.main)[train])
        self.report_ |= {"buyers": int(buyers.sum()), "main_horizon": self.main}
        rates = {name: float((np.nan_to_num(labels.revenue[name][train]) > 0).mean()) for name in self.horizons}
        main = float((buyers > 0).mean())
        self._calibrate(cache, labels, held_out, scores, {name: rate / main for name, rate in rates.items()})
        self._time("calibration", started)

    def _drop_thin_horizons(self, cache: FeatureCache, labels: Labels, train: Ints, held_out: Ints) -> None:
        config = self.config
        for name in list(self.horizons):
            bought = labels.revenue[name] > 0
            positive, kept = int(bought[train].sum()), int(bought[held_out].sum())
            if config.split == "cross_fit":
                positive -= max(int(bought[own].sum()) for own in folds_of(cache, train, config.folds))
            reason = ""
            if positive < _FEWEST_BUYERS:
                reason = f"{positive} of {len(train)} training rows have an amount; needs {_FEWEST_BUYERS}"
            elif converts(config) and kept < FEWEST_HELD_OUT_BUYERS:
                reason = (
                    f"{kept} of {len(held_out)} held-out rows have an amount; turning {config.model!r} into estimand "
                    f"{config.estimand!r} needs {FEWEST_HELD_OUT_BUYERS}"
                )
            if reason:
                self.skipped_horizons[name] = reason
                self.horizons.remove(name)
                log.warning("horizon %s skipped: %s", name, reason)
        if not self.horizons:
            reasons = "; ".join(f"{n}: {r}" for n, r in self.skipped_horizons.items())
            advice = "widen the window, raise the sample or correct the label columns"
            raise ValueError(f"dataset: no horizon can be trained ({reasons}); {advice}")

    def _main_horizon(self) -> str:
        name = self.config.main_horizon or ("d7" if "d7" in self.horizons else self.horizons[-1])
        if name not in self.horizons:
            raise ValueError(f"main_horizon: got {name!r}, needs one of {self.horizons}")
        return name

    def _calibrate(
        self, cache: FeatureCache, labels: Labels, rows: Ints, scores: dict[str, Floats], rates: dict[str, float]
    ) -> None:
        """Learn what `Outputs` needs on held-out rows, scored by models that were not fitted on them."""
        buyer = labels.buyers(self.main)[rows]
        known = np.isfinite(buyer)
        self.report_["held_out_buyer"] = buyer_metrics(buyer[known], scores["p"][known]) if known.any() else {}
        amounts = {name: labels.revenue[name][rows] for name in self.horizons}
        segment = None if cache.segment is None else cache.segment[rows]
        self.outputs = Outputs(self.config, self.horizons, self.main, rates)
        self.outputs.fit(scores, amounts, segment)

    def _fitted(self) -> Models:
        if self.models is None:
            raise ValueError("LTVPipeline is not fitted: call fit(dataset) or LTVPipeline.load(folder) first")
        return self.models

    def _time(self, stage: str, started: float) -> None:
        seconds = round(clock.perf_counter() - started, 3)
        self.report_.setdefault("seconds", {})[stage] = seconds
        log.info("%s done after %.1f s", stage, seconds)


class _PredictPartition:
    """Prediction of one partition, where the partition is; picklable."""

    def __init__(self, pipe: LTVPipeline, dataset: Dataset, keep: tuple[str, ...]) -> None:
        self.pipe, self.dataset, self.keep = pipe, dataset, keep
        extra = [pipe.schema.id, pipe.config.calibrate_by, *keep]
        self.columns = list(dict.fromkeys([*pipe.builder.columns, *(name for name in extra if name)]))
        self.types = {field.name: field.type for field in dataset.schema if field.name in keep}

    def batches(self, number: int) -> Iterator[pa.RecordBatch]:
        for batch in self.dataset.partition_batches(self.dataset.partitions[number], self.columns):
            for name, kind in self.types.items():
                # A partition that lacks a column passes on nulls.
                if name not in batch.schema.names:
                    batch = batch.append_column(name, pa.nulls(batch.num_rows, kind))
            yield self.pipe.predict_batch(batch, self.keep)

    def __call__(self, number: int) -> list[pa.RecordBatch]:
        return list(self.batches(number))


def predict_table(
    pipe: LTVPipeline, dataset: Dataset, *, engine: Engine | None = None, keep: Sequence[str] = ()
) -> pa.Table:
    """All predictions as one table, for results that fit in memory.

    Args:
        pipe: fitted pipeline.
        dataset: rows to predict.
        engine: where the work runs.
        keep: columns of the input to pass on.

    Raises:
        ValueError: there are no rows.
    """
    batches = [pa.Table.from_batches([batch]) for batch in pipe.predict(dataset, engine=engine, keep=keep)]
    if not batches:
        raise ValueError("dataset: got no rows, needs at least one to predict")
    return pa.concat_tables(batches, promote_options="permissive")


def _require_torch(model: str) -> None:
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise ImportError(f"model {model!r} needs the extra: pip install 'ltv-stack[torch]'") from error


def _write_json(path: Path, state: dict[str, Any]) -> None:
    path.write_text(json.dumps(state, default=float))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"folder: {path} is damaged ({error}); fit and save the model again") from error


def _read_part(path: Path, build: Callable[[dict[str, Any]], Part]) -> Part:
    try:
        return build(_read_json(path))
    except KeyError as error:
        raise ValueError(
            f"folder: {path} has no entry {error}, which format {FORMAT} needs; fit and save the model again"
        ) from error


def _version() -> str:
    try:
        return version("ltv-stack")
    except PackageNotFoundError:
        return "not installed"
