"""Reading checkpoints without torch: what is read, what is refused, and that nothing runs."""

import os
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.interop.torch_format import Parameter, recbole_checkpoint, torch_save
from tim4rec_jax.errors import UserError
from tim4rec_jax.interop import read_checkpoint


@pytest.fixture
def weights():
    base = np.arange(24, dtype=np.float32)
    return {
        "plain": np.linspace(-1, 1, 6, dtype=np.float32),
        "double": np.full((2, 3), 1e-300),
        "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "offset": base[5:11],
        "every_second": base[1::2],
        "half": np.array([1.5, -2], np.float16),
        "bfloat16": np.array([1.5, 3e38], ml_dtypes.bfloat16),
        "scalar": np.array(2.5, np.float32),
        "empty": np.zeros((0, 4), np.float32),
    }


def test_reads_weights_and_config_of_a_recbole_checkpoint(tmp_path, weights):
    config = {"hidden_size": 64, "topk": [10, 20], "norm_eps": 1e-12, "wandb_project": None}
    path = torch_save(recbole_checkpoint(weights, config), tmp_path / "TiM4Rec.pth")
    read_config, read = read_checkpoint(path)
    assert read.keys() == weights.keys()
    for name, expected in weights.items():
        assert read[name].dtype == expected.dtype
        np.testing.assert_array_equal(read[name], expected)
        assert read[name].flags.c_contiguous
    assert {key: read_config[key] for key in config} == config


def test_reads_a_bare_state_dict(tmp_path, weights):
    path = torch_save({"w": Parameter(weights["plain"])}, tmp_path / "weights.pt")
    config, read = read_checkpoint(path)
    assert config == {}
    np.testing.assert_array_equal(read["w"], weights["plain"])


class Hostile:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def test_executes_nothing_from_the_file(tmp_path, weights):
    marker = tmp_path / "executed"
    saved = recbole_checkpoint({"plain": weights["plain"]}, {"trap": Hostile(marker)})
    config, read = read_checkpoint(torch_save(saved, tmp_path / "trap.pth"))
    assert not marker.exists()
    assert config["trap"].origin.endswith("mkdir")
    assert read.keys() == {"plain"}


def write(path, content: bytes):
    path.write_bytes(content)
    return path


def edited(path, *, drop=(), replace=()):
    """The archive at `path` without the entries `drop`, and with others in place of some."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    entries = {n: data for n, data in entries.items() if not n.endswith(tuple(drop) or "\0")}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (entries | dict(replace)).items():
            archive.writestr(name, data)
    return path


def cut(path, share: float):
    return write(path, path.read_bytes()[: int(path.stat().st_size * share)])


def flipped(path, marker: bytes):
    return write(path, path.read_bytes().replace(marker, marker[::-1], 1))


W = np.arange(6, dtype=np.float32)
FAULTS = {
    "no such file": (lambda p: p, "is not a file"),
    "empty": (lambda p: write(p, b""), "not a checkpoint"),
    "text": (lambda p: write(p, b"user_id:token\n"), "not a checkpoint"),
    "old torch": (lambda p: write(p, pickle.dumps({}, 2)), "before version 1.6"),
    "cut": (lambda p: cut(torch_save({"w": W}, p), 0.5), "incomplete"),
    "other zip": (lambda p: edited(torch_save({"w": W}, p), drop=["data.pkl"]), "none that torch"),
    "big-endian": (lambda p: torch_save({"w": W}, p, b"big"), "big-endian"),
    "bad pickle": (
        lambda p: edited(torch_save({"w": W}, p), replace=[("x/data.pkl", b"\x80\x04garbage")]),
        "damaged",
    ),
    "bad checksum": (lambda p: flipped(torch_save({"w": W}, p), W.tobytes()), "'w'.*CRC"),
    "no storage": (lambda p: edited(torch_save({"w": W}, p), drop=["data/0"]), "'w'.*data/0"),
    "short storage": (
        lambda p: edited(torch_save({"w": W}, p), replace=[("x/data/0", bytes(20))]),
        "'w'.*beyond its storage",
    ),
    "no tensors": (lambda p: torch_save({"epoch": 3}, p), "'epoch'.*no tensor but 'int'"),
    "not a dict": (lambda p: torch_save([1, 2], p), "holds no weights"),
    "no weights": (lambda p: torch_save({"state_dict": {}}, p), "holds no weights"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_one_sentence_about_a_file_that_cannot_be_read(tmp_path, fault):
    make, message = FAULTS[fault]
    path = make(tmp_path / "x.pth")
    with pytest.raises(UserError, match=message) as error:
        read_checkpoint(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    return torch_save({"w": W, "b": W[2:4]}, tmp_path_factory.mktemp("fuzz") / "x.pth")


@given(data=st.data())
def test_a_damaged_file_is_a_user_error_or_still_readable(small_file, data):
    content = bytearray(small_file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    damaged = write(small_file.with_name("damaged.pth"), bytes(content))
    try:
        read_checkpoint(damaged)
    except UserError as error:
        assert str(damaged) in str(error)
        assert "\n" not in str(error)


def test_reads_what_torch_itself_writes(tmp_path):
    torch = pytest.importorskip("torch")
    linear = torch.nn.Linear(3, 2)
    extra = {"view": torch.arange(12.0)[2:8:2], "bf16": torch.ones(2, dtype=torch.bfloat16)}
    torch.save({"state_dict": dict(linear.state_dict()) | extra}, tmp_path / "x.pth")
    _, read = read_checkpoint(tmp_path / "x.pth")
    np.testing.assert_array_equal(read["weight"], linear.weight.detach().numpy())
    np.testing.assert_array_equal(read["view"], [2, 4, 6])
    assert read["bf16"].dtype == ml_dtypes.bfloat16


def test_reads_complex_weights(tmp_path):
    """LRURec has some."""
    weights = {"a": np.array([1 + 2j, -3j], np.complex64), "b": np.array([1e-9j], np.complex128)}
    _, read = read_checkpoint(torch_save(weights, tmp_path / "x.pth"))
    for name, array in weights.items():
        np.testing.assert_array_equal(read[name], array)
        assert read[name].dtype == array.dtype
