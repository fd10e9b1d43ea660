"""Whatever happens to the files of a run or a dataset: the same figures, or one sentence.

Hypothesis chooses a file of a small run, of its dataset or of its export, and damages it. Then the
run is evaluated, loaded for serving, exported or verified. Nothing may come out but the results of
the whole files, or one sentence and the exit code 1, and nothing may be left behind.
"""

import contextlib
import io
import json
import os
import runpy
import shutil
from pathlib import Path

import hypothesis
import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from tests.data.small_dataset import random_histories, write_dataset
from tests.serving.tiny_run import LENGTHS, save_run
from tim4rec_jax.data.format import ITEMS_FILE
from tim4rec_jax.errors import LONGEST_SENTENCE, UserError, run_main
from tim4rec_jax.evaluation.evaluate import evaluate_run
from tim4rec_jax.run import verify
from tim4rec_jax.serving.catalogue import load_run

RUN = Path("run")
READ_EXPORT = Path(__file__).parents[1] / "examples" / "run_export.py"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a run, its dataset and another dataset of the same size; all paths in it."""
    home, before = tmp_path_factory.mktemp("hostile"), os.getcwd()
    (home / "whole").mkdir()
    os.chdir(home / "whole")
    for name, seed in (("data", 0), ("other", 1)):
        write_dataset(Path(name), random_histories(LENGTHS, seed=seed))
    save_run(RUN, Path("data"), time_encoding="causal", date_bias_knots=2, date_range=(10**8, 10**9))
    shutil.copy(Path("data") / ITEMS_FILE, RUN / ITEMS_FILE)
    yield home
    os.chdir(before)


def evaluated():
    report = evaluate_run(RUN)
    (RUN / "eval_test.json").unlink()
    return report["metrics"], report["users"]


def loaded():
    config, model, catalogue = load_run(RUN)
    leaves = jax.tree.leaves(nnx.to_pure_dict(nnx.state(model)))
    values = [np.asarray(leaf).tobytes() for leaf in leaves]
    return config.model.to_dict(), config.data.to_dict(), catalogue.ids, values


def verified():
    problems = [finding.problem for finding in verify(RUN) if finding.problem]
    if problems:
        raise UserError(problems[0])
    return loaded()


ACTIONS = {"eval": evaluated, "load": loaded, "verify": verified}


def outcome(action):
    """The exit code of an action, and its result or its sentence."""
    result, said = [], io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = run_main(lambda: result.append(ACTIONS[action]()))
    lines = [line for line in said.getvalue().splitlines() if not line.startswith("note: ")]
    return code, result, lines


@pytest.fixture(scope="module")
def expected(home):
    results = {}
    for action in ACTIONS:
        code, [results[action]], lines = outcome(action)
        assert (code, lines) == (0, [])
    return results


# Values of any type, in any depth that is worth a try.
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.sampled_from(["", "x", "\x1b[31m", "\ud800", "nowhere/at all", "a:b", "2" * 400]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
GARBAGE = st.sampled_from(
    [b"", b"null", b"[]", b"{}", b"NaN", b'{"a": "\xff"}', b"[" * 50_000, b"PK\x03\x04", b"\0" * 99]
) | st.binary(max_size=60)


def flip(path, draw):
    content = bytearray(path.read_bytes())
    for _ in range(draw(st.sampled_from([1, 1, 1, 20]))):
        if content:
            content[draw(st.integers(0, len(content) - 1))] ^= 1 << draw(st.integers(0, 7))
    path.write_bytes(content)


def truncate(path, draw):
    path.write_bytes(path.read_bytes()[: draw(st.integers(0, path.stat().st_size))])


def replace(path, draw):
    path.write_bytes(draw(GARBAGE))


def change_json(path, draw):
    """Puts a value of any type in the place of one in the file, or leaves that out."""
    values = json.loads(path.read_text())
    inside = values
    while True:
        keys = list(inside) if isinstance(inside, dict) else range(len(inside))
        key = draw(st.sampled_from(keys))
        if not (isinstance(inside[key], dict | list) and inside[key] and draw(st.booleans())):
            break
        inside = inside[key]
    if draw(st.integers(0, 5)):
        inside[key] = draw(VALUES)
    else:
        del inside[key]
    path.write_text(json.dumps(values))


def remove(path, draw):
    path.unlink()


def swap(path, draw):
    others = [other for other in files(Path()) if other.suffix == path.suffix and other != path]
    shutil.copyfile(draw(st.sampled_from(others or [path])), path)


def folder(path, draw):
    path.unlink()
    path.mkdir()


def pipe(path, draw):
    path.unlink()
    os.mkfifo(path)


def link(path, draw):
    path.unlink()
    path.symlink_to(draw(st.sampled_from([path.name, "nowhere", "/dev/null", "/dev/full", "."])))


DAMAGES = [flip, truncate, replace, change_json, remove, swap, folder, pipe, link]


def files(top):
    return sorted(path for path in top.rglob("*") if path.is_file())


def names(top):
    return sorted(str(path) for path in top.rglob("*"))


def check(home, expected, data):
    shutil.rmtree(home / "work", ignore_errors=True)
    shutil.copytree(home / "whole", home / "work")
    os.chdir(home / "work")
    mine = [path for path in files(Path()) if path.parts[0] != "other" and path.stat().st_size]
    # Settings and digests are small, and a file of Orbax is one of many.
    weighted = [path for path in mine for _ in range(6 if "best" not in path.parts else 1)]
    path = data.draw(st.sampled_from(weighted))
    damage = data.draw(st.sampled_from(DAMAGES))
    if damage is change_json and path.suffix != ".json":
        damage = flip
    damage(path, data.draw)
    action = data.draw(st.sampled_from(sorted(ACTIONS)))
    before = names(Path())
    code, result, lines = outcome(action)
    where = f"{damage.__name__} of {path}, then {action}: "
    if code:
        assert code == 1, where
        assert len(lines) == 1, where + str(lines)
        assert lines[0].startswith("error: ") and len(lines[0]) <= LONGEST_SENTENCE, where
        assert lines[0].isprintable(), where + lines[0]
    else:
        assert result == [expected[action]], where + "another result"
    assert names(Path()) == before, where


def settings(examples):
    return hypothesis.settings(
        max_examples=examples,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        derandomize=True,
    )


@settings(25)
@given(data=st.data())
def test_the_same_figures_or_one_sentence(home, expected, data):
    check(home, expected, data)


@pytest.mark.slow
@settings(1000)
@given(data=st.data())
def test_a_thousand_damages(home, expected, data):
    check(home, expected, data)


@pytest.mark.parametrize("action", ["eval", "verify"])
@pytest.mark.parametrize("names", [["sequences.arrow"], ["items.parquet"], None])
def test_events_of_another_dataset(home, expected, action, names):
    """It has as many users, items and events."""
    shutil.rmtree(home / "work", ignore_errors=True)
    shutil.copytree(home / "whole", home / "work")
    os.chdir(home / "work")
    for name in names or [path.name for path in Path("other").iterdir()]:
        shutil.copy(Path("other") / name, Path("data") / name)
    code, _, lines = outcome(action)
    assert code == 1
    assert "data" in lines[0]
