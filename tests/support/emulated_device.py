"""An emulated accelerator: tensors say that they are on another device, and hold CPU data.

Operations that mix devices raise, as on a real accelerator, and copies between both are counted.
Importing this changes torch for the whole process: only processes of their own may do it.
"""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

_module = _DummyBackendModule()
_module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
_setup_privateuseone_for_python_backend("emulated", backend_module=_module)

DEVICE = torch.device("emulated", 0)
BYTES: Counter[str] = Counter()  # copied "to" the device and "from" it

# Operations that copy from one device to another.
_COPIES = {"_to_copy", "copy_", "_copy_from", "_copy_from_and_resize", "set_"}
_COPIES.add("_has_compatible_shallow_copy_type")
# A tensor on the device may be indexed by one on the CPU.
_INDEXING = {"index", "index_put_", "index_put", "_unsafe_index", "_index_put_impl_"}
# Operations that take no number of the CPU beside tensors of the device.
_STRICT = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "stack", "cat", "lerp", "lerp_", "embedding"}
_STRICT |= {"scatter", "scatter_", "gather", "masked_select", "linear"}


class Emulated(torch.Tensor):
    """A tensor of the emulated device; `held` has its numbers."""

    @staticmethod
    def __new__(cls, held, requires_grad=False):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
            requires_grad=requires_grad,
        )
        tensor.held = held
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self):
        return f"Emulated({self.held})"

    def tolist(self):  # torch's own refuses every class of tensors but its own
        return self.held.tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError("a tensor of the emulated device has no numpy array; copy it to the CPU")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class Emulating(TorchDispatchMode):
    """Inside, `device="emulated"` makes tensors of the emulated device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _run(func, args, kwargs):
    name = func._schema.name.split("::")[1]
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    here = [x for x in tensors if isinstance(x, Emulated)]
    there = [x for x in tensors if not isinstance(x, Emulated) and x.device.type == "cpu"]
    if here and name not in _COPIES:
        _check_mixed(func, name, args, there)
    target = kwargs.get("device")
    held, options = tree_map(_held, args), dict(tree_map(_held, kwargs))
    on_device = bool(here)
    if target is not None:
        on_device = torch.device(target).type == DEVICE.type
        options["device"] = torch.device("cpu") if on_device else target
    if name == "_to_copy":
        options.pop("pin_memory", None)
        _count(tensors[0], bool(here), on_device)
    if name == "copy_":
        _count(args[1], isinstance(args[1], Emulated), isinstance(args[0], Emulated))
        func(*held, **options)
        return args[0]
    result = func(*held, **options)
    if func._schema.is_mutable and (written := _written(func, args, kwargs)):
        return written[0] if len(written) == 1 or name.endswith("_") else tuple(written)
    if not on_device:
        return result
    return tree_map(lambda x: Emulated(x) if type(x) is torch.Tensor else x, result)


def _held(value):
    return value.held if isinstance(value, Emulated) else value


def _count(tensor, was_here, is_here):
    if was_here != is_here:
        BYTES["to" if is_here else "from"] += tensor.numel() * tensor.element_size()


def _check_mixed(func, name, args, there):
    """Raise if an operation on tensors of the device reads or writes others."""
    mixed = [x for x in there if x.dim() > 0 or name in _STRICT]
    if name in _INDEXING and isinstance(args[0], Emulated):
        mixed = [x for x in args[2:3] if type(x) is torch.Tensor and x.dim() > 0]
    if not mixed and name.endswith("_") and type(args[0]) is torch.Tensor and args[0].dim() == 0:
        mixed = [args[0]]
    if mixed:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {func} has some on the emulated "
            f"device and some on the CPU, of shapes {[tuple(x.shape) for x in mixed]}"
        )


def _written(func, args, kwargs):
    """Return the tensors that an operation writes to."""
    written = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[position] if position < len(args) else kwargs.get(argument.name)
            if isinstance(given, torch.Tensor):
                written.append(given)
    return written


_tensor = torch.tensor


def _make_tensor(data, *args, device=None, **kwargs):
    made = _tensor(data, *args, **kwargs)
    return made if device is None else made.to(device)


torch.tensor = _make_tensor
# A weight keeps its identity when it moves, as between the CPU and CUDA.
torch.__future__.set_swap_module_params_on_conversion(True)
