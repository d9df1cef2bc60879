"""Tensors that have a size and no content, and a count of the bytes that living tensors take."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.utils._python_dispatch import TorchDispatchMode
from trl.kernels import chunked_logprob
from trl.trainer import utils as trl_utils

aten = torch.ops.aten
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
PICKS = (aten.topk.default, aten.sort.default)  # give values and their places
DRAWS = (aten.argmax.default, aten.multinomial.default)  # give places alone


class Meter(TorchDispatchMode):
    """Counts the bytes of living tensors after each operation, and the most of them at each moment.

    What a kernel takes and returns inside is not seen, but for the 4-bit weights that bitsandbytes unpacks.
    """

    def __init__(self):
        super().__init__()
        self.now, self.moment = 0, ""
        self.peaks: Counter[str] = Counter()
        self._seen: set[int] = set()

    @property
    def peak(self) -> int:
        return max(self.peaks.values())

    def enter(self, moment: str) -> None:
        self.moment = moment
        self._note()

    def watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += size
        self._note()
        weakref.finalize(storage, self._forget, key, size)

    def _note(self) -> None:
        self.peaks[self.moment] = max(self.peaks[self.moment], self.now)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name() == "bitsandbytes::gemm_4bit":
            from bitsandbytes.backends.default.ops import _gemm_4bit_default_impl

            with self:
                return _gemm_4bit_default_impl(*args, **(kwargs or {}))
        result = self.call(function, args, kwargs or {})
        for tensor in _tensors_in(result):
            self.watch(tensor)
        return result

    def call(self, function: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        return function(*args, **kwargs)


class Fakes(Meter):
    """Makes every floating tensor a fake one, of which torch computes the shape and nothing else.

    Integers and truth values stay real: token ids, positions and masks decide what a model does next. Where a model
    picks or draws by numbers that are not there, it picks evenly, as a balanced mixture of experts does.
    """

    def __init__(self):
        super().__init__()
        self._mode, self._device = FakeTensorMode(), torch.device("cpu")

    def call(self, function: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        tensors = [*_tensors_in(args), *_tensors_in([*kwargs.values()])]
        if not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            return function(*args, **kwargs) if tensors else self._make(function, args, kwargs)
        if function is torch.ops.prim.device.default:
            return self._device
        if function is aten._local_scalar_dense.default:  # Tensor.item
            return torch.zeros((), dtype=args[0].dtype).item()
        if function in INDEXING:
            args = (args[0], [place for index in args[1] for place in _places(index)], *args[2:])
        result = self._fake(function, args, kwargs)
        if function in PICKS:
            places = torch.arange(result[1].numel()) % args[0].shape[-1]
            return result[0], places.view(result[1].shape)
        return torch.zeros(result.shape, dtype=result.dtype) if function in DRAWS else result

    def _make(self, function: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """A tensor made of none."""
        made = self._fake(function, args, {**kwargs, "device": "meta"})
        return made if made.is_floating_point() else function(*args, **kwargs)

    def _fake(self, function: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What FakeTensorMode does, without its cache, which takes five times as long as the operation itself."""
        args = _changed(args, _to_meta)
        kwargs = {name: "meta" if name == "device" else _changed(value, _to_meta) for name, value in kwargs.items()}
        with in_kernel_invocation_manager(self._mode):
            result = _grouped_mm(*args, **kwargs) if function is aten._grouped_mm.default else function(*args, **kwargs)
        return _changed(result, self._wrap)

    def _wrap(self, tensor: Tensor) -> FakeTensor:
        return tensor if isinstance(tensor, FakeTensor) else FakeTensor(self._mode, tensor, self._device)


def _to_meta(tensor: Tensor) -> Tensor:
    return tensor if isinstance(tensor, FakeTensor) else tensor.to("meta")


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in an operation's argument or result."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors_in(each)


def _changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """An operation's argument or result with every tensor in it changed."""
    if isinstance(value, Tensor):
        return change(value)
    return type(value)(_changed(each, change) for each in value) if isinstance(value, list | tuple) else value


def _grouped_mm(one: Tensor, other: Tensor, offsets: Tensor, *_others: Any) -> Tensor:
    """Products of groups of rows, which torch 2.13 computes in float32 too, and shapes in bfloat16 only."""
    groups = offsets.shape if one.dim() == other.dim() else ()
    return one.new_empty((*groups, one.shape[-2], other.shape[-1]))


def _places(index: Tensor | None) -> tuple[Tensor | None, ...]:
    is_mask = index is not None and index.dtype == torch.bool
    return index.nonzero(as_tuple=True) if is_mask else (index,)


@contextlib.contextmanager
def as_on_cuda() -> Iterator[None]:
    """On fake CPU tensors, what a GPU would do: TRL's LM head in Triton, and autocast and dropout as CUDA has them.

    With Triton, TRL scores the labelled positions only and folds each tile where it stands (TRL 1.16). PEFT leaves an
    input as it is where it sees autocast, and asks for CUDA's only (PEFT 0.21).
    """
    in_place, enabled = lambda *args, **kwargs: None, torch.is_autocast_enabled
    with (
        _replaced(trl_utils, _use_triton=lambda device: True),
        _replaced(chunked_logprob, _forward_tile=in_place, _backward_tile=in_place),
        _replaced(torch, is_autocast_enabled=lambda device="cpu": enabled(device)),
        _replaced(nn.functional, dropout=_dropout, layer_norm=_layer_norm),
    ):
        yield


@contextlib.contextmanager
def _replaced(module: Any, **others: Any) -> Iterator[None]:
    own = {name: getattr(module, name) for name in others}
    vars(module).update(others)
    try:
        yield
    finally:
        vars(module).update(own)


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """As on a GPU, with a byte for each number that is kept or dropped."""
    return torch.native_dropout(x, p, training)[0] if training and p else x


def _layer_norm(*args: Any, own: Callable = nn.functional.layer_norm) -> Tensor:
    """As on a GPU, where autocast has it computed in float32."""
    return own(*(_changed(args, Tensor.float) if torch.is_autocast_enabled("cpu") else args))


def held_tensors(weight: Tensor) -> Iterator[Tensor]:
    """A weight, and the tensors in which bitsandbytes keeps its scales where it is a 4-bit one."""
    yield weight
    state = getattr(weight, "quant_state", None)
    while state is not None:
        yield from (value for value in vars(state).values() if isinstance(value, Tensor))
        state = state.state2
