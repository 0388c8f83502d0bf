"""Reads the machine code that cuobjdump -sass lists: the instructions of a kernel, and its loops."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_LINE = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str  # "@!P0", or "" for one that is always executed
    opcode: str  # "HGMMA.64x64x16.F32.BF16"
    operands: str

    def is_a(self, *names: str) -> bool:
        """Whether the opcode, without what follows its first dot, is one of these."""
        return self.opcode.split(".")[0] in names

    def targets(self) -> list[int]:
        return [int(found, 16) for found in re.findall(r"(?<![\w\[])0x([0-9a-f]+)", self.operands)[-1:]]


def instructions(listing: str) -> list[Instruction]:
    """Of one kernel, in order."""
    found = (_LINE.match(line) for line in listing.splitlines())
    return [Instruction(int(m[1], 16), m[2] or "", m[3], m[4].strip()) for m in found if m]


Blocks = list[list[Instruction]]


def _blocks(code: Sequence[Instruction]) -> tuple[Blocks, list[set[int]]]:
    """Basic blocks in order, and the indices of each one's successors.

    A call leads to what it calls and to what follows: a loop may be left by one that does not return.
    """
    starts = {code[0].address}
    for here, after in itertools.pairwise(code):
        if here.is_a("BRA", "CALL"):
            starts |= set(here.targets())
        if here.is_a("BRA", "BRX", "CALL", "EXIT", "RET"):
            starts.add(after.address)
    blocks: Blocks = []
    for each in code:
        if each.address in starts:
            blocks.append([])
        blocks[-1].append(each)
    index = {block[0].address: i for i, block in enumerate(blocks)}
    next_of: list[set[int]] = [set() for _ in blocks]
    for i, block in enumerate(blocks):
        last = block[-1]
        if last.is_a("BRA", "CALL"):
            next_of[i] |= {index[target] for target in last.targets()}
        falls = bool(last.predicate) or (last.is_a("BRA") and "," in last.operands)
        if (falls or not last.is_a("BRA", "BRX", "EXIT", "RET")) and i + 1 < len(blocks):
            next_of[i].add(i + 1)
    reached = {0}.union(*next_of)
    for i, block in enumerate(blocks):
        if block[-1].is_a("BRX"):  # through a table, to blocks that nothing else leads to
            next_of[i] |= set(range(len(blocks))) - reached
    return blocks, next_of


def loops(code: Sequence[Instruction]) -> list[list[Instruction]]:
    """The natural loops: what can come back to a branch backwards from the block it goes to, which all of it passes."""
    if not code:
        return []
    blocks, next_of = _blocks(code)
    before: list[set[int]] = [set() for _ in blocks]
    for i, targets in enumerate(next_of):
        for target in targets:
            before[target].add(i)
    dominators = _dominators(next_of, before)
    bodies: dict[int, set[int]] = defaultdict(set)
    for i, targets in enumerate(next_of):
        for head in targets:
            if i in dominators and dominators[i] >> head & 1:
                body, todo = bodies[head] | {head}, [i]
                while todo:
                    block = todo.pop()
                    if block not in body:
                        body.add(block)
                        todo += before[block]
                bodies[head] = body
    return [[each for i in sorted(body) for each in blocks[i]] for body in bodies.values()]


def _dominators(next_of: Sequence[set[int]], before: Sequence[set[int]]) -> dict[int, int]:
    """For each block that is reached, the set of blocks on every way to it, as bits."""
    order, seen, todo = [], {0}, [(0, iter(next_of[0]))]
    while todo:
        block, rest = todo[-1]
        for target in rest:
            if target not in seen:
                seen.add(target)
                todo.append((target, iter(next_of[target])))
                break
        else:
            order.append(block)
            todo.pop()
    everything = (1 << len(next_of)) - 1
    found = {block: everything for block in order} | {0: 1}
    changed = True
    while changed:
        changed = False
        for block in reversed(order[:-1]):
            meet = everything
            for other in before[block]:
                meet &= found.get(other, everything)
            if found[block] != meet | 1 << block:
                found[block] = meet | 1 << block
                changed = True
    return found


def innermost(code: Sequence[Instruction], name: str) -> list[list[Instruction]]:
    """The loops with an instruction of this name that hold no smaller such loop."""
    having = [loop for loop in loops(code) if any(each.is_a(name) for each in loop)]
    sets = [frozenset(each.address for each in loop) for loop in having]
    return [loop for loop, own in zip(having, sets, strict=True) if not any(other < own for other in sets)]


def opcodes(code: Iterable[Instruction], *names: str) -> list[str]:
    """Those of the instructions with one of these names."""
    return [each.opcode for each in code if each.is_a(*names)]
