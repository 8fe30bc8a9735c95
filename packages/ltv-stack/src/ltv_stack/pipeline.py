"""The pipeline: fit on a stream, predict on a stream, every output in order over horizons."""

import json
import logging
import shutil
import tempfile
import time as clock
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import lightgbm as lgb
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from . import stages
from .cache import FeatureCache, Ints, build_cache
from .config import DEEP, LTVConfig, embargo_seconds
from .data import Dataset, drawn, row_hashes
from .drift import Reference
from .engine import Engine, LocalEngine
from .features import FeatureBuilder, Matrix, as_text, check_types
from .guard import audit, refuse
from .metrics import buyer_metrics
from .nested import Floats
from .outputs import FEWEST_HELD_OUT_BUYERS, Outputs, converts
from .sampling import Histogram, histos, histos_weights, histus, histus_weights, undo_weights
from .schema import Horizon, Schema
from .stack import Stack, meta_features
from .stages import Boosted

log = logging.getLogger(__name__)

Part = TypeVar("Part")

# Of a saved pipeline; rises with every change that an older reader or an older folder cannot follow.
FORMAT = 3
_FEWEST_BUYERS = 10
_STOPPING_ROWS = 50_000


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
        self.builder = FeatureBuilder(schema, self.config.features, seed=self.config.seed)
        self.horizons: list[str] = []
        self.skipped_horizons: dict[str, str] = {}
        self.main = ""
        self.report_: dict[str, Any] = {}
        self.class_weights = (1.0, 1.0)
        self.classifier = Boosted({})
        self.amounts = Boosted({})
        self.points = Boosted({})
        self.stack: Stack | None = None
        self.deep: Any = None
        self.outputs = Outputs(self.config, [], "")
        self.reference: Reference | None = None
        self._stop_on: tuple[Ints, Matrix] | None = None
        self._trees: dict[str, int] = {}

    @property
    def fitted(self) -> bool:
        """Whether `fit` or `load` has run."""
        return bool(self.horizons)

    @property
    def output_columns(self) -> list[str]:
        """Names of the predicted columns, without the id."""
        return self.outputs.columns

    def fit(self, dataset: Dataset, *, engine: Engine | None = None) -> "LTVPipeline":
        """Learn from a dataset of rows with labels.

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
            self.horizons = []
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
        """Raise ValueError where a dataset cannot be predicted: a column's type in a file, or no column to segment by.

        A partition may lack the column that calibration is split by; its rows are of no known segment.
        """
        self._require_fitted()
        self.builder.check(dataset)
        by = self.config.calibrate_by
        if by and by not in dataset.column_names:
            raise ValueError(f"calibrate_by: the data has no column {by!r}")

    def predict_batch(self, batch: pa.RecordBatch, keep: Sequence[str] = ()) -> pa.RecordBatch:
        """Predictions of one record batch."""
        self._require_fitted()
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
        columns = self.outputs.apply(self._raw(self.builder.transform(batch)), segment)
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

        Returns:
            feature names and the constant's name "(base)", and contributions [N, F + 1] that sum to the raw score.
        """
        self._require_fitted()
        booster = self._explained(horizon)
        contributions = booster.predict(self.builder.transform(batch), pred_contrib=True)
        return [*self.builder.names, "(base)"], np.asarray(contributions, dtype=np.float64)

    def importance(self, dataset: Dataset | None = None, rows: int = 2000) -> pd.DataFrame:
        """Gain of every feature in every model and, with data, its mean absolute SHAP value over the first rows."""
        self._require_fitted()
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
            booster = self._explained(horizon)
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
        """How far each feature of a dataset lies from the training rows: PSI, Kolmogorov-Smirnov distance, means."""
        self._require_fitted()
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
        """Write the fitted pipeline as text files and JSON (no pickles); an existing folder is replaced as a whole."""
        self._require_fitted()
        folder = Path(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            self.classifier.save(temporary, "buyer_classifier")
            self.amounts.save(temporary, "revenue")
            if self.points.boosters:
                self.points.save(temporary, self.config.model)
            if self.stack:
                self.stack.save(temporary / "stack")
            if self.deep is not None:
                self.deep.save(temporary / "deep.pt")
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
                "class_weights": list(self.class_weights),
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
        pipe.class_weights = (state["class_weights"][0], state["class_weights"][1])
        threads = pipe.config.num_threads
        pipe.classifier = Boosted.load(folder, "buyer_classifier", [""], threads)
        pipe.amounts = Boosted.load(folder, "revenue", pipe.horizons, threads)
        if pipe.config.model in ("log1p", "tweedie"):
            pipe.points = Boosted.load(folder, pipe.config.model, pipe.horizons, threads)
        if pipe.config.model == "stack":
            pipe.stack = Stack.load(folder / "stack", threads)
        if pipe.config.model in DEEP:
            from .deep import DeepModel

            pipe.deep = DeepModel.load(folder / "deep.pt")
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
            dataset, self.schema, self.config.features, seed=self.config.seed, num_threads=self.config.num_threads
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
        wanted = [h for h in self.schema.horizons if h.name in self.horizons]
        columns = [h.revenue for h in wanted if h.revenue]
        columns += [h.buyer for h in wanted if h.buyer and h.buyer in dataset.column_names]
        cache = build_cache(
            self.builder,
            dataset,
            folder,
            label_columns=columns,
            segment=self.config.calibrate_by,
            sample_rows=self.config.sample_rows,
            seed=self.config.seed,
            engine=engine,
        )
        for name in columns:
            labels = cache.labels[name]
            negative = int((labels < 0).sum())
            if negative:
                log.warning("%s: %d negative amounts of %d count as 0", name, negative, len(labels))
            self.report_[f"negative_{name}"] = negative
            cache.labels[name] = np.where(np.isfinite(labels), np.maximum(labels, 0.0), np.nan)
        amounts = np.column_stack([cache.labels[h.revenue] for h in wanted if h.revenue])
        with np.errstate(invalid="ignore"):
            unordered = int((np.diff(amounts, axis=1) < -1e-9).any(axis=1).sum()) if amounts.shape[1] > 1 else 0
        self.report_["label_rows_out_of_order"] = unordered
        if unordered:
            log.warning("%d of %d rows have less revenue at a later horizon", unordered, len(amounts))
        return cache

    def _horizon(self, name: str) -> Horizon:
        return next(h for h in self.schema.horizons if h.name == name)

    def _revenue(self, cache: FeatureCache, name: str) -> Floats:
        column = self._horizon(name).revenue
        assert column is not None
        return cache.labels[column]

    def _buyers(self, cache: FeatureCache) -> Floats:
        """1.0 for buyers at the main horizon, NaN where unknown."""
        horizon = self._horizon(self.main)
        flag = cache.labels.get(horizon.buyer) if horizon.buyer else None
        label = self._revenue(cache, self.main) if flag is None else flag
        return np.where(np.isnan(label), np.nan, (label > 0).astype(np.float64))

    def _fit(self, cache: FeatureCache, started: float) -> None:
        config = self.config
        self.main = self._main_horizon()
        train, held_out = self._split(cache)
        for name in list(self.horizons):
            bought = self._revenue(cache, name) > 0
            positive, kept = int(bought[train].sum()), int(bought[held_out].sum())
            if config.split == "cross_fit":
                positive -= max(int(bought[own].sum()) for own in self._folds(cache, train))
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
        self.main = self._main_horizon()
        log.info("training on %d rows, calibrating on %d", len(train), len(held_out))
        self._trees = {}
        if config.split == "cross_fit":
            scores = self._cross_fit(cache, train, started)
        else:
            self._fit_models(cache, train, self._stopping_rows(cache, held_out), started)
            scores = self._score(cache, held_out)
        self.reference = Reference.fit(cache.sample_matrix)
        rates = {name: float((np.nan_to_num(self._revenue(cache, name)[train]) > 0).mean()) for name in self.horizons}
        main = float((np.nan_to_num(self._buyers(cache)[train]) > 0).mean())
        self._calibrate(cache, held_out, scores, {name: rate / main for name, rate in rates.items()})
        self._time("calibration", started)

    def _main_horizon(self) -> str:
        name = self.config.main_horizon or ("d7" if "d7" in self.horizons else self.horizons[-1])
        if name not in self.horizons:
            raise ValueError(f"main_horizon: got {name!r}, needs one of {self.horizons}")
        return name

    def _fit_models(self, cache: FeatureCache, train: Ints, stopping_rows: Ints, started: float) -> None:
        """Every model on these rows; `stopping_rows` tell boosting when to stop, unless the trees are counted."""
        config = self.config
        settings, rounds = stages.parameters(
            stages.CLASSIFIER, dict(config.classifier), config.seed, config.num_threads
        )
        data = cache.dataset(train, settings)
        if config.early_stopping is not None and not self._trees:
            self._stop_on = stopping_rows, cache.take(stopping_rows)
        self._fit_classifier(cache, data, train, settings, rounds)
        self._time("classifier", started)
        self._fit_amounts(cache, train)
        self._time("amounts", started)
        if config.model in ("log1p", "tweedie"):
            self._fit_points(cache, data, train)
        elif config.model == "stack":
            self._fit_stack(cache, data, train, settings)
        elif config.model in DEEP:
            self._fit_deep(cache, train)
        self._stop_on = None
        self._time("model", started)

    def _cross_fit(self, cache: FeatureCache, rows: Ints, started: float) -> dict[str, Floats]:
        """Scores of every row by models that never saw its stretch of time; then the models of all rows.

        These grow as many trees as were right on average for the rows left out.
        """
        time, gap = cache.time[rows], embargo_seconds(self.config.embargo)
        scores: dict[str, Floats] = {}
        grown: dict[str, list[int]] = {}
        for own in self._folds(cache, rows):
            first, last = cache.time[own].min(), cache.time[own].max()
            near = (time > first - gap) & (time < last + gap) if gap else np.zeros(len(rows), dtype=bool)
            outside = rows[~(near | np.isin(rows, own))]
            if not len(outside):
                raise ValueError(f"embargo: {self.config.embargo} leaves no rows beside a fold of {len(own)} rows")
            self._fit_models(cache, outside, self._stopping_rows(cache, own), started)
            at = np.searchsorted(rows, own)
            for key, column in self._score(cache, own).items():
                scores.setdefault(key, np.empty(len(rows)))[at] = column
            for key, booster in self._boosters().items():
                grown.setdefault(key, []).append(stages.trees_of(booster))
        self._trees = {key: max(1, round(float(np.mean(counts)))) for key, counts in grown.items()}
        self._fit_models(cache, rows, np.empty(0, np.int64), started)
        return scores

    def _folds(self, cache: FeatureCache, rows: Ints) -> list[Ints]:
        fold = stages.blocked_folds(cache.time[rows], self.config.folds)
        return [rows[fold == f] for f in range(self.config.folds)]

    def _boosters(self) -> dict[str, lgb.Booster]:
        groups = {"buyer": self.classifier, "amount": self.amounts, "point": self.points}
        return {f"{group}:{name}": one for group, held in groups.items() for name, one in held.boosters.items()}

    def _split(self, cache: FeatureCache) -> tuple[Ints, Ints]:
        """Training and held-out rows, ascending."""
        config = self.config
        rows = np.arange(cache.rows)
        if config.split == "stratified_random":
            log.warning("held-out rows are drawn at random: what is learnt on them does not see the passing of time")
            flag = np.nan_to_num(self._buyers(cache))
            held = np.zeros(cache.rows, dtype=bool)
            for value in (0.0, 1.0):
                own = rows[flag == value]
                held[own[np.argsort(cache.hashes[own], kind="stable")[: round(len(own) * config.calibration_frac)]]] = (
                    True
                )
            train, held_out = rows[~held], rows[held]
        elif config.split == "cross_fit":
            train = held_out = rows
        else:
            train, held_out = self._split_by_time(cache)
        if config.max_rows is not None and len(train) > config.max_rows:
            log.warning("max_rows: %d of %d training rows are used", config.max_rows, len(train))
            self.report_["rows_over_the_cap"] = len(train) - config.max_rows
            train = np.sort(train[np.argsort(cache.hashes[train], kind="stable")[: config.max_rows]])
            held_out = train if config.split == "cross_fit" else held_out
        self.report_ |= {"training_rows": len(train), "held_out_rows": len(held_out)}
        if len(train) == 0 or len(held_out) == 0:
            raise ValueError(
                f"dataset: {cache.rows} rows leave {len(train)} for training and {len(held_out)} for calibration; "
                "give more rows, or a smaller embargo"
            )
        return train, held_out

    def _split_by_time(self, cache: FeatureCache) -> tuple[Ints, Ints]:
        frac, gap = self.config.calibration_frac, embargo_seconds(self.config.embargo)
        ordered = np.sort(cache.time)
        cut = float(ordered[min(int(len(ordered) * (1 - frac)), len(ordered) - 1)])
        held = cache.time >= cut
        if cut > ordered[0] and held.mean() <= max(0.4, 2 * frac):
            before = cache.time < cut - gap
            if gap:
                self.report_["rows_in_embargo"] = int((~held & ~before).sum())
            return np.flatnonzero(before), np.flatnonzero(held)
        log.info("too few distinct times to hold out the newest %.0f %%: the last rows are held out", 100 * frac)
        order = np.argsort(cache.time, kind="stable")
        first = max(1, int(len(order) * (1 - frac)))
        return np.sort(order[:first]), np.sort(order[first:])

    def _stopping_rows(self, cache: FeatureCache, held_out: Ints) -> Ints:
        """Held-out rows that tell boosting when to stop."""
        return np.sort(held_out[np.argsort(cache.hashes[held_out], kind="stable")[:_STOPPING_ROWS]])

    def _stopping(self, target: Floats) -> stages.Stopping | None:
        if self.config.early_stopping is None or self._stop_on is None:
            return None
        rows, matrix = self._stop_on
        known = np.isfinite(target[rows])
        return stages.Stopping(matrix[known], target[rows[known]], self.config.early_stopping)

    def _fit_classifier(
        self, cache: FeatureCache, data: lgb.Dataset, train: Ints, settings: dict[str, Any], rounds: int
    ) -> None:
        buyer = self._buyers(cache)[train]
        known = np.isfinite(buyer)
        self.report_ |= {"buyers": int(np.nansum(buyer)), "main_horizon": self.main}
        if not 0 < np.nansum(buyer) < known.sum():
            raise ValueError(
                f"dataset: {int(np.nansum(buyer))} of {int(known.sum())} training rows bought by {self.main}; "
                "a buyer classifier needs both kinds: widen the window or raise the sample"
            )
        weight = self._classifier_weight(cache, train) * known
        self.class_weights = (float(weight[buyer == 1].mean()), float(weight[buyer == 0].mean()))
        label = np.nan_to_num(buyer)
        resampled = "histos" in self.config.sampling
        stopping = None if resampled else self._stopping(self._buyers(cache))
        rounds = self._trees.get("buyer:", rounds)
        self.classifier = Boosted(
            {"": stages.train_on(data, label, settings, rounds, _none_if_one(weight), stopping)},
            self.config.num_threads,
        )

    def _classifier_weight(self, cache: FeatureCache, rows: Ints) -> Floats:
        """How often each row is trained on: the multiplicities of HistOS on the amount, drawn or expected."""
        amount = np.nan_to_num(self._revenue(cache, self.main)[rows])
        parts = self.config.sampling.split("+")
        settings = _with_histogram(self.config.histos, amount)
        if "histos" in parts:
            drawn_rows = histos(amount, seed=self.config.seed, **settings)
            return np.bincount(drawn_rows, minlength=len(rows)).astype(np.float64)
        if "histos_weights" in parts:
            return histos_weights(amount, **settings)
        return np.ones(len(rows))

    def _fit_amounts(self, cache: FeatureCache, train: Ints) -> None:
        boosters = {}
        for name in self.horizons:
            y = self._revenue(cache, name)
            stopping = None if "histus" in self.config.sampling else self._stopping(_log_of_buyers(y))
            trees = self._trees.get(f"amount:{name}")
            boosters[name] = self._amount_booster(cache, train[y[train] > 0], y, trees=trees, stopping=stopping)
        self.amounts = Boosted(boosters, self.config.num_threads)

    def _amount_booster(
        self,
        cache: FeatureCache,
        rows: Ints,
        y: Floats,
        *,
        trees: int | None = None,
        stopping: stages.Stopping | None = None,
    ) -> lgb.Booster:
        settings, rounds = stages.parameters(
            stages.REGRESSOR, dict(self.config.regressor), self.config.seed, self.config.num_threads
        )
        parts = self.config.sampling.split("+")
        weight = None
        if "histus" in parts:
            rows = rows[histus(y[rows], seed=self.config.seed, **_with_histogram(self.config.histus, y[rows]))]
        elif "histus_weights" in parts:
            weight = histus_weights(y[rows], **_with_histogram(self.config.histus, y[rows]))
        matrix = cache.take(rows)
        return stages.train_in_memory(
            matrix, np.log1p(y[rows]), cache.names, cache.categorical, settings, trees or rounds, weight, stopping
        )

    def _fit_points(self, cache: FeatureCache, data: lgb.Dataset, train: Ints) -> None:
        base = dict(stages.REGRESSOR)
        if self.config.model == "tweedie":
            base |= {"objective": "tweedie", "tweedie_variance_power": 1.5}
        settings, rounds = stages.parameters(
            base, dict(self.config.regressor), self.config.seed, self.config.num_threads
        )
        classifier = {**stages.CLASSIFIER, **self.config.classifier}
        if any(settings.get(key) != classifier.get(key) for key in stages.BINNING):
            data = cache.dataset(train, settings)
        boosters = {}
        for name in self.horizons:
            y = self._revenue(cache, name)
            target = np.log1p(y) if self.config.model == "log1p" else y
            weight = _none_if_one(np.isfinite(y[train]) * 1.0)
            stopping = self._stopping(target)
            trees = self._trees.get(f"point:{name}", rounds)
            boosters[name] = stages.train_on(data, np.nan_to_num(target[train]), settings, trees, weight, stopping)
        self.points = Boosted(boosters, self.config.num_threads)

    def _fit_stack(self, cache: FeatureCache, data: lgb.Dataset, train: Ints, settings: dict[str, Any]) -> None:
        """Every meta-feature of a row comes from models that were fitted without its fold."""
        config = self.config
        stack = Stack(config.stack_bases, dict(config.meta), config.seed, config.num_threads)
        chosen = np.arange(len(train))
        if len(train) > config.stack_rows:
            log.info("stack_rows: the stack is trained on %d of %d rows", config.stack_rows, len(train))
            chosen = np.sort(np.argsort(cache.hashes[train], kind="stable")[: config.stack_rows])
        features, fold = self.out_of_fold(cache, data, train, chosen, settings)
        targets = {name: np.log1p(self._revenue(cache, name)[train[chosen]]) for name in self.horizons}
        self.stack = stack.fit(features, targets, fold)

    def out_of_fold(
        self,
        cache: FeatureCache,
        data: lgb.Dataset,
        train: Ints,
        chosen: Ints,
        settings: dict[str, Any],
    ) -> tuple[Floats, npt.NDArray[np.int64]]:
        """Meta-features of chosen training rows by models fitted without their fold, and the folds."""
        fold = stages.blocked_folds(cache.time[train], self.config.folds)
        buyer = np.nan_to_num(self._buyers(cache)[train])
        known = np.isfinite(self._buyers(cache)[train])
        weight = self._classifier_weight(cache, train) * known
        p = np.empty(len(chosen))
        g = {name: np.empty(len(chosen)) for name in self.horizons}
        for f in range(self.config.folds):
            outside, own = np.flatnonzero(fold != f), np.flatnonzero(fold[chosen] == f)
            part = data.subset(outside.tolist()).construct()
            # As many trees as the full model kept: held-out rows choose them, the fold's own rows never do.
            trees = stages.trees_of(self.classifier.boosters[""])
            booster = stages.train_on(part, buyer[outside], settings, trees, _none_if_one(weight[outside]))
            models: dict[str, tuple[Boosted, str]] = {"p": (Boosted({"": booster}, self.config.num_threads), "")}
            for name in self.horizons:
                y = self._revenue(cache, name)
                rows = train[outside]
                trees = stages.trees_of(self.amounts.boosters[name])
                amount = self._amount_booster(cache, rows[y[rows] > 0], y, trees=trees)
                models[name] = (Boosted({"": amount}, self.config.num_threads), "")
            found = stages.predict_rows(cache, train[chosen[own]], models)
            p[own] = undo_weights(found["p"], *self.class_weights)
            for name in self.horizons:
                g[name][own] = np.maximum(found[name], 0.0)
        return meta_features(p, g, self._blend()), fold[chosen]

    def _blend(self) -> dict[str, float]:
        return {name: 2.0 if name == self.main else 1.0 for name in self.horizons}

    def _fit_deep(self, cache: FeatureCache, train: Ints) -> None:
        from .deep import DeepModel

        targets = {name: self._revenue(cache, name) for name in self.horizons}
        self.deep = DeepModel(
            self.config.model,
            cache.names,
            {name: len(self.builder.vocabularies[name[: -len("__code")]].values) + 2 for name in cache.categorical},
            self.horizons,
            seed=self.config.seed,
            **dict(self.config.deep),
        ).fit(cache, train, targets)

    def _score(self, cache: FeatureCache, rows: Ints) -> dict[str, Floats]:
        """What the models say of these rows, ascending."""
        parts: dict[str, list[Floats]] = {}
        for shard, matrix in cache.matrices():
            first, last = np.searchsorted(rows, [shard.start, shard.start + shard.rows])
            if last > first:
                for key, column in self._raw(matrix[rows[first:last] - shard.start]).items():
                    parts.setdefault(key, []).append(column)
        return {key: np.concatenate(columns) for key, columns in parts.items()}

    def _calibrate(self, cache: FeatureCache, rows: Ints, scores: dict[str, Floats], rates: dict[str, float]) -> None:
        """Learn what `Outputs` needs on held-out rows, scored by models that were not fitted on them."""
        buyer = self._buyers(cache)[rows]
        known = np.isfinite(buyer)
        self.report_["held_out_buyer"] = buyer_metrics(buyer[known], scores["p"][known]) if known.any() else {}
        labels = {name: self._revenue(cache, name)[rows] for name in self.horizons}
        segment = None if cache.segment is None else cache.segment[rows]
        self.outputs = Outputs(self.config, self.horizons, self.main, rates)
        self.outputs.fit(scores, labels, segment)

    def _raw(self, matrix: Matrix) -> dict[str, Floats]:
        """What the models say of rows: p, g_<h> and s_<h>."""
        scores = {"p": undo_weights(self.classifier.predict(matrix), *self.class_weights)}
        for name in self.horizons:
            scores[f"g_{name}"] = np.maximum(self.amounts.predict(matrix, name), 0.0)
        if self.points.boosters:
            for name in self.horizons:
                scores[f"s_{name}"] = np.maximum(self.points.predict(matrix, name), 0.0)
        elif self.stack:
            amounts = {name: scores[f"g_{name}"] for name in self.horizons}
            features = meta_features(scores["p"], amounts, self._blend())
            for name in self.horizons:
                scores[f"s_{name}"] = np.maximum(self.stack.predict(features, name), 0.0)
        elif self.deep is not None:
            for name, column in self.deep.predict(matrix).items():
                scores[f"s_{name}"] = column
        return scores

    def _explained(self, horizon: str | None) -> lgb.Booster:
        if horizon is None:
            return self.classifier.boosters[""]
        if horizon not in self.horizons:
            raise ValueError(f"horizon: got {horizon!r}, needs one of {self.horizons}, or None for the classifier")
        return (self.points.boosters or self.amounts.boosters)[horizon]

    def _require_fitted(self) -> None:
        if not self.fitted:
            raise ValueError("LTVPipeline is not fitted: call fit(dataset) or LTVPipeline.load(folder) first")

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
    """All predictions as one table, for results that fit in memory."""
    batches = [pa.Table.from_batches([batch]) for batch in pipe.predict(dataset, engine=engine, keep=keep)]
    if not batches:
        raise ValueError("dataset: got no rows, needs at least one to predict")
    return pa.concat_tables(batches, promote_options="permissive")


def _require_torch(model: str) -> None:
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise ImportError(f"model {model!r} needs the extra: pip install 'ltv-stack[torch]'") from error


def _with_histogram(settings: Mapping[str, Any], y: Floats) -> dict[str, Any]:
    """Arguments of the samplers; bins and beta, where given, are those of a histogram of their own."""
    shape = {name: value for name, value in settings.items() if name in ("bins", "beta")}
    rest = {name: value for name, value in settings.items() if name not in shape}
    return rest | ({"histogram": Histogram(**shape).fit(y)} if shape else {})


def _log_of_buyers(y: Floats) -> Floats:
    return np.where(np.nan_to_num(y) > 0, np.log1p(y), np.nan)


def _none_if_one(weight: Floats) -> Floats | None:
    return None if (weight == 1.0).all() else weight


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
