"""Size, seed and strength of each generated log, in dataclasses that the command line and Python callers share.

Nothing heavy is imported here, so that a program may read its settings before it loads numpy.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime


@dataclass
class ShopConfig:
    """Size and seed of a shop's log in the RecSys Challenge 2025 layout.

    Args:
        clients: number of clients in the log
        relevant_share: share of the clients that are asked for, i.e. embedded and scored
        days: length of the log in days; the last 27-28 of them are the two label windows
        end: last second of the log, UTC
        target_categories: number of categories in target/propensity_category.npy
        target_skus: number of skus in target/propensity_sku.npy
        target_new_skus: number of skus in target/propensity_new_sku.npy, none of which is seen before train_start
        log_seed: seed of everything drawn
    """

    clients: int = 200_000
    relevant_share: float = 0.0535
    days: int = 160
    end: str = "2022-11-09 23:59:59"
    target_categories: int = 100
    target_skus: int = 100
    target_new_skus: int = 20
    log_seed: int = 0

    def check(self) -> None:
        """Raise ValueError for a log without clients, history or targets."""
        _at_least(self, clients=100, target_categories=2, target_skus=2, target_new_skus=2, log_seed=0)
        if not self.days >= 60:
            raise ValueError(f"days: got {self.days}, needs at least 60 (28 of them are label windows)")
        if not 0 < self.relevant_share <= 1:
            raise ValueError(f"relevant_share: got {self.relevant_share}, needs a share in (0, 1]")
        try:
            datetime.fromisoformat(self.end + "+00:00")
        except ValueError:
            raise ValueError(f"end: got {self.end!r}, needs a time in UTC as YYYY-MM-DD HH:MM:SS") from None


@dataclass
class AdsConfig:
    """Size, drift and seed of an advertising log of 84 columns in hourly partitions.

    Args:
        rows: rows of the train split, all hours together
        hours: hourly partitions of the train split
        start: first hour, as YYYY-MM-DD-HH-MM
        test_rows: rows of the test split
        test_hours: hourly partitions of the test split
        gap_hours: hours between the last train hour and the first test hour
        buyer_rate: share of rows that buy within 7 days, without drift
        drift: 0 = the same population all the time, 1 = the whole drift of the planted law by the end of the test split
        seed: seed of everything drawn
    """

    rows: int = 200_000
    hours: int = 144
    start: str = "2025-10-01-00-00"
    test_rows: int = 50_000
    test_hours: int = 96
    gap_hours: int = 24
    buyer_rate: float = 0.033
    drift: float = 0.0
    seed: int = 0

    def check(self) -> None:
        """Raise ValueError for a log that cannot be drawn."""
        if self.rows < self.hours or self.hours < 1:
            raise ValueError(f"rows, hours: got {self.rows} rows in {self.hours} hours, needs at least a row an hour")
        if self.test_hours < 0 or self.test_rows < self.test_hours:
            raise ValueError(
                f"test_rows, test_hours: got {self.test_rows} rows in {self.test_hours} hours, needs a row an hour"
            )
        _at_least(self, gap_hours=0, seed=0)
        if not 0 < self.buyer_rate < 0.5:
            raise ValueError(f"buyer_rate: got {self.buyer_rate}, needs a share in (0, 0.5)")
        if not 0 <= self.drift <= 1:
            raise ValueError(f"drift: got {self.drift}, needs a number in [0, 1]")
        try:
            datetime.strptime(self.start, "%Y-%m-%d-%H-%M")
        except ValueError:
            raise ValueError(f"start: got {self.start!r}, needs YYYY-MM-DD-HH-MM, e.g. 2025-10-01-00-00") from None


@dataclass
class PurchasesConfig:
    """Size, rarity of purchases and seed of a log in the REES46 layout.

    Args:
        rows: about how many events the log has; 8 million take minutes
        products: number of products
        days: length of the log in days
        start: first day, as YYYY-MM-DD, UTC
        ratio: views for every purchase; 60 as in the published log, 4000 for hardly any
        new_share: share of the products that are launched while the log runs
        seed: seed of everything drawn
    """

    rows: int = 8_000_000
    products: int = 30_000
    days: int = 121
    start: str = "2019-11-01"
    ratio: float = 60.0
    new_share: float = 0.2
    seed: int = 0

    def check(self) -> None:
        """Raise ValueError for a log that cannot be drawn."""
        _at_least(self, rows=1000, products=100, days=1, seed=0)
        if not 10 <= self.ratio <= 1e6:
            raise ValueError(f"ratio: got {self.ratio}, needs 10 to 1,000,000 views for every purchase")
        if not 0 <= self.new_share < 1:
            raise ValueError(f"new_share: got {self.new_share}, needs a share in [0, 1)")
        _day("start", self.start)


@dataclass
class BasketsConfig:
    """Size, promotions and seed of a grocer's log in the LGSR layout.

    Args:
        customers: customers with a card; others shop without one
        weeks: fiscal weeks from 200607 (10 April 2006) on
        products: number of products
        stores: number of stores
        promo: share of the weeks in which a product is on promotion
        anonymous: share of the shoppers who have no card: their CUST_CODE is null
        weighed: share of the products that are weighed: their price at the till varies with the weight
        seed: seed of everything drawn
    """

    customers: int = 5000
    weeks: int = 117
    products: int = 5000
    stores: int = 760
    promo: float = 0.08
    anonymous: float = 0.195
    weighed: float = 0.058
    seed: int = 0

    def check(self) -> None:
        """Raise ValueError for a log that cannot be drawn."""
        _at_least(self, customers=10, weeks=1, products=100, stores=1, seed=0)
        for name, most in (("promo", 0.3), ("anonymous", 0.9), ("weighed", 1.0)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name}: got {getattr(self, name)}, needs a share in [0, {most}]")


@dataclass
class FriendsConfig:
    """Size and seed of a social network's event log.

    Args:
        users: number of users; a million take minutes
        days: length of the log in days
        start: first day, as YYYY-MM-DD, UTC
        requests: people a user thinks of asking who is there all the time, on average; nobody is asked twice
        community_size: users in a community, on average; sizes have a heavy tail
        seed: seed of everything drawn
    """

    users: int = 20_000
    days: int = 180
    start: str = "2024-01-01"
    requests: float = 15.0
    community_size: int = 150
    seed: int = 0

    def check(self) -> None:
        """Raise ValueError for a log that cannot be drawn."""
        _at_least(self, users=100, days=1, community_size=5, seed=0)
        if self.users > 2**31 - 1 or self.community_size > self.users:
            raise ValueError(
                f"users, community_size: got {self.users} users in communities of {self.community_size}, needs at most "
                "2^31 - 1 users and no larger communities"
            )
        if not 0 < self.requests <= 1000:
            raise ValueError(f"requests: got {self.requests}, needs a number in (0, 1000]")
        _day("start", self.start)


def _at_least(settings: object, **least: int) -> None:
    for name, number in least.items():
        # Written so that NaN is refused.
        if not getattr(settings, name) >= number:
            raise ValueError(f"{name}: got {getattr(settings, name)}, needs at least {number}")


def _day(name: str, text: str) -> None:
    try:
        datetime.strptime(text, "%Y-%m-%d")
    except ValueError:
        raise ValueError(f"{name}: got {text!r}, needs a day as YYYY-MM-DD") from None
