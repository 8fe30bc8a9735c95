"""A social network's log: who asks, accepts, writes to, likes and comments on whom, with communities planted in it.

``events.parquet`` has the columns actor, action (friend_request, accept, message, like, comment), target and time, in
time order; ``nodes.parquet`` what every user says of himself or herself.

- **communities** have sizes with a heavy tail and lie in one of twelve regions. A user's **position** [8] is that of
  the community plus noise; closeness of two users is minus their squared distance / 8. Half of the users are there
  from the start, the others join later;
- **requests**: how many a user sends is Poisson, its mean log-normal over users. Seven of ten are for a friend of a
  friend (**triadic closure**), where there is one; the others are for the closest, with a little luck, of eight users
  of the same community (80 %) or region (14 %), or of all (6 %). Nobody asks twice, or asks back. Three of ten requests
  follow a like or two by the same user;
- **accepts** follow within days with log-odds ``1.2 + closeness + 0.8 [friend of a friend]``, so friends are alike
  (**homophily**);
- **messages, likes and comments** go from friend to friend, to close ones more often: each direction of a friendship
  has a mean of ``0.12 exp(closeness)`` in a 24th of the span. Six of ten messages are answered within hours
  (**reciprocity**);
- **nodes** show traces of the community: the region is right for nine of ten, age is the community's with a deviation
  of six years, interests are five draws, three of four of them from the community's eight.

Time passes in 24 rounds; within one nobody hears of the friendships that began in it. ``truth/`` has communities,
regions, positions and sociability of the users, and every friendship with its time and the reason of its request.
"""

from synthlogs.friends.generate import generate
from synthlogs.settings import FriendsConfig

__all__ = ["FriendsConfig", "generate"]
