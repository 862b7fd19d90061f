"""Loops whose jump back is in none of the handlers of the `with` and `try` blocks around it. A program of its own: holes.py FOLDER.

CPython 3.12 and 3.13 leave a jump out of the exception table that the compiler makes late: back to the head of a loop, where the loop's
last statement may be skipped (an `if` without an `else`), or where a `while` tests again at its end (python/cpython#130279). An exception
of a signal's handler comes at jumps back. There it leaves such a block without its __exit__ or its finally.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType


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
        # behind CLEANUP_THROW (3.12): an exception was thrown into an inner generator, which went on without it. None does so in a block
        # that holds a mark; a claim is given back when the frame goes
        before = next((at.opname for at in instructions[i - 1 :: -1] if at.opname != "EXTENDED_ARG"), "")
        if instruction.opname == "JUMP_BACKWARD" and before != "CLEANUP_THROW":
            missing = handlers(instruction.argval) - handlers(instruction.offset)
            if any(names[target] == "PUSH_EXC_INFO" for target in missing):
                yield next((at.positions.lineno for at in instructions[i::-1] if at.positions and at.positions.lineno), None)


def main(folder: Path) -> None:
    for path in sorted(folder.rglob("*.py")):
        for code in codes(compile(path.read_bytes(), str(path), "exec", dont_inherit=True)):
            for line in holes(code):
                print(f"{path}:{line}: {code.co_qualname}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
