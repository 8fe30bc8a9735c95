"""The generated network has its layout, and communities, closure, likeness and reciprocity are in it."""

import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from synthlogs.friends import FriendsConfig, generate

SMALL = FriendsConfig(users=4000, days=90, community_size=100, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("friends") / "log"
    generate(folder, SMALL)
    return folder


@pytest.fixture(scope="module")
def events(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / "events.parquet")


@pytest.fixture(scope="module")
def nodes(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / "nodes.parquet").set_index("user")


@pytest.fixture(scope="module")
def users(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / "truth" / "users.parquet").set_index("user")


@pytest.fixture(scope="module")
def friendships(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / "truth" / "friendships.parquet")


def neighbours(pairs: pd.DataFrame) -> list[set[int]]:
    known: list[set[int]] = [set() for _ in range(SMALL.users)]
    for one, other in zip(pairs["user"], pairs["friend"], strict=True):
        known[one].add(other)
        known[other].add(one)
    return known


def test_the_layout_is_the_documented_one_in_time_order(folder, events, nodes, users):
    schema = pq.read_schema(folder / "events.parquet")
    assert {name: str(schema.field(name).type) for name in schema.names} == {
        "actor": "int32",
        "action": "string",
        "target": "int32",
        "time": "timestamp[ms, tz=UTC]",
    }
    assert set(events["action"]) == {"friend_request", "accept", "message", "like", "comment"}
    assert events["time"].is_monotonic_increasing
    start = pd.Timestamp("2024-01-01", tz="UTC")
    assert events["time"].min() >= start and events["time"].max() < start + pd.Timedelta(days=SMALL.days)
    assert (events["actor"] != events["target"]).all()
    assert nodes.index.tolist() == users.index.tolist() == list(range(SMALL.users))
    for side in ("actor", "target"):
        assert (nodes["joined"].loc[events[side]].to_numpy() <= events["time"].to_numpy()).all()
    # Ids say nothing of communities.
    assert abs(np.corrcoef(users.index, users["community"])[0, 1]) < 0.1


def test_a_friendship_is_a_request_that_was_accepted_later_and_nobody_asks_twice(events, friendships):
    asked = events[events["action"] == "friend_request"].set_index(["actor", "target"])["time"]
    pairs = pd.MultiIndex.from_arrays(np.sort(np.stack([asked.index.get_level_values(i) for i in (0, 1)]), axis=0))
    assert not pairs.has_duplicates
    accepted = events[events["action"] == "accept"].set_index(["target", "actor"])["time"]
    assert (asked.reindex(accepted.index) < accepted).all()
    known = friendships.set_index(["user", "friend"])["time"]
    assert len(known) == len(accepted) and (known.reindex(accepted.index) == accepted).all()


def test_friends_talk_after_they_became_friends_only(events, friendships):
    since = friendships.set_index(["user", "friend"])["time"]
    since = pd.concat([since, since.rename_axis(["friend", "user"]).reorder_levels(["user", "friend"])])
    spoken = events[events["action"].isin(["message", "comment"])].set_index(["actor", "target"])["time"]
    assert (since.reindex(spoken.index) < spoken).all() and len(spoken) > 5000


def test_friends_share_communities_regions_ages_and_interests(friendships, nodes, users):
    one, other = friendships["user"], friendships["friend"]
    stranger = np.roll(other, 1)

    def agree(column):
        return np.mean(column.loc[one].to_numpy() == column.loc[other].to_numpy()), np.mean(
            column.loc[one].to_numpy() == column.loc[stranger].to_numpy()
        )

    friends, chance = agree(users["community"])
    assert friends > 0.7 > 5 * chance
    friends, chance = agree(nodes["region"])
    assert friends > 0.6 > 2 * chance
    age = nodes["age"].astype(float)
    assert np.corrcoef(age.loc[one], age.loc[other])[0, 1] > 0.4
    tags = nodes["interests"].map(set)
    shared = [len(a & b) for a, b in zip(tags.loc[one], tags.loc[other], strict=True)]
    strangers = [len(a & b) for a, b in zip(tags.loc[one], tags.loc[stranger], strict=True)]
    assert np.mean(shared) > 3 * np.mean(strangers)
    position = np.stack(users["position"])
    apart = np.square(position[one] - position[other]).sum(1) / 8
    assert apart.mean() < 0.5 * (np.square(position[one] - position[stranger]).sum(1) / 8).mean()


def test_degrees_and_communities_have_heavy_tails(friendships, users):
    degree = pd.concat([friendships["user"], friendships["friend"]]).value_counts()
    assert degree.quantile(0.99) > 4 * degree.median() and len(degree) > 0.95 * SMALL.users
    size = users["community"].value_counts()
    assert len(size) == 40 and size.max() > 2.5 * size.median()


def test_friends_of_friends_are_asked_and_accept(events, friendships):
    reason = friendships["reason"].value_counts(normalize=True)
    assert 0.25 < reason["friend of a friend"] < 0.6 and set(reason.index) == {
        "friend of a friend",
        "community",
        "region",
        "anyone",
    }
    # Whoever was asked as a friend's friend had a friend in common when asked.
    cut = pd.Timestamp("2024-02-15", tz="UTC")
    known = neighbours(friendships[friendships["time"] < cut])
    later = friendships[friendships["time"].between(cut, cut + pd.Timedelta(days=6))]
    chosen = later[later["reason"] == "friend of a friend"]
    common = np.mean([bool(known[a] & known[b]) for a, b in zip(chosen["user"], chosen["friend"], strict=True)])
    others = later[later["reason"] == "community"]
    by_chance = np.mean([bool(known[a] & known[b]) for a, b in zip(others["user"], others["friend"], strict=True)])
    assert common > 0.6 and common > by_chance + 0.2


def test_new_friendships_can_be_foretold_from_common_friends(friendships, users):
    """Adamic-Adar ranks the friendships to come far above chance, within communities too."""
    cut = pd.Timestamp("2024-02-15", tz="UTC")
    known = neighbours(friendships[friendships["time"] < cut])
    later = friendships[friendships["time"] >= cut]
    rng = np.random.default_rng(0)
    community = users["community"].to_numpy()
    members = {one: np.flatnonzero(community == one) for one in np.unique(community)}

    def score(a, b):
        return sum(1 / np.log(2 + len(known[c])) for c in known[a] & known[b])

    won = []
    pairs = [
        (a, b) for a, b in zip(later["user"], later["friend"], strict=True) if min(len(known[a]), len(known[b])) > 4
    ]
    assert len(pairs) > 1500
    for a, b in pairs[:1500]:
        other = rng.choice([one for one in members[community[a]] if one != a and one not in known[a]])
        won.append(0.5 * (np.sign(score(a, b) - score(a, other)) + 1))
    assert np.mean(won) > 0.58


def test_messages_are_answered(events):
    messages = events[events["action"] == "message"]
    pairs = set(zip(messages["actor"], messages["target"], strict=True))
    answered = np.mean([(b, a) in pairs for a, b in pairs])
    assert answered > 0.6
    # Likes go one way more often.
    likes = events[events["action"] == "like"]
    liked = set(zip(likes["actor"], likes["target"], strict=True))
    assert np.mean([(b, a) in liked for a, b in liked]) < answered - 0.2


def test_three_of_ten_requests_follow_a_like(events):
    asked = events[events["action"] == "friend_request"].drop_duplicates(["actor", "target"])
    likes = (
        events[events["action"] == "like"].drop_duplicates(["actor", "target"]).set_index(["actor", "target"])["time"]
    )
    first = likes.reindex(pd.MultiIndex.from_frame(asked[["actor", "target"]])).to_numpy()
    late = asked["time"] > pd.Timestamp("2024-02-01", tz="UTC")
    before = (first < asked["time"].to_numpy())[late]
    assert 0.22 < before.mean() < 0.35


def test_the_seed_decides_every_byte_and_the_counts_are_those_written(tmp_path):
    def written(name, seed):
        result = generate(tmp_path / name, FriendsConfig(users=300, days=10, community_size=30, seed=seed))
        table = pq.read_table(tmp_path / name / "events.parquet")["action"].to_pandas().value_counts()
        assert {action: result[action] for action in table.index} == table.to_dict()
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    first = written("a", 1)
    assert first == written("b", 1) and set(first.values()).isdisjoint(written("a", 2).values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"users": 5}, "users: got 5"),
        ({"community_size": 30_000}, "community_size: got 20000 users in communities of 30000"),
        ({"requests": 0.0}, r"requests: got 0\.0"),
        ({"start": "now"}, "start: got 'now'"),
    ],
)
def test_settings_without_sense_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        generate(tmp_path / "log", FriendsConfig(**change))
    assert not list(tmp_path.iterdir())
