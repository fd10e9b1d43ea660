"""What a report says about the protocol of its figures."""

import dataclasses
import json

from tests.data.small_dataset import in_memory, random_histories
from tim4rec_jax import config as config_lib
from tim4rec_jax import presets
from tim4rec_jax.evaluation.protocol import best_epoch, protocol

COLUMNS = ["dataset", "config", "variant", "model", "seed", "split", "part", "order", "seen"]
COLUMNS += ["ties", "knows_next_time", "ks"]


def test_the_protocol_has_the_columns_of_the_results():
    config = config_lib.resolve(presets.load_config("ml100k:causal"))
    dataset = in_memory(random_histories([3, 4]))
    found = protocol(config, dataset)
    assert list(found) == COLUMNS
    said = ["small", "ml100k", "causal", "tim4rec", 2020, "leave_one_out", "test", "exact"]
    assert list(found.values()) == [*said, "ranked", "optimistic", False, [10, 20, 50]]
    assert json.loads(json.dumps(found)) == found


def test_each_choice_is_told():
    config = config_lib.default()
    config.preset = "beauty"
    config_lib.use_model(config, "sasrec")
    config.data.split, config.eval.ties, config.eval.ks = "global_time", "expected", (5,)
    dataset = in_memory(random_histories([3, 4]))
    dataset = dataclasses.replace(dataset, metadata={"name": "shop", "order": "recbole"})
    found = protocol(config, dataset, part="valid", exclude_seen=True)
    said = ["shop", "beauty", "", "sasrec", 2020, "global_time", "valid", "recbole", "masked"]
    assert list(found.values()) == [*said, "expected", False, [5]]
    asked = protocol(config, dataset, ties="optimistic", ks=(1, 3))
    assert (asked["ties"], asked["ks"]) == ("optimistic", [1, 3])


def test_who_knows_the_time_of_the_target():
    config, dataset = config_lib.default(), in_memory(random_histories([3]))
    config.model.update(time_encoding="causal", knows_next_time=True)
    assert protocol(config, dataset)["knows_next_time"] is True


def test_the_epoch_of_the_best_checkpoint(tmp_path):
    assert best_epoch(tmp_path) is None
    for step in (20, 40):
        (tmp_path / "best" / str(step)).mkdir(parents=True)
    assert best_epoch(tmp_path) is None
    records = [{"kind": "train", "step": 40}, *({"kind": "valid", "step": 20 * n} for n in (1, 2))]
    lines = [json.dumps(record | {"epoch": n}) for n, record in enumerate(records)]
    (tmp_path / "log.jsonl").write_text("\n".join([*lines, '{"kind": "val']))
    assert best_epoch(tmp_path) == 2
