"""The entities of a generated log: apps and their taxonomy, places, devices, and how popular and how good each is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from synthlogs.draws import Choice, Tree, zipf
from synthlogs.text import hexadecimal

# Sizes of the published vocabularies; bundles beyond the advertised ones exist on the phones only.
CATEGORIES, SUBCATEGORIES, BOTTOMS, BUNDLES, ADVERTISERS = 21, 56, 82, 6000, 520
COUNTRIES, REGIONS, CARRIERS, CITIES, LANGUAGES = 205, 1128, 3920, 2400, 40
MAKES, MODELS, SYSTEMS, VERSIONS, RELEASES = 234, 5058, 2, 162, 173
ACTIONS, ADVERTISER_ACTIONS = 12, 58
FORMATS = ("b", "i", "r")
GENRES = ("Puzzle", "Casino", "Arcade", "Strategy", "Racing", "Sports", "Word", "Trivia", "Simulation", "Card", "Board")
KINDS = ("Bubble", "Match", "Merge", "Idle", "Tower", "Solitaire", "Bingo", "Farm", "Empire", "Runner", "Quiz", "Blast")


@dataclass(frozen=True)
class Catalogue:
    """Everything that is the same in every hour."""

    subcategory: Tree
    bottom: Tree
    bundle: Tree
    bundle_category: NDArray[np.int64]
    advertiser_bundle: NDArray[np.int64]
    advertiser_appeal: NDArray[np.float64]
    advertiser_value: NDArray[np.float64]
    advertiser_launch: NDArray[np.float64]
    country_effect: NDArray[np.float64]
    region: Tree
    carrier: Tree
    model: Tree
    model_by_price: NDArray[np.int64]
    model_price: NDArray[np.float64]
    model_release: NDArray[np.int64]
    make_system: NDArray[np.int64]
    version: Tree
    popularity: dict[str, Choice]
    names: dict[str, pa.Array]

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Catalogue:
        """Draw names, trees, prices and the effects of advertisers and countries."""
        subcategory = Tree.grow(CATEGORIES, SUBCATEGORIES, rng)
        bottom = Tree.grow(SUBCATEGORIES, BOTTOMS, rng)
        bundle = Tree.grow(BOTTOMS, BUNDLES, rng)
        bundle_category = subcategory.parent[bottom.parent[bundle.parent]]
        model = Tree.grow(MAKES, MODELS, rng)
        price = np.exp(5.6 + 0.5 * rng.normal(size=MAKES)[model.parent] + 0.45 * rng.normal(size=MODELS))
        launch = np.where(rng.random(ADVERTISERS) < 0.15, rng.random(ADVERTISERS), 0.0)
        # The most popular ones stand in for those not launched yet, so they are there from the start.
        launch[:20] = 0.0
        category_appeal = 0.35 * rng.normal(size=CATEGORIES)
        advertiser_bundle = rng.permutation(BUNDLES)[:ADVERTISERS]
        appeal = category_appeal[bundle_category[advertiser_bundle]] + 0.55 * rng.normal(size=ADVERTISERS)
        popularity = {
            "advertiser": _popularity(ADVERTISERS, 1.1),
            "bundle": _popularity(BUNDLES, 0.9),
            "country": _popularity(COUNTRIES, 1.2),
            "city": _popularity(CITIES, 1.0),
            "language": _popularity(LANGUAGES, 1.6),
            "action": _popularity(ACTIONS, 0.8),
            "advertiser_action": _popularity(ADVERTISER_ACTIONS, 0.8),
        }
        release = np.arange(RELEASES)
        names = {
            "category": _titles(CATEGORIES, GENRES, ("", "Games")),
            "subcategory": _titles(SUBCATEGORIES, GENRES, KINDS),
            "bottom": _titles(BOTTOMS, KINDS, GENRES),
            "bundle": pa.array([row.tobytes().decode() for row in hexadecimal(40, BUNDLES, rng)]),
            "country": _codes(COUNTRIES, 2),
            "region": _numbered("R", REGIONS),
            "carrier": _numbered("carrier-", CARRIERS),
            "city": _numbered("city-", CITIES),
            "language": _codes(LANGUAGES, 2, lower=True),
            "make": _numbered("make-", MAKES),
            "model": _numbered("model-", MODELS),
            "system": pa.array(["Android", "iOS"]),
            "version": pa.array([f"{i // 12 + 4}.{i % 12}" for i in range(VERSIONS)]),
            "release": pa.array([f"{2011 + m // 12}-{m % 12 + 1}" for m in release.tolist()]),
            "hour": pa.array([f"{h:02d}" for h in range(24)]),
            "format": pa.array(list(FORMATS)),
            "action": pa.array([f"action_{i}" for i in range(ACTIONS)]),
            "advertiser_action": pa.array([f"event_{i}" for i in range(ADVERTISER_ACTIONS)]),
        }
        return cls(
            subcategory=subcategory,
            bottom=bottom,
            bundle=bundle,
            bundle_category=bundle_category,
            advertiser_bundle=advertiser_bundle,
            advertiser_appeal=appeal,
            advertiser_value=0.5 * rng.normal(size=ADVERTISERS),
            advertiser_launch=launch,
            country_effect=0.45 * rng.normal(size=COUNTRIES),
            region=Tree.grow(COUNTRIES, REGIONS, rng),
            carrier=Tree.grow(COUNTRIES, CARRIERS, rng),
            model=model,
            model_by_price=np.argsort(price),
            model_price=price,
            model_release=rng.integers(0, RELEASES, MODELS),
            make_system=(rng.random(MAKES) < 0.3).astype(np.int64),
            version=Tree.grow(SYSTEMS, VERSIONS, rng),
            popularity=popularity,
            names=names,
        )


def _popularity(number: int, power: float) -> Choice:
    return Choice.among(zipf(np.arange(number), power, shift=3.0))


def _titles(number: int, first: tuple[str, ...], second: tuple[str, ...]) -> pa.Array:
    titles = [f"{a} {b}".strip() for b in second for a in first]
    assert len(titles) >= number
    return pa.array(titles[:number])


def _numbered(prefix: str, number: int) -> pa.Array:
    return pa.array([f"{prefix}{i}" for i in range(number)])


def _codes(number: int, letters: int, lower: bool = False) -> pa.Array:
    start = ord("a" if lower else "A")
    return pa.array(["".join(chr(start + i // 26**k % 26) for k in reversed(range(letters))) for i in range(number)])
