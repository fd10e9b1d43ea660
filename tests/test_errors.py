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


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (OSError(28, "No space left on device", "runs/x"), 1, "runs/x: No space left on device\n"),
        (FileNotFoundError(2, "No such file", "x"), 1, "error: x: No such file; correct the path"),
        (ValueError("embedded null byte"), 1, "error: a name holds a null byte"),
        (MemoryError(), 1, "error: the memory does not suffice"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_one_line_and_an_exit_code(capsys, error, code, words):
    def main():
        raise error

    assert run_main(main) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert words in said.err
    assert said.err.count("\n") == 1


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_main(lambda: 1 // 0)


def test_the_code_of_main():
    assert run_main(lambda: None) == 0
    assert run_main(lambda: 3) == 3
