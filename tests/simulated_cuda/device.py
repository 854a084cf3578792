"""A CUDA device that is not there: CPU tensors that say they are on one, so that its traps show on any machine.

What a GPU punishes and a CPU hides: work on tensors of two devices, memory of the host handed to a kernel, and waits
for the device (`.item()`, a blocking copy, a boolean index). Inside `simulated_cuda()` a tensor moved to "cuda" is
computed by the CPU, kernels run in Triton's interpreter on what is behind it, mixed devices raise as CUDA does, and
waits are noted with their place. It cannot show races, timing, graphs, what inductor makes for the device or how that
rounds; nor what `torch.cuda.is_available()` decides (it says no), generators of the device, the types CUDA's autocast
gives (the CPU's are used), streams of backward's own thread, or that copies from memory that is not pinned may wait.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

from soundwave_fast.ops import backend

DEVICE = torch.device("cuda", 0)
ROOT = Path(__file__).resolve().parents[2]
TORCH = str(Path(torch.__file__).parent)
OURS = ("csrc_triton/", "soundwave_fast/", "train/")

aten = torch.ops.aten
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
JOINING = {aten.cat.default, aten.stack.default}  # these take no scalar of the host, as arithmetic does
WAITING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}  # the host needs a value, or a size


class Wait(NamedTuple):
    """What made the host wait, and the line in front of torch that did it: "soundwave_fast/packed.py:76"."""

    what: str
    where: str

    @property
    def ours(self) -> bool:
        """Whether it is in this library, not in transformers, peft or a test."""
        return self.where.startswith(OURS)


waits: list[Wait] = []
on_the_way: list[tuple[torch.Tensor, torch.Tensor]] = []  # copies to the host that nobody has waited for, their values


def note(what: str) -> None:
    """A wait, called for by the innermost line that is neither torch's nor this file's. What was on the way arrives."""
    frame = sys._getframe(1)
    while frame.f_back and (frame.f_code.co_filename == __file__ or frame.f_code.co_filename.startswith(TORCH)):
        frame = frame.f_back
    path = frame.f_code.co_filename.removeprefix(f"{ROOT}/").rpartition("site-packages/")[2]
    waits.append(Wait(what, f"{path}:{frame.f_lineno}"))
    while on_the_way:
        copy, value = on_the_way.pop()
        copy.copy_(value)


class OnDevice(torch.Tensor):
    """A tensor "on cuda:0"; `.behind` is the CPU tensor that holds its values.

    C++ takes it for a CPU tensor, since autograd asks the guard of a device for its streams; Python is told otherwise.
    """

    behind: torch.Tensor
    device, is_cuda, is_cpu = DEVICE, True, False
    __torch_function__ = torch._C._disabled_torch_function_impl  # nothing becomes one of these but by dispatch

    @staticmethod
    def __new__(cls, behind: torch.Tensor) -> OnDevice:
        like = {"strides": behind.stride(), "storage_offset": behind.storage_offset(), "dtype": behind.dtype}
        out = torch.Tensor._make_wrapper_subclass(cls, behind.shape, **like)
        out.behind = behind.detach()
        return out

    def __repr__(self) -> str:
        return f"OnDevice({self.behind!r})"

    def tolist(self) -> Any:
        note("tolist")
        return self.behind.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def data_ptr(self) -> int:
        return self.behind.data_ptr()

    def cpu(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return moved(self, "cpu", False)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """One operation: its inputs checked, its waits noted, its values computed behind."""
        kwargs = kwargs or {}
        check(func, args, kwargs)
        out = func(*behind(args), **behind(kwargs))
        if func is aten.copy_.default and not isinstance(args[0], OnDevice):
            return args[0]
        return return_and_correct_aliasing(func, args, kwargs, tree_map_only(torch.Tensor, OnDevice, out))


def behind(tree: Any) -> Any:
    return tree_map_only(OnDevice, lambda x: x.behind, tree)


def read(tree: Any) -> Any:
    """Values of tensors all of which must be on the device."""
    left = [tuple(x.shape) for x in tree_leaves(tree) if isinstance(x, torch.Tensor) and not isinstance(x, OnDevice)]
    assert not left, f"left on the host: {left}"
    return behind(tree)


def check(func: Any, args: tuple, kwargs: dict) -> None:
    """Raises where CUDA would refuse the operation, and notes where it would wait."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    host = [x for x in tensors if not isinstance(x, OnDevice)]
    strays = [x for x in host if x.dim() > 0 or func in JOINING]
    if func in INDEXING:
        indices = [i for i in args[1] if i is not None]
        if not isinstance(args[0], OnDevice):
            raise RuntimeError(f"{func}: indices on cuda:0 into a tensor of the host")
        if any(x is value for value in args[2:3] for x in strays):
            raise RuntimeError(f"{func}: values of the host put into a tensor on cuda:0")
        if any(i.dtype in (torch.bool, torch.uint8) for i in indices):
            note(f"{func} by a mask")
        elif any(not isinstance(i, OnDevice) and i.dim() for i in indices):
            note(f"{func} by indices of the host")
    elif func is aten.copy_.default:
        if host and not (args[2] if len(args) > 2 else kwargs.get("non_blocking")):
            note("a copy between host and device")
    elif strays and not (_by_autograd() and not any(x.any() for x in strays)):
        raise RuntimeError(f"{func}: tensors on cuda:0 and on the host, the latter {[tuple(x.shape) for x in strays]}")
    elif not WAITING.isdisjoint(func.tags) and kwargs.get("output_size") is None:
        note(str(func))


def _by_autograd() -> bool:
    """Whether its engine called: C++ makes zeros for what nobody used, and takes these tensors to be on the host."""
    return sys._getframe(3).f_code.co_filename.endswith("torch/autograd/graph.py")


class ToDevice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> OnDevice:
        return OnDevice(x.detach().clone())

    @staticmethod
    def backward(ctx: Any, grad: OnDevice) -> torch.Tensor:
        return grad.behind


class ToHost(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: OnDevice) -> torch.Tensor:
        return x.behind.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> OnDevice:
        return OnDevice(grad)


def moved(x: torch.Tensor, place: str, non_blocking: bool) -> torch.Tensor:
    if isinstance(x, OnDevice) == (place == "cuda"):
        return x
    if not non_blocking:
        note(f"a copy to {place}")
    out = (ToDevice if place == "cuda" else ToHost).apply(x)
    if non_blocking and place == "cpu":  # not there yet: whoever reads it without a wait reads this
        on_the_way.append((out.detach(), out.detach().clone()))
        out.detach().fill_(torch.tensor(113).to(out.dtype))
    return out


# -- what of torch is replaced meanwhile ---------------------------------------------------------------------------

TO = torch.Tensor.to
FACTORIES = """arange as_tensor empty empty_like empty_strided eye full full_like linspace ones ones_like rand rand_like
randint randn randn_like randperm scalar_tensor tensor tril_indices triu_indices zeros zeros_like""".split()


def to(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`Tensor.to`, of either kind."""
    place, rest = kwargs.pop("device", None), []
    for a in (*args, kwargs.pop("other", None)):
        if isinstance(a, torch.Tensor):
            place, rest = a.device, [a.dtype]
        elif isinstance(a, (str, torch.device)):
            place = a
        elif isinstance(a, bool):
            kwargs.setdefault("non_blocking", a)
        elif a is not None:
            rest.append(a)
    if place is not None:
        x = moved(x, torch.device(place).type, bool(kwargs.get("non_blocking")))
    return TO(x, *rest, **kwargs) if rest or "dtype" in kwargs else x


def factory(name: str) -> Callable[..., torch.Tensor]:
    """`torch.name`, on the host or on the device that is not there."""
    original = getattr(torch, name)

    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        model = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if name == "as_tensor" and model is not None:
            wanted = [a for a in (*args[1:], *kwargs.values()) if a is not None]
            return model.to(*wanted) if wanted else model
        place = kwargs.pop("device", model.device if isinstance(model, OnDevice) else None)
        if place is None or torch.device(place).type != "cuda":
            return original(*behind(args), device=place, **kwargs)
        if isinstance(model, OnDevice):
            return original(*args, **kwargs)
        if name in ("tensor", "as_tensor"):
            note(f"{name} of values of the host")
        grad = kwargs.pop("requires_grad", False)
        return OnDevice(original(*args, **kwargs)).requires_grad_(grad)

    return make


def grouped(lists: list, with_indices: bool = False) -> dict:
    """For `clip_grad_norm_`, whose own grouping asks C++ which device a tensor is on."""
    return {(x[0].device, x[0].dtype): ([list(x) for x in lists], []) for x in lists[:1]}


def on_cpu(function: Callable, device: str, *args: Any, **kwargs: Any) -> Any:
    return function("cpu", *args, **kwargs)


class Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.recorded = False

    def record(self, *args: Any) -> None:
        self.recorded = True

    def synchronize(self) -> None:
        if self.recorded:  # CUDA returns at once from one that never was
            note("an event")


@contextlib.contextmanager
def simulated_cuda() -> Iterator[list[Wait]]:
    """Yields the waits so far, a list that grows. Nothing inside is compiled: torch.compile returns its function."""
    from torch.distributed.checkpoint._state_dict_stager import StateDictStager
    from torch.utils._device import _device_constructors
    from triton.runtime.interpreter import GridExecutor

    _device_constructors()  # `with torch.device("meta")` remembers the factories it has seen first: torch's own
    launch, generator, stage = GridExecutor.__call__, torch.Generator, StateDictStager._offload_tensor

    def on_device(self: Any, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(x, torch.Tensor) and not isinstance(x, OnDevice) for x in tree_leaves((args, kwargs))):
            raise RuntimeError(f"{self.fn.__name__}: a kernel was handed memory of the host")
        return launch(self, *behind(args), **behind(kwargs))

    def staged(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return stage(self, behind(x), *args, **kwargs)  # a checkpoint copies bytes of storages, which these have not

    def compiled(function: Any = None, **options: Any) -> Any:
        return function if function is not None else lambda f: f

    replaced = [(torch, name, factory(name)) for name in FACTORIES]
    replaced += [(torch, "Generator", lambda device="cpu": generator("cpu")), (torch, "compile", compiled)]
    replaced += [(torch.Tensor, "to", to), (torch.Tensor, "cuda", lambda x, *a, **k: to(x, "cuda", *a, **k))]
    replaced += [(torch.cuda, "Event", Event), (torch.cuda, "current_stream", lambda device=None: None)]
    for name in ("autocast", "is_autocast_enabled", "get_autocast_dtype"):  # C++ follows the CPU's
        replaced += [(torch, name, functools.partial(on_cpu, getattr(torch, name)))]
    replaced += [(torch.nn.utils.clip_grad, "_group_tensors_by_device_and_dtype", grouped)]
    replaced += [(StateDictStager, "_offload_tensor", staged)]
    replaced += [(GridExecutor, "__call__", on_device), (backend, "_PLAIN", (*backend._PLAIN, OnDevice))]
    waits.clear()
    on_the_way.clear()
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # model.to("cuda") keeps parameters, and ties
    with contextlib.ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, swaps)
        yield waits
