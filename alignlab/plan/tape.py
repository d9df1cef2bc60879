"""How much memory a forward and a backward pass hold at once, walked operation by operation; imports no torch.

A tape lists what each operation makes, reads, keeps for its backward, and needs for the moment. The walk follows
PyTorch's rules: a tensor goes when nothing later reads it and no backward needs it; a backward holds the incoming
gradient and what it saved until it is done; gradients that meet are added in place where nobody else holds them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

Tensor = int  # its number on the tape


@dataclass(frozen=True)
class Op:
    out: Tensor
    reads: tuple[Tensor, ...]
    saves: tuple[Tensor, ...]  # for its backward, of what it reads and makes
    extra: float  # bytes saved besides, such as a dropout mask
    temp: float  # bytes for the moment of its forward
    back: float  # bytes for the moment of its backward, the gradients it makes aside
    passes: bool  # its backward hands the gradient on as it is
    holds: bool  # no operation: a Python name holds a tensor until here


@dataclass
class Tape:
    sizes: list[float] = field(default_factory=list)  # bytes of each tensor
    ops: list[Op] = field(default_factory=list)
    weights: set[Tensor] = field(default_factory=set)  # trained: held elsewhere, their gradients added up elsewhere

    def tensor(self, size: float) -> Tensor:
        self.sizes.append(size)
        return len(self.sizes) - 1

    def weight(self, size: float) -> Tensor:
        self.weights.add(self.tensor(size))
        return len(self.sizes) - 1

    def op(
        self,
        size: float,
        *reads: Tensor,
        saves: tuple[Tensor, ...] = (),
        saves_out: bool = False,
        extra: float = 0,
        temp: float = 0,
        back: float = 0,
        passes: bool = False,
    ) -> Tensor:
        """The tensor of `size` bytes that an operation makes of those it reads."""
        out = self.tensor(size)
        saves = (*saves, out) if saves_out else saves
        self.ops.append(Op(out, reads, saves, extra, temp, back, passes, False))
        return out

    def hold(self, *tensors: Tensor) -> None:
        """A Python frame names these tensors until here."""
        self.ops.append(Op(self.tensor(0), tensors, (), 0, 0, 0, False, True))


@dataclass(frozen=True)
class Walk:
    """Bytes, without the tape's input where that is kept outside."""

    forward: float  # the most that the forward holds at once
    saved: float  # what is kept for the backward, the result aside
    backward: float  # the most that the backward holds at once, from the forward's end on
    recompute: float  # the same under checkpointing, where the forward runs anew once the backward needs what it saved


def walk(tape: Tape, given: Tensor, result: Tensor, *, saving: bool, pinned: bool, wants_gradient: bool = True) -> Walk:
    """The memory of one pass over the tape, which starts with the tensor `given` and ends with `result`.

    `saving` keeps what a backward needs; without it nothing is kept and there is no backward. A `pinned` input is
    held outside and not counted. `wants_gradient`: the input needs a gradient of its own.
    """
    last = {tensor: number for number, op in enumerate(tape.ops) for tensor in (*op.reads, op.out)}
    needs = {given, *tape.weights} if wants_gradient else set(tape.weights)
    keepers: Counter[Tensor] = Counter()
    now = 0 if pinned else tape.sizes[given]
    alive, most, recorded = set() if pinned else {given}, now, []
    again = now  # the most up to the last operation that saves something, where checkpointing stops computing anew
    for number, op in enumerate(tape.ops):
        before, most = most, max(most, now + op.temp + tape.sizes[op.out])
        now += tape.sizes[op.out]
        alive.add(op.out)
        if saving and not op.holds and not needs.isdisjoint(op.reads):
            needs.add(op.out)
            keepers.update(op.saves)
            now += op.extra
            recorded.append(op)
            if op.saves:
                again = max(before, now - tape.sizes[op.out] * (op.out not in op.saves))
        for tensor in {*op.reads, op.out} & alive:
            if last[tensor] <= number and not keepers[tensor] and tensor != result:
                alive.remove(tensor)
                now -= tape.sizes[tensor]
    kept = keepers[result] > 0
    saved = now - (0 if kept else tape.sizes[result])
    if not saving:
        return Walk(most, saved, 0, 0)
    backward, waiting = _walk_back(tape, result, recorded, needs, keepers, alive, saved)
    return Walk(most, saved, backward, max(backward, again + waiting))


def _walk_back(
    tape: Tape, result: Tensor, ops: list[Op], needs: set, keepers: Counter, alive: set, saved: float
) -> tuple[float, float]:
    """The most that the backward holds, and the gradients at hand when it first needs something saved."""
    waiting, held = None, _Held(tape, saved)
    held.gradients[result] = held.make(result)
    for op in reversed(ops):
        if waiting is None and op.saves:
            waiting = held.now - saved
        held.pass_through(op, [tensor for tensor in op.reads if tensor in needs])
        held.now -= op.extra
        for tensor in op.saves:
            keepers[tensor] -= 1
            if not keepers[tensor] and tensor in alive:
                alive.remove(tensor)
                held.now -= tape.sizes[tensor]
    return held.most, waiting or 0


class _Held:
    """What a backward holds as it goes: what was saved, and gradients, each in a buffer that several may share."""

    def __init__(self, tape: Tape, saved: float):
        self.tape, self.now, self.most = tape, saved, saved  # bytes
        self.buffers: list[float] = []  # bytes of each
        self.holders: Counter[int] = Counter()  # of a buffer
        self.gradients: dict[Tensor, int] = {}  # the buffer of each tensor's

    def pass_through(self, op: Op, wanted: list[Tensor]) -> None:
        """The operation's backward: the gradient of what it made becomes those of what it read."""
        incoming = self.gradients.pop(op.out, None)
        if incoming is None:
            return
        made = 0 if op.passes else sum(self.tape.sizes[tensor] for tensor in wanted)
        self.most = max(self.most, self.now + op.back + made)
        for tensor in wanted:
            self.receive(tensor, self.share(incoming) if op.passes else self.make(tensor))
        self.release(incoming)

    def receive(self, tensor: Tensor, buffer: int) -> None:
        """A gradient arrives, and is added in place where nobody else holds it, or the one that was there before."""
        older = self.gradients.get(tensor)
        if tensor in self.tape.weights:
            self.release(buffer)
        elif older is None:
            self.gradients[tensor] = buffer
        elif self.holders[older] == 1:
            self.release(buffer)
        elif self.holders[buffer] == 1:
            self.gradients[tensor] = buffer
            self.release(older)
        else:  # neither may be changed: the sum is a third
            self.gradients[tensor] = self.make(tensor)
            self.release(older)
            self.release(buffer)

    def make(self, tensor: Tensor) -> int:
        self.buffers.append(self.tape.sizes[tensor])
        self.now += self.buffers[-1]
        self.most = max(self.most, self.now)
        return self.share(len(self.buffers) - 1)

    def share(self, buffer: int) -> int:
        self.holders[buffer] += 1
        return buffer

    def release(self, buffer: int) -> None:
        self.holders[buffer] -= 1
        if not self.holders[buffer]:
            self.now -= self.buffers[buffer]
