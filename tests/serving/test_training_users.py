"""Users of the training, asked by their ids."""

import json

import numpy as np

from tests.serving.conftest import KINDS
from tests.serving.test_users import HISTORIES
from tests.serving.tiny_run import save_run, tiny_dataset
from tim4rec_jax.run import read_settings
from tim4rec_jax.serving import MemoryStore, Recommender
from tim4rec_jax.serving.training_users import TrainingUsers, of_run


def user_of(dataset, row):
    return TrainingUsers(dataset)._index[0].user_ids[row].as_py()


def check(recommender, user, items, times):
    """The answer is the one after all these events have been posted, and so is the state."""
    posted = Recommender(recommender.model, recommender.catalogue)
    posted.update_batch([(user, *event) for event in zip(items, times, strict=True)])
    expected = posted.recommend_user(user)
    found = recommender.recommend_user(user)
    assert found.items == expected.items
    assert not found.fallback
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5, atol=1e-5)
    events, state = recommender.stored(user)
    assert len(events.items) == len(items)
    assert state is not None


def test_a_user_of_the_training(recommenders, tiny_data, store):
    shared = recommenders("causal")
    recommender = Recommender(
        shared.model, shared.catalogue, store, training=TrainingUsers(tiny_data)
    )
    (items, times), (other_items, other_times) = HISTORIES[3], HISTORIES[4]
    user, other = user_of(tiny_data, 3), user_of(tiny_data, 4)
    check(recommender, user, items, times)
    later = [times[-1] + 60, times[-1] + 90]
    for number in (1, 2):  # steps from the state of the training
        recommender.update(user, f"i{number}", later[number - 1])
        check(
            recommender, user, [*items, "i1", "i2"][: len(items) + number], times + later[:number]
        )
    # Who posts events of the training again, before others or after, has them once.
    again = [(other, item, time) for item, time in zip(other_items, other_times, strict=True)]
    recommender.update_batch(again[:5])
    recommender.update_batch([*again[5:], (other, "i9", other_times[-1] + 5)])
    recommender.compute_states([other])
    check(recommender, other, [*other_items, "i9"], [*other_times, other_times[-1] + 5])
    # A user who is deleted stays deleted, and may begin anew.
    assert recommender.delete_user(user)
    assert not recommender.delete_user(user)
    assert recommender.recommend_user(user).fallback
    recommender.update(user, "i4", 5)
    check(recommender, user, ["i4"], [5])
    assert recommender.recommend_user("nobody").fallback


def test_states_know_whether_the_training_is_in_them(recommenders, tiny_data):
    shared, store, user = recommenders("causal"), MemoryStore(), user_of(tiny_data, 3)
    without = Recommender(shared.model, shared.catalogue, store)
    without.update(user, "i4", 10**9)
    assert without.stored(user)[1] is not None
    recommender = Recommender(
        shared.model, shared.catalogue, store, training=TrainingUsers(tiny_data)
    )
    recommender.compute_states([user])
    items, times = HISTORIES[3]
    check(recommender, user, [*items, "i4"], [*times, 10**9])


def test_only_the_dataset_of_the_training(tmp_path):
    dataset = tiny_dataset(tmp_path / "data")
    workdir = save_run(tmp_path / "run", dataset, **KINDS["masked"])
    config = read_settings(workdir / "config.json")
    training = of_run(workdir, config, None)
    assert training.find(user_of(dataset, 2)).items.tolist() == [
        int(item[1:]) for item in HISTORIES[2][0]
    ]
    assert training.find("nobody") is None
    metadata = json.loads((dataset / "dataset.json").read_text())
    metadata["content"]["sequences"] = "0" * 64
    (dataset / "dataset.json").write_text(json.dumps(metadata))
    assert of_run(workdir, config, None) is None  # prepared again
    dataset.rename(tmp_path / "moved")
    assert of_run(workdir, config, None) is None
