"""A mistake is told in one line, whatever the message quotes."""

import pytest

from tim4rec_jax.errors import LONGEST_SENTENCE, UserError, one_line, run_main


@pytest.mark.parametrize(
    "text, shown",
    [
        ("plain, é, 😀, [red]", "plain, é, 😀, [red]"),
        ("a\nb\r\t", r"a\nb\r\t"),
        ("a\x1b[2J\x00", r"a\x1b[2J\x00"),
        ("a\udc80\u2028\ufeff", r"a\udc80\u2028\ufeff"),
    ],
)
def test_one_line(text, shown):
    assert one_line(text) == shown


@pytest.mark.parametrize("letter", ["x", "\n", "\U000e0001"])
@pytest.mark.parametrize("length", [LONGEST_SENTENCE - 20, LONGEST_SENTENCE, 10**6])
def test_long_sentences_lose_their_middle(capsys, letter, length):
    def main():
        raise UserError(f"here: {letter * (length - 14)}; do it")

    assert run_main(main) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: here: ") and shown.endswith("; do it\n")
    assert shown.count("\n") == 1 and len(shown) <= LONGEST_SENTENCE + 1


def test_want_of_memory(capsys):
    def main():
        raise MemoryError

    assert run_main(main) == 1
    assert capsys.readouterr().err.startswith("error: the memory does not suffice")
