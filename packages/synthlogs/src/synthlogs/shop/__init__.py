"""A shop's log in the RecSys Challenge 2025 layout, at any scale, with signal planted in it.

The statistics follow the published ones of the challenge data: 9.4 events a client on average with median 2 and a
log-normal tail, 88.8 % page visits, 5.8 % searches, 3.2 % cart additions, 1.1 % cart removals, 1.0 % purchases, the
share of duplicate rows of each table, Zipf popularity of skus, categories and URLs, price buckets that are quantiles,
and 16 integers 0..255 per name and per query, written as numpy prints them.

A client is simulated session by session; what can be learned from the past is planted in five places, so that no
kind of model is favoured by construction:

- **activity** (counts and recency see it): every client has a pace, a session size, a loyalty and a readiness to buy;
- **taste** (co-occurrence and aggregates see it): a client draws three topics from one of a few personas and keeps a
  price level, to which the nearest of three items is chosen; items, URLs, names and queries all belong to topics;
- **order** (only the sequence shows it): visits serve missions. A mission stays on one topic for several sessions and
  ripens from browsing over carts to a purchase; after it, the next topic often is the fixed successor of the last
  one, or, for consumable topics, the same topic again after that topic's own period;
- **launches** (taste shows them, nothing else can): some skus of well-sold categories cannot be had before train_start;
  from then on they are half of what is looked for in their category, by whoever looks there at that price. They are
  the targets of propensity_new_sku;
- **mood** (recent patterns show it): a slowly drifting satisfaction moves return gaps, cart removals, visits to
  service pages and the hazard of going quiet; buying something durable raises that hazard, something consumable
  lowers it.
"""

from synthlogs.settings import ShopConfig
from synthlogs.shop.generate import TABLES, generate, settings_of

__all__ = ["TABLES", "ShopConfig", "generate", "settings_of"]
