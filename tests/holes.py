"""Loops whose jump back is in none of the handlers of the `with` and `try` blocks around it. A program of its own: holes.py FOLDER.

An exception of a signal's handler comes at jumps back, and CPython has let it pass by the block, its __exit__ or its finally. 3.13: the
compiler leaves the jumps out of the exception table that it makes late: to the head of a loop that ends in a condition, or that tests
again at its end (python/cpython#130279). Before: the exception counts as one of the instruction before the loop's head, which in a loop
of one line may be outside of the block (python/cpython#108214).
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType

# where an exception goes that a block's end is called for, or what an `except` cleans up: else sys.exception() would stay
ENDS = {"PUSH_EXC_INFO", "COPY"}


def codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes(constant)


def holes(code: CodeType) -> Iterator[int | None]:
    """Lines."""
    entries = dis.Bytecode(code).exception_entries
    instructions = list(dis.get_instructions(code))
    names = {i.offset: i.opname for i in instructions}

    def handlers(offset: int) -> set[int]:
        """Where an exception of this instruction goes, and what those raise again."""
        found: set[int] = set()
        while True:
            target = next((e.target for e in entries if e.start <= offset < e.end), None)
            if target is None or target in found:
                return found
            found.add(target)
            offset = target

    for i, instruction in enumerate(instructions):
        if instruction.opname == "JUMP_BACKWARD" or instruction.opname.startswith("POP_JUMP_BACKWARD"):
            raised_at = instruction.offset if sys.version_info >= (3, 13) else instruction.argval - 2
            missing = handlers(instruction.argval) - handlers(raised_at)
            if any(names[target] in ENDS for target in missing):
                yield next((at.positions.lineno for at in instructions[i::-1] if at.positions and at.positions.lineno), None)


def main(folder: Path) -> None:
    for path in sorted(folder.rglob("*.py")):
        for code in codes(compile(path.read_bytes(), str(path), "exec", dont_inherit=True)):
            for line in holes(code):
                print(f"{path}:{line}: {code.co_qualname}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
