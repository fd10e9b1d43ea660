"""Whatever happens to the files of a run or a dataset: the same figures, or one sentence.

Hypothesis chooses a file of a small run or of its dataset, and damages it. Then the run is
evaluated, loaded for serving or verified. Nothing may come out but the results of the whole files,
or one sentence and the exit code 1, and nothing may be left behind. The same holds of what is made
from a run, and of what one is made from: the states to resume from, a torch checkpoint, an index,
an exported folder.
"""

import contextlib
import faulthandler
import io
import json
import os
import runpy
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from tests.data.small_dataset import random_histories, write_dataset
from tests.interop.golden_models import read_golden
from tests.interop.torch_format import recbole_checkpoint, torch_save
from tests.serving.tiny_run import LENGTHS, save_run
from tests.training.tiny_run import iterator, state
from tim4rec_jax.data.format import ITEMS_FILE
from tim4rec_jax.errors import LONGEST_SENTENCE, UserError, run_main
from tim4rec_jax.evaluation.evaluate_run import evaluate_run
from tim4rec_jax.interop import from_torch, to_torch
from tim4rec_jax.interop.torch_file import read_checkpoint
from tim4rec_jax.interop.weights import model_config
from tim4rec_jax.serving.ann_index import ApproximateIndex
from tim4rec_jax.serving.catalogue import load_run
from tim4rec_jax.serving.export import export
from tim4rec_jax.training.checkpoints import Checkpoints
from tim4rec_jax.verify import verify

# Orbax leaves tasks behind when it fails.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

RUN, TRAINING = Path("run"), Path("training")
TORCH_FILE, EXPORT, INDEX = Path("TiM4Rec.pth"), Path("exported"), Path("index.faiss")
EXAMPLE = Path(__file__).parents[1] / "examples" / "run_export.py"
TABLE = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a run, its dataset and another dataset of the same size; all paths in it."""
    home, before = tmp_path_factory.mktemp("hostile"), os.getcwd()
    (home / "whole").mkdir()
    os.chdir(home / "whole")
    for name, seed in (("data", 0), ("other", 1)):
        write_dataset(Path(name), random_histories(LENGTHS, seed=seed))
    save_run(
        RUN, Path("data"), time_encoding="causal", date_bias_knots=2, date_range=(10**8, 10**9)
    )
    shutil.copy(Path("data") / ITEMS_FILE, RUN / ITEMS_FILE)
    checkpoints = Checkpoints(TRAINING)
    for step in (5, 8):
        checkpoints.save(state(step, 2 * step), iterator(step), {"epoch": step})
    checkpoints.close()
    golden = read_golden("tiny_notime_1layer_noffn")
    torch_save(recbole_checkpoint(golden.state_dict, golden.config), TORCH_FILE)
    ApproximateIndex(TABLE, INDEX)
    yield home
    os.chdir(before)


@pytest.fixture(scope="module")
def exported(home):
    """An exported folder beside the run."""
    fresh_copy(home)
    export(RUN, home / "whole" / EXPORT)


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


def resumed():
    """The step, the epoch and the place in the data where a training would go on."""
    data, checkpoints = iterator(0), Checkpoints(TRAINING)
    try:
        found, progress = checkpoints.restore(state(0, -1), data)
    finally:
        checkpoints.close()
    values = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(found.opt_state)]
    return int(found.step), progress, data.get_state(), values


def imported():
    config, weights = read_checkpoint(TORCH_FILE)
    _, length = model_config(config)
    values = {
        name: value.tobytes() for name, value in to_torch(from_torch(weights, config)).items()
    }
    return length, values


def searched():
    scores, items = ApproximateIndex(TABLE, INDEX).best(TABLE[1:4], 5)
    return scores.tolist(), items.tolist()


def read_export():
    try:
        metadata = runpy.run_path(str(EXAMPLE))["read_metadata"](EXPORT)
    except SystemExit as end:
        raise UserError(str(end).removeprefix("error: ")) from None
    del metadata["made_by"]  # nothing depends on it
    return metadata


ACTIONS = {"eval": evaluated, "load": loaded, "verify": verified}
# What reads other files than these, and where those lie.
ARTEFACTS = {
    "resume": (resumed, TRAINING / "checkpoints"),
    "import": (imported, TORCH_FILE),
    "index": (searched, INDEX),
    "export": (read_export, EXPORT),
}


def outcome(action):
    """The exit code of an action, and its result or its sentence; it must not hang."""
    result, said = [], io.StringIO()
    # No signal ends Arrow's wait for a pipe; this ends the process, which fails the test.
    faulthandler.dump_traceback_later(60, exit=True)
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            code = run_main(lambda: result.append(action()))
    finally:
        faulthandler.cancel_dump_traceback_later()
    lines = [line for line in said.getvalue().splitlines() if not line.startswith("note: ")]
    return code, result, lines


@pytest.fixture(scope="module")
def expected(home):
    return {name: results_of_whole_files(home, action) for name, action in ACTIONS.items()}


def results_of_whole_files(home, action):
    fresh_copy(home)
    code, [result], lines = outcome(action)
    assert (code, lines) == (0, [])
    return result


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
GARBAGE = [
    b"",
    b"null",
    b"[]",
    b"{}",
    b"NaN",
    b'{"a": "\xff"}',
    b"[" * 50_000,
    b"PK\3\4",
    b"\0" * 99,
]


class Choice(NamedTuple):
    """What to do to which file; places are shares, so that they do not depend on the files."""

    file: float
    damage: str
    place: float
    bits: list[int]
    value: Any
    action: str


# Hypothesis prefers the ends of a range; these are spread evenly.
SHARES = st.integers(0, 2**20).map(lambda number: number * 0.6180339887 % 1)
CHOICES = st.builds(
    Choice,
    file=SHARES,
    damage=st.sampled_from(
        [*["flip"] * 8, "truncate", "garbage", "json", "remove", "swap", "folder", "pipe", "link"]
    ),
    place=SHARES,
    bits=st.lists(st.integers(0, 7), min_size=1, max_size=3),
    value=VALUES,
    action=st.sampled_from(sorted(ACTIONS)),
)


def at(share, values):
    return values[int(share * len(values))]


def damage(path, choice):
    content = bytearray(path.read_bytes())
    match choice.damage:
        case "flip":
            for number, bit in enumerate(choice.bits):
                content[(int(choice.place * len(content)) + 7 * number) % len(content)] ^= 1 << bit
            path.write_bytes(content)
        case "truncate":
            path.write_bytes(content[: int(choice.place * len(content))])
        case "garbage":
            path.write_bytes(at(choice.place, GARBAGE))
        case "json":
            path.write_text(json.dumps(changed(json.loads(content), choice)))
        case "swap":
            others = [other for other in files(Path()) if other.suffix == path.suffix]
            shutil.copyfile(at(choice.place, others), path.with_name("taken"))
            path.with_name("taken").replace(path)
        case "remove" | "folder" | "pipe" | "link":
            path.unlink()
            if choice.damage == "folder":
                path.mkdir()
            elif choice.damage == "pipe":
                os.mkfifo(path)
            elif choice.damage == "link":
                path.symlink_to(at(choice.place, [path.name, "nowhere", "/dev/null", "."]))


def changed(values, choice):
    """The values of a JSON file with one of them replaced or left out, however deep it lies."""
    places = []

    def visit(inside):
        for key in inside if isinstance(inside, dict) else range(len(inside)):
            places.append((inside, key))
            if isinstance(inside[key], dict | list):
                visit(inside[key])

    visit(values)
    inside, key = at(choice.place, places)
    if choice.bits[0]:
        inside[key] = choice.value
    else:
        del inside[key]
    return values


def files(top):
    return sorted(path for path in top.rglob("*") if path.is_file())


def names(top):
    return sorted(str(path) for path in top.rglob("*"))


def fresh_copy(home):
    shutil.rmtree(home / "work", ignore_errors=True)
    shutil.copytree(home / "whole", home / "work")
    os.chdir(home / "work")


def check(home, results, choice):
    """Damages a file of the run or its dataset; only the results may come out, or a sentence."""
    fresh_copy(home)
    mine = [path for top in ("run", "data") for path in files(Path(top)) if path.stat().st_size]
    # Orbax has many files. Those that hold values, and all that are not of Orbax, come more often.
    often = [path for path in mine if "default" not in path.parts or path.parent.name == "d"]
    before = one_of(mine + often * 4, choice)
    same_or_a_sentence(ACTIONS[choice.action], [results[choice.action]], choice)
    assert names(Path()) == before, choice


def one_of(paths, choice):
    """Damages one of the files; returns the names of all."""
    if choice.damage == "json":
        paths = [path for path in paths if path.suffix == ".json"] or paths
    path = at(choice.file, paths)
    if choice.damage != "json" or path.suffix == ".json":
        damage(path, choice)
    hypothesis.note(f"{choice.damage} of {path}")
    return names(Path())


def same_or_a_sentence(action, results, choice):
    code, result, lines = outcome(action)
    if code:
        assert code == 1, choice
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ") and len(lines[0]) <= LONGEST_SENTENCE, lines
        assert lines[0].isprintable(), lines
    else:
        assert result[0] in results, "another result"


def settings(examples):
    return hypothesis.settings(
        max_examples=examples,
        database=None,
        derandomize=True,
        # The message says what was done; to look for less takes long.
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )


@settings(12)
@given(choice=CHOICES)
def test_the_same_figures_or_one_sentence(home, expected, choice):
    check(home, expected, choice)


def test_a_pipe_in_place_of_the_items(home):
    """Arrow would wait for somebody who writes to it."""
    fresh_copy(home)
    (RUN / ITEMS_FILE).unlink()
    os.mkfifo(RUN / ITEMS_FILE)
    code, _, [line] = outcome(loaded)
    assert (code, "items.parquet is no file" in line) == (1, True)
    assert any("items.parquet is no file" in str(part.problem) for part in verify(RUN))


@pytest.mark.slow
@settings(1000)
@given(choice=CHOICES)
def test_a_thousand_damages(home, expected, choice):
    check(home, expected, choice)


def check_artefact(home, name, choice):
    action, top = ARTEFACTS[name]
    results = [results_of_whole_files(home, action)]
    if name == "resume":  # a damaged state is passed over: that before it is taken
        shutil.rmtree(top / "8")
        results.append(outcome(action)[1][0])
    fresh_copy(home)
    before = one_of([top] if top.is_file() else files(top), choice)
    same_or_a_sentence(action, results, choice)
    # A damaged state of training goes. A damaged index is made again, where its link leads to.
    assert set(names(Path())) <= {*before, str(top), "nowhere"}


@pytest.mark.parametrize("name", ["resume", "import", "index"])
@settings(4)
@given(choice=CHOICES)
def test_artefacts(home, name, choice):
    check_artefact(home, name, choice)


@pytest.mark.slow
@pytest.mark.parametrize("name", ARTEFACTS)
@settings(300)
@given(choice=CHOICES)
def test_hundreds_of_damaged_artefacts(home, exported, name, choice):
    check_artefact(home, name, choice)


@pytest.mark.parametrize("action", ["eval", "verify"])
@pytest.mark.parametrize("names", [["sequences.arrow"], ["items.parquet"], None])
def test_events_of_another_dataset(home, expected, action, names):
    """It has as many users, items and events."""
    fresh_copy(home)
    for name in names or [path.name for path in Path("other").iterdir()]:
        shutil.copy(Path("other") / name, Path("data") / name)
    code, _, lines = outcome(ACTIONS[action])
    assert code == 1
    assert "data" in lines[0]
