"""Every mistake on the command line of `train.py`, as a user meets it: one sentence."""

import runpy
import sys
from pathlib import Path

import pytest

from tests.data.small_dataset import random_histories, write_dataset
from tim4rec_jax import config as config_lib
from tim4rec_jax.cli import parse
from tim4rec_jax.errors import UserError

ROOT = Path(__file__).parents[1]
CONFIG = f"--config={ROOT / 'configs' / 'ml1m.py'}"
WORKDIR = "--workdir=runs/x"


def parsed(*flags):
    return parse(["train.py", *flags], usage="how to")


def test_file_variant_and_overrides():
    config, workdir = parsed(
        f"{CONFIG}:256d",
        "--config.train.learning_rate=1e-2",
        "--config.data.buckets=(20,200)",
        "--config.model.is_ffn=false",
        "--config.data.convention=exact",
        WORKDIR,
    )
    assert workdir == "runs/x"
    assert (config.model.hidden_size, config.train.learning_rate) == (256, 0.01)
    assert (config.data.buckets, config.model.is_ffn) == ((20, 200), False)
    assert config.data.convention == "exact"
    with pytest.raises(AttributeError):  # locked
        config.model.hiden_size = 3


def test_flags_and_values_apart():
    config, workdir = parsed("--config", CONFIG.partition("=")[2], "--workdir", "there")
    assert (config.model.hidden_size, workdir) == (64, "there")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--config FILE.py is missing"),
        ([WORKDIR], "--config FILE.py is missing"),
        ([CONFIG], "--workdir DIR is missing"),
        (["--config=no/such.py", WORKDIR], "there is no file no/such.py"),
        (["--config=configs", WORKDIR], "there is no file configs"),
        ([f"{CONFIG}:512d", WORKDIR], "'512d' is not a variant; there are: causal, 256d, official"),
        ([CONFIG, WORKDIR, "--epochs=3"], "epochs"),
        ([CONFIG, WORKDIR, "--wokdir=x"], "wokdir"),
        ([CONFIG, WORKDIR, "resume"], "'resume' is not a flag"),
        (
            [CONFIG, WORKDIR, "--config.model.hiden_size=3"],
            "config.model.hiden_size is not a setting; nearest: model.hidden_size",
        ),
        (
            [CONFIG, WORKDIR, "--config.learning_rate=3"],
            "config.learning_rate is not a setting; nearest: train.learning_rate",
        ),
        ([CONFIG, WORKDIR, "--config.xyzzy", "3"], "config.xyzzy is not a setting"),
        ([CONFIG, WORKDIR, "--config.model=3"], "config.model"),
        ([CONFIG, WORKDIR, "--config.train.epochs=ten"], "config.train.epochs"),
        ([CONFIG, WORKDIR, "--config.train.epochs=2.5"], "config.train.epochs"),
        ([CONFIG, WORKDIR, "--config.train.learning_rate=fast"], "config.train.learning_rate"),
        ([CONFIG, WORKDIR, "--config.model.is_time=perhaps"], "config.model.is_time"),
        ([CONFIG, WORKDIR, "--config.data.buckets=(1,"], "config.data.buckets"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes(flags, words):
    with pytest.raises(UserError) as error:
        parsed(*flags)
    message = str(error.value)
    assert words in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def get_config(variant):\n    return 1 +", "line 2"),
        ("import nothing_of_this_name", "nothing_of_this_name"),
        ("def get_config(variant):\n    return 1 / 0", "ZeroDivisionError"),
        ("def get_config(variant):\n    return {}['a']", "KeyError: 'a'"),
        ("x = 1", "has no function get_config"),
        ("def get_config(variant):\n    return 3", "get_config"),
        ("def get_config():\n    return 3", "get_config"),
    ],
)
def test_broken_config_files(tmp_path, text, words):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        parsed(f"--config={path}", WORKDIR)
    assert words in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("model.name", "tim5rec", "must be one of tim4rec"),
        ("model.time_encoding", "casual", "must be one of paper, masked, causal"),
        ("model.dtype", "float16", "must be one of float32, bfloat16"),
        ("train.objective", "every", "must be one of prefix, every_position, cloze"),
        ("train.objective", "every_position", "needs a causal model"),
        ("model.knows_next_time", True, "needs config.model.time_encoding=causal"),
        ("train.schedule", "linear", "must be one of constant, cosine"),
        ("data.windows_per_user", 0, "must be positive"),
        ("data.buckets", ("short", 50), "must be whole numbers"),
        ("data.convention", "fuzzy", "must be one of recbole, exact"),
        ("model.dropout_prob", 1.0, "must lie in [0, 1)"),
        ("model.time_drop_out", -0.1, "must lie in [0, 1)"),
        ("train.learning_rate", float("nan"), "must be positive"),
        ("train.epochs", 0, "must be positive"),
        ("model.d_conv", 0, "must be positive"),
        ("model.norm_eps", 0.0, "must be positive"),
        ("seed", -1, "must not be negative"),
        ("train.patience", -1, "must not be negative"),
        ("model.head_dim", 48, "must divide expand * hidden_size = 128"),
    ],
)
def test_settings_that_cannot_be(key, value, words):
    config = config_lib.default()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError) as error:
        config_lib.resolve(config)
    assert str(error.value).startswith(f"config.{key} is {value!r}")
    assert words in str(error.value)


def test_packed_rows_have_exact_gaps():
    config = config_lib.default()
    config_lib.use_model(config, "tisasrec")
    assert config_lib.resolve(config).data.convention == "recbole"
    config.train.objective = "every_position"
    assert config_lib.resolve(config).data.convention == "exact"
    config.data.convention = "recbole"
    with pytest.raises(UserError, match="packed rows have exact gaps"):
        config_lib.resolve(config)


@pytest.mark.parametrize(
    ("model", "key", "value"),
    [("tim4rec", "train.loss", "bpr"), ("bert4rec", "train.objective", "cloze")],
)
def test_what_the_offset_of_items_seen_needs(model, key, value):
    config = config_lib.default()
    config_lib.use_model(config, model)
    config.model.repeat_bias = True
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=f"repeat_bias is True, which needs .*{value}"):
        config_lib.resolve(config)


@pytest.mark.parametrize(
    ("model", "knots", "problem"),
    [("tim4rec", 1, "must be 2 or more"), ("bert4rec", 8, "the objective is cloze")],
)
def test_what_drift_needs(model, knots, problem):
    config = config_lib.default()
    config_lib.use_model(config, model)
    config.model.date_bias_knots = knots
    with pytest.raises(UserError, match=f"date_bias_knots is {knots}.*{problem}"):
        config_lib.resolve(config)


@pytest.mark.parametrize(("encoding", "convention"), [("paper", "recbole"), ("masked", "exact")])
def test_the_convention_of_gaps_follows_the_encoding(encoding, convention):
    config = config_lib.default()
    config.model.time_encoding = encoding
    assert config_lib.resolve(config).data.convention == convention


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs train.py in this process; gives its exit code, output and errors."""

    def run(*flags):
        monkeypatch.setattr("sys.argv", ["train.py", *map(str, flags)])
        # What the command changes of its process stays with it.
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
        monkeypatch.setattr("sys.unraisablehook", sys.unraisablehook)
        with pytest.raises(SystemExit) as exit:
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        return exit.value.code or 0, *capsys.readouterr()

    return run


def test_help(command):
    code, said, errors = command("--help")
    assert (code, errors) == (0, "")
    assert "python train.py --config configs/quickstart.py --workdir runs/quickstart" in said


def test_a_dataset_not_prepared_yet(command, tmp_path):
    code, said, errors = command(CONFIG, f"--workdir={tmp_path}", "--config.dataset=nowhere")
    assert (code, said) == (1, "")
    assert errors == (
        "error: nowhere is not a prepared dataset yet; prepare it with "
        "`python -m data_prep movielens ml-1m --order recbole --out data/ml-1m`\n"
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config.model.head_dim=48"], "config.model.head_dim is 48"),
        (["--config.seed=-1"], "config.seed is -1"),
        (["--config.data.buckets=(10,20)"], "buckets (10, 20) must be positive and the longest"),
        (["--workdir=/dev/null"], "/dev/null"),
        (["--workdir=/proc/nowhere/run"], "/proc"),
    ],
    ids=str,
)
def test_what_is_wrong_only_with_the_data_in_hand(command, tmp_path, flags, words):
    dataset = write_dataset(tmp_path / "data", random_histories([8] * 4))
    flags = [CONFIG, f"--workdir={tmp_path / 'run'}", f"--config.dataset={dataset}", *flags]
    code, _, errors = command(*flags)
    assert code == 1
    assert errors.startswith("error: ")
    assert words in errors
    assert errors.count("\n") == 1
