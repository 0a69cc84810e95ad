"""The pretended card: tensors on the CPU are real, those on "cuda" are FakeTensors, with shapes and dtypes and no contents."""

import traceback
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
ROOT = Path(__file__).parents[2]
OURS = tuple(f"{ROOT / folder}/" for folder in ("placeholder", "benchmarks"))
GRANULE = 512  # bytes: PyTorch's allocator rounds up to it
VALUE = 0.5  # what every number on the card is when it is read
READS = {
    aten._local_scalar_dense.default: "item",
    aten.is_nonzero.default: "bool",
    aten.equal.default: "equal",
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten._unique2.default: "unique",
}
PRODUCTS = tuple(kind.default for kind in (aten.mm, aten.bmm, aten.addmm, aten.addmm_, aten.convolution, aten.linear))


def where() -> str:
    """The innermost line of the package or the benchmarks that is running."""
    for frame in reversed(traceback.extract_stack()):
        if frame.filename.startswith(OURS):
            return f"{Path(frame.filename).relative_to(ROOT)}:{frame.lineno}"
    return "elsewhere"


class Card(TorchDispatchMode):
    """A card of so many bytes. It counts, with their places, what happens on it.

    `waits`: what waits for the device. `blocking`: copies to it that do. `captured`: what reads tensors of the host in a CUDA
    graph, and would read the same in each replay. `mixed`: operations on tensors of both devices. `attention`: kernels by name,
    heads and mask. `kernels`: operations that compute. `live` and `peak`: bytes.
    """

    def __init__(self, total: int):
        super().__init__()
        self.fakes = FakeTensorMode(allow_non_fake_inputs=True)
        self.total, self.live, self.peak, self.kernels = total, 0, 0, 0
        self.waits, self.blocking, self.mixed, self.attention = Counter(), Counter(), Counter(), Counter()
        self.capturing, self.captured = False, Counter()
        self._storages: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(is_traceable_wrapper_subclass(tensor) for tensor in tensors if not isinstance(tensor, FakeTensor)):
            return NotImplemented
        if function is aten.is_pinned.default:
            return True
        if function is aten._pin_memory.default:
            return args[0].clone()
        on_card = [tensor for tensor in tensors if self.has(tensor)]
        device = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        to_card = device is not None and device.type == "cuda"
        if not on_card and not to_card:
            return self._on_the_host(function, args, kwargs, tensors)
        if on_card and (read := self._read(function, args, kwargs, device)) is not None:
            return read[0]
        self._note(function, args, kwargs, tensors, on_card)
        kwargs = {name: value for name, value in kwargs.items() if name not in ("pin_memory", "generator")}
        with self.fakes:
            args, kwargs = tree_map_only(Tensor, _without_contents, (args, kwargs))
            outputs = function(*args, **kwargs)
        self._count_bytes(outputs)
        return outputs

    def has(self, tensor: Tensor) -> bool:
        """Whether a tensor is on the card."""
        return isinstance(tensor, FakeTensor) and tensor.fake_device.type == "cuda"

    def _on_the_host(self, function: Any, args: tuple, kwargs: dict, tensors: list[Tensor]) -> Any:
        if any(isinstance(tensor, FakeTensor) for tensor in tensors):
            with self.fakes:
                return function(*args, **kwargs)
        return function(*args, **(kwargs | {"pin_memory": False} if kwargs.get("pin_memory") else kwargs))

    def _read(self, function: Any, args: tuple, kwargs: dict, device: torch.device | None) -> tuple[Any] | None:
        """What an operation that brings contents to the host gives, in a tuple; it waits for the device."""
        if function is aten._to_copy.default and device is not None and device.type == "cpu":
            self.waits["copy to the host", where()] += 1
            return (_contents(args[0], kwargs.get("dtype") or args[0].dtype),)
        if function is aten.copy_.default and not self.has(args[0]):
            self.waits["copy to the host", where()] += 1
            return (args[0].copy_(_contents(args[1], args[0].dtype).expand_as(args[0])),)
        masked = function is aten.index.Tensor and any(isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1])
        if not masked and function not in READS:
            return None
        self.waits["index by a mask" if masked else READS[function], where()] += 1
        if function is aten._local_scalar_dense.default:
            return (VALUE if args[0].is_floating_point() else args[0].dtype == torch.bool or 1,)
        if function in (aten.is_nonzero.default, aten.equal.default):
            return (function is aten.is_nonzero.default,)
        if function is aten.nonzero.default:  # as if there were one
            with self.fakes:
                return (torch.zeros((1, args[0].ndim), dtype=torch.long, device="cuda"),)
        return None

    def _note(self, function: Any, args: tuple, kwargs: dict, tensors: list[Tensor], on_card: list[Tensor]) -> None:
        self.kernels += _computes(function)
        if self.capturing and len(on_card) < len(tensors):
            self.captured[str(function), where()] += 1
        source = None  # of a copy to the card
        if function is aten._to_copy.default and not on_card:
            source, non_blocking = args[0], kwargs.get("non_blocking")
        elif function is aten.copy_.default and not self.has(args[1]):
            source, non_blocking = args[1], args[2] if len(args) > 2 else kwargs.get("non_blocking")
        if source is not None and source.ndim:
            if not non_blocking:
                self.blocking[tuple(source.shape), where()] += 1
        elif on_card and any(not isinstance(tensor, FakeTensor) and tensor.ndim for tensor in tensors):
            self.mixed[str(function), where()] += 1
        dtypes = {argument.dtype for argument in args if isinstance(argument, Tensor)}
        if function in PRODUCTS and len(dtypes) > 1:
            raise RuntimeError(f"{function} on {dtypes} at {where()}")

    def _count_bytes(self, outputs: Any) -> None:
        for tensor in tree_leaves(outputs):
            if not isinstance(tensor, Tensor) or not self.has(tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self._storages:
                size = -(-storage.nbytes() // GRANULE) * GRANULE
                self._storages.add(storage._cdata)
                self.live += size
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._freed, storage._cdata, size)

    def _freed(self, address: int, size: int) -> None:
        self._storages.discard(address)
        self.live -= size


def _computes(function: Any) -> bool:
    """Whether an operation launches a kernel: it is no view, no allocation and no question."""
    views = any(found.alias_info and not found.alias_info.is_write for found in function._schema.returns)
    return not views and not function._schema.name.startswith(
        ("prim::", "aten::empty", "aten::new_empty", "aten::_unsafe_view")
    )


def _without_contents(tensor: Tensor) -> Tensor:
    """A real tensor as a fake one on the CPU; the mode's own conversion leaves a reference with which no module can move."""
    if isinstance(tensor, FakeTensor):
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")


def _contents(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.full(tuple(tensor.shape), VALUE if dtype.is_floating_point else 1, dtype=dtype)
