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
    tape: Tape, result: Tensor, ops: list[Op], needs: set, keepers: Counter, alive: set, now: float
) -> tuple[float, float]:
    """The most that the backward holds, and the gradients at hand when it first needs something saved."""
    waiting, started = None, now
    buffers = {0: tape.sizes[result]}  # of gradients, by number
    holders: Counter[int] = Counter({0: 1})
    gradients = {result: 0}
    now += buffers[0]
    most = now
    for op in reversed(ops):
        if waiting is None and op.saves:
            waiting = now - started
        incoming = gradients.pop(op.out, None)
        wanted = [tensor for tensor in op.reads if tensor in needs] if incoming is not None else []
        made = 0 if op.passes else sum(tape.sizes[tensor] for tensor in wanted)
        most = max(most, now + (op.back if incoming is not None else 0) + made)
        for tensor in wanted:
            if op.passes:
                number = incoming
            else:
                number = len(buffers)
                buffers[number] = tape.sizes[tensor]
                now += tape.sizes[tensor]
            holders[number] += 1
            if tensor in tape.weights:
                now -= _released(number, holders, buffers)
                continue
            if tensor not in gradients:
                gradients[tensor] = number
                continue
            older = gradients[tensor]
            if holders[older] > 1 and holders[number] > 1:  # neither may be changed: the sum is a third
                gradients[tensor] = len(buffers)
                buffers[gradients[tensor]] = tape.sizes[tensor]
                holders[gradients[tensor]] = 1
                now += tape.sizes[tensor]
                most = max(most, now)
                spent = (older, number)
            else:
                gradients[tensor], spent = (older, (number,)) if holders[older] == 1 else (number, (older,))
            now -= sum(_released(one, holders, buffers) for one in spent)
        now -= op.extra
        for tensor in op.saves:
            keepers[tensor] -= 1
            if not keepers[tensor] and tensor in alive:
                alive.remove(tensor)
                now -= tape.sizes[tensor]
        if incoming is not None:
            now -= _released(incoming, holders, buffers)
    return most, waiting or 0


def _released(number: int, holders: Counter, buffers: dict[int, float]) -> float:
    """The bytes that go when one more lets go of a gradient."""
    holders[number] -= 1
    return 0 if holders[number] else buffers[number]
