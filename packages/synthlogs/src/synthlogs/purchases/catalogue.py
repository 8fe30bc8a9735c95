"""What the generated shop of many categories sells: departments, categories, brands, products, prices and discounts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from synthlogs.draws import Choice, children, rank_within, zipf
from synthlogs.settings import PurchasesConfig

DAY = 86400
TASTES = 8
DEPARTMENTS = {
    "electronics": "smartphone clocks audio.headphone video.tv tablet telephone camera.photo audio.subwoofer",
    "appliances": "kitchen.washer kitchen.kettle environment.vacuum iron kitchen.oven sewing_machine kitchen.blender",
    "computers": "notebook desktop peripherals.mouse peripherals.keyboard components.memory network.router",
    "apparel": "shoes shoes.keds shirt trousers dress jacket underwear scarf",
    "furniture": "bedroom.bed kitchen.chair living_room.sofa living_room.cabinet bathroom.bath universal.light",
    "construction": "tools.drill tools.saw tools.light tools.pump tools.welding components.faucet",
    "kids": "toys carriage dolls swing skates bottles",
    "auto": "accessories.player accessories.alarm accessories.compressor accessories.videoregister tyres",
    "sport": "bicycle trainer ski tennis tent snowboard",
    "accessories": "bag wallet umbrella jewelry sunglasses",
    "stationery": "cartridge paper stapler pens",
    "medicine": "tools.tonometer thermometer massager",
    "country_yard": "cultivator lawn_mower watering furniture.bench",
}
SYLLABLES = ("ka", "lo", "mi", "ra", "ten", "vo", "su", "el", "dar", "ni", "po", "zen")


@dataclass(frozen=True)
class Catalogue:
    """Everything that is drawn once; products of a category and categories of a department are contiguous."""

    department: NDArray[np.int64]
    category_id: NDArray[np.int64]
    category_code: pa.Array
    complement: NDArray[np.int64]
    any_category: Choice
    category_of_department: Choice
    product_id: NDArray[np.int32]
    category: NDArray[np.int64]
    first_product: NDArray[np.int64]
    product_of_category: Choice
    popularity: NDArray[np.float64]
    brand: NDArray[np.int64]
    brand_names: pa.Array
    style: NDArray[np.float32]
    price: NDArray[np.float64]
    relative_price: NDArray[np.float64]
    quality: NDArray[np.float64]
    launch: NDArray[np.int64]
    discount: NDArray[np.float64]

    @classmethod
    def draw(cls, config: PurchasesConfig, rng: np.random.Generator) -> Catalogue:
        """Draw `config.products` products in about a sixtieth as many categories."""
        products, departments = config.products, len(DEPARTMENTS)
        categories = max(2 * departments, products // 60)
        department = children(departments, categories, rng)
        weight = rng.permutation(zipf(np.arange(categories), 1.1))
        category = children(categories, products, rng, weight=weight**0.5)
        popularity = zipf(rank_within(category), 1.0)
        brand, brand_vector = _brands(department[category], departments, products, rng)
        dear = rng.normal(size=products) * 0.5 + 0.3 * rng.normal(size=brand.max() + 1)[brand]
        # The first product of every category is there from the start, so that there always is something to look at.
        new = (rng.random(products) < config.new_share) & (rank_within(category) > 0)
        sale = rng.random((products, config.days // 7 + 1)) < 0.08
        centre = rng.normal(4.2, 1.0, categories)[category]
        return cls(
            department=department,
            category_id=2_053_013_550_000_000_000 + np.sort(rng.choice(10**10, categories, replace=False)),
            category_code=_codes(department, weight),
            complement=_complements(department, rng),
            any_category=Choice.among(weight),
            category_of_department=Choice.within(department, departments, weight),
            product_id=(1_000_000 + rng.permutation(2 * products)[:products]).astype(np.int32),
            category=category,
            first_product=np.searchsorted(category, np.arange(categories)),
            product_of_category=Choice.within(category, categories, popularity),
            popularity=popularity,
            brand=np.where(rng.random(products) < 0.15, -1, brand),
            brand_names=_names(brand.max() + 1),
            style=(brand_vector[brand] + 0.25 * rng.normal(size=(products, TASTES))).astype(np.float32),
            price=np.round(np.exp(centre + dear), 2).clip(0.5),
            relative_price=dear / 0.6,
            quality=rng.normal(size=products),
            launch=np.where(new, rng.integers(0, config.days, products), 0),
            discount=np.where(sale, rng.choice([0.1, 0.2, 0.3], sale.shape), 0.0),
        )

    def cut(self, product: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the discount, a share of the price, of each product [n] `second` [n] seconds after the start."""
        return self.discount[product, second // (7 * DAY)]

    def paid(self, product: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return what each product [n] costs `second` [n] seconds after the start."""
        return np.round(self.price[product] * (1 - self.cut(product, second)), 2)


def _brands(
    department: NDArray[np.int64], departments: int, products: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """A brand for every product, from those of its department, and the brands' vectors of length about one."""
    brands = max(3 * departments, products // 15)
    home = children(departments, brands, rng)
    brand = Choice.within(home, departments, zipf(rank_within(home), 1.1))(department, rng)
    return brand, rng.normal(size=(brands, TASTES)) / np.sqrt(TASTES)


def _complements(department: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Each category's complement is the next on a ring through its department; one alone complements itself."""
    complement = np.empty(len(department), np.int64)
    for one in np.unique(department):
        ring = rng.permutation(np.flatnonzero(department == one))
        complement[ring] = np.roll(ring, -1)
    return complement


def _codes(department: NDArray[np.int64], weight: NDArray[np.float64]) -> pa.Array:
    """Categories may share a code; those that are asked for least, a third of all that is asked, have none."""
    rank, asked = rank_within(department), np.sort(weight)
    named = weight > asked[np.searchsorted(np.cumsum(asked), 0.33 * asked.sum())]
    things = [kinds.split() for kinds in DEPARTMENTS.values()]
    names = list(DEPARTMENTS)
    codes = [f"{names[d]}.{things[d][r % len(things[d])]}" for d, r in zip(department, rank, strict=True)]
    return pa.array(codes, mask=~named)


def _names(number: int) -> pa.Array:
    base = len(SYLLABLES)
    return pa.array(["".join(SYLLABLES[i // base**k % base] for k in range(4)) for i in range(number)])
