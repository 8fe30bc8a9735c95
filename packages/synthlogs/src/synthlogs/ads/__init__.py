"""An advertising log in the published 84-column layout, of any size, with signal planted in it and the truth beside it.

``catalogue.py`` draws what is the same in every hour, ``population.py`` who asks and what they will buy (its first
lines state the planted law), ``columns.py`` the 67 feature columns.
"""

from synthlogs.ads.generate import generate
from synthlogs.settings import AdsConfig

__all__ = ["AdsConfig", "generate"]
