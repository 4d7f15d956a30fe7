"""One fixed order for every sum over tiles: a binary tree over the lanes, wherever the lanes are computed.

Floating-point addition is not associative, so a sum over C tiles has one value for each shape of the summation. Here
the shape is fixed: neighbours first, then neighbours of neighbours. A process that holds a power of two of the lanes
computes a whole subtree, and the sums of the processes are joined by the same tree. Hence the same bits from 1, 2, 4
or 8 processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

Tensors = list[torch.Tensor]


class BinaryCounter:
    """Sums leaves as they come: equal levels merge, like carries in a binary counter. Memory: one sum a level.

    A leaf is a list of tensors (the gradients of a tile, say), and every leaf has the same shapes.
    """

    def __init__(self) -> None:
        self._stack: list[tuple[int, Tensors]] = []  # (level, sum of 2^level leaves), levels falling

    def push(self, leaf: Tensors) -> None:
        """Add a leaf. Its tensors are taken over and changed."""
        level = 0
        while self._stack and self._stack[-1][0] == level:
            left = self._stack.pop()[1]
            torch._foreach_add_(left, leaf)
            leaf, level = left, level + 1
        self._stack.append((level, leaf))

    def unfinished(self) -> Iterator[Tensors]:
        """The sums that wait on the stack, in the order in which they join one more leaf: newest first."""
        return (tensors for _, tensors in reversed(self._stack))

    def total(self) -> Tensors:
        """The sum of all leaves; the counter is empty afterwards. Raises IndexError if there was none."""
        _, total = self._stack.pop()
        for tensors in self.unfinished():
            torch._foreach_add_(total, tensors)
        self._stack.clear()
        return total

    def clear(self) -> None:
        self._stack.clear()


def tree_sum(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of tensors of one shape by the counter's tree. The pieces are changed."""
    counter = BinaryCounter()
    for piece in pieces:
        counter.push([piece])
    return counter.total()[0]
