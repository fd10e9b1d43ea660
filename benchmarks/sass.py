"""What machine code of NVIDIA GPUs costs: instructions that a warp issues, and where they run."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

# /*0050*/   @!P0 BRA.U 0x2040 ;
_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)([^;]*);", re.M)


class Instruction(NamedTuple):
    """One instruction.

    Attributes:
        address: in the code of its function.
        operation: its name with modifiers, as "LDG.E.128".
        operands: what follows the name.
    """

    address: int
    operation: str
    operands: str

    @property
    def kind(self) -> str:
        """The name without modifiers."""
        return self.operation.split(".")[0]


class Loop(NamedTuple):
    """A loop: the addresses of its first and its last instruction."""

    first: int
    last: int


def parse(code: str) -> list[Instruction]:
    """Returns the instructions of what `cuobjdump --dump-sass` prints, without the padding."""
    found = [Instruction(int(a, 16), name, rest) for a, name, rest in _LINE.findall(code)]
    # A jump back may be the last one. The padding begins with a jump to itself.
    last = max(
        i for i, one in enumerate(found) if one.kind == "EXIT" or _jumps_to(one) < one.address
    )
    return found[: last + 1]


def loops(instructions: list[Instruction]) -> list[Loop]:
    """Returns the loops, outer ones before those in them: jumps back to an earlier address."""
    found: dict[float, int] = {}
    for one in instructions:
        if (first := _jumps_to(one)) <= one.address:
            found[first] = max(found.get(first, 0), one.address)
    return sorted(
        (Loop(int(first), last) for first, last in found.items()),
        key=lambda loop: (loop.first, -loop.last),
    )


def _jumps_to(one: Instruction) -> float:
    """Where an instruction jumps to; infinity: nowhere."""
    target = re.search(r"0x([0-9a-f]+)", one.operands) if one.kind == "BRA" else None
    return int(target[1], 16) if target else float("inf")


def issued(instructions: list[Instruction], turns: Sequence[int]) -> Counter[str]:
    """Counts the instructions that a warp issues, by kind. Code that a jump may skip counts.

    Args:
        instructions: of the kernel.
        turns: how often the body of each loop runs each time that it is entered, in the order of
            `loops`.

    Raises:
        ValueError: the code has another number of loops.
    """
    found = loops(instructions)
    if len(found) != len(turns):
        raise ValueError(f"the code has {len(found)} loops, and {len(turns)} are described")
    counts: Counter[str] = Counter()
    for one in instructions:
        times = 1
        for loop, turn in zip(found, turns, strict=True):
            if loop.first <= one.address <= loop.last:
                times *= turn
        counts[one.kind] += times
    return counts
