"""A grocer's baskets in the layout of dunnhumby's "Let's Get Sort-of-Real" (LGSR), with elasticities planted in them.

``transactions.parquet`` has the 22 published columns (the version with seg_1 and seg_2) in time order, a row a product
and basket, and ``time.csv`` the fiscal weeks. Unlike in the published data prices move, and a quantity of 2 occurs.

On a trip t of mission m, a customer u in store s takes a Poisson number of picks of product i with mean

    size(t) * mission(m, category of i) * season(category, week) * share(i) * habit(u, i) * level(u, i) * carried(s, i)
    * (p(i) / p0(i)) ** own(i) * (p(j) / p0(j)) ** cross(i, j) * (p(k) / p0(k)) ** cross(i, k) * pair(t, i)

- **price**: p is the week's price, p0 the first base price, j the product's substitute (cross > 0) and k its complement
  (cross < 0). Everything else in the product has a mean that no price moves, so ``own`` and ``cross`` are the
  elasticities of expected units, exactly, in every store, week and segment. The base price takes a step or two;
  a **promotion** lowers it by 10 to 50 % for one to three weeks;
- **pair**: a pair of complements comes to mind on one trip of four, and is then taken four times as often: it meets
  in baskets more often than by chance. Of two substitutes each trip considers one only: they never meet;
- **habit**: log-normal (sigma 1.8) and fixed for customer and product: what was bought will be bought again;
- **level**: ``exp(-0.4 t r)`` for the product's price r relative to its category; t is 1 for price-sensitive customers
  (LA, seg_1 AZ), 0 for MM (CT), -1 for UM (BG);
- **mission**: eight of them, each with its size (a full shop, a top up, a small shop), focus (fresh, grocery, nonfood,
  mixed), categories, weekdays and hours; each customer has a mix of them. BASKET_TYPE is the mission's type; the
  basket's size, dominant mission and price sensitivity are read from what lies in it;
- **store**: four of five trips go to the customer's own store, others to a second one of the region or anywhere.
  Small formats carry the most common part of the range only;
- **weighed goods** are priced by weight: a row's SPEND is the week's price times a log-normal weight.

``truth.parquet`` has a row a product: p0, own, substitute, complement and their cross elasticities. ``truth/`` has the
weekly prices, missions, customers, stores and the mission of every basket.
"""

from synthlogs.baskets.generate import generate
from synthlogs.settings import BasketsConfig

__all__ = ["BasketsConfig", "generate"]
