"""A shop of many categories in the REES46 layout: views, carts and rare purchases, with propensities planted in them.

The columns are those of the published log (event_time, event_type, product_id, category_id, category_code, brand,
price, user_id, user_session), one file a month. Views outnumber purchases by ``ratio``, events per user and products'
popularity have heavy tails, a third of the category codes and 15 % of the brands are missing.

- a **user** has a taste vector t [8], a price level w, a readiness to buy and three categories of interest, two of them
  in one department; how often and how long a user looks are log-normal;
- a **product** has a style vector s [8] (its brand's, and a little of its own), a price r relative to its category, a
  quality and a Zipf share of its category. Some products are **launched** on a later day: nobody sees them before;
- **liking** is ``t s - 0.8 |r - w| + 0.3 quality``. Whoever looks for something in a category takes the best liked,
  with some luck, of five that are drawn by popularity;
- a **wish** is for one category. It lasts several sessions and ripens (``stage``); its product is looked at again and
  again, beside others of the category, companions and what is popular anywhere;
- a **session** buys its product with log-odds ``intercept + readiness + 0.7 stage + 0.5 liking + 4 discount``. The
  intercept is solved for, so that views to purchases have the configured ratio. Products go on sale for a week;
- a **purchase** ends the wish, and half of the next wishes are for the **complement** of what was bought: the next
  category on a ring through the department. Otherwise four of five come from the user's interests.

So purchases of what was never looked at can be ranked above popularity: by interest, complement, brand and price level.
``truth/`` has every row's propensity, the chance given all of this that its session buys its product, in the order of
the rows, and what was drawn for users and products.
"""

from synthlogs.purchases.generate import generate
from synthlogs.settings import PurchasesConfig

__all__ = ["PurchasesConfig", "generate"]
