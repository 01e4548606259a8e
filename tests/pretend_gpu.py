"""A pretend GPU, so that code for one is tested where there is none.

    with PretendGPU() as gpu:
        model.to(gpu.name)
    gpu.launches, gpu.waits  # how often each operation ran; how often which line waited for one

Its tensors wrap a CPU tensor, and each operation runs on that one: results are the CPU's to the
bit. But as on a real GPU, an operation refuses tensors of both devices, `numpy()` is refused, and
random numbers come from the device's own generator. It is stricter than CUDA in one thing: a CPU
tensor as an index is refused too. It knows nothing of time, memory or streams. The name begins
with "cuda", as the package asks for, and torch.cuda speaks for it.
"""

import contextlib
import sys
from collections import Counter
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from torch import library
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

try:  # lets Python alone be a device; not in old versions of torch
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend as register
except ImportError:
    register = None

aten, Tag = torch.ops.aten, torch.Tag
in_use: list["PretendGPU"] = []  # the one whose `with` we are in
FREE = {aten.empty, aten.empty_strided, aten.empty_like, aten.detach, aten.alias, aten.lift_fresh}
SIZE_FROM_VALUES = {aten.masked_scatter_backward, aten.equal}  # torch has no tag for these


class GPUTensor(torch.Tensor):
    """A tensor on the pretend GPU; `plain` is the CPU tensor that has its numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, plain):
        layout = dict(strides=plain.stride(), storage_offset=plain.storage_offset())
        options = dict(dtype=plain.dtype, device=PretendGPU.name)
        return cls._make_wrapper_subclass(cls, plain.shape, **layout, **options)

    def __init__(self, plain):
        self.plain = plain

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func}: the pretend GPU is switched off")

    def tolist(self):  # torch has none for such a class
        return self.cpu().tolist()

    def __repr__(self):
        return f"GPUTensor({self.plain})"

    def __reduce_ex__(self, protocol):  # torch.save's; to be read with map_location="cpu"
        return self.cpu().detach().__reduce_ex__(protocol)


class PretendGPU(TorchDispatchMode):
    """The device within a `with`; see above. waits: {"file:line operation": times}."""

    name = "cudapretend:0"

    def __init__(self):
        super().__init__()
        self.launches, self.waits = Counter(), Counter()
        self.generator, self.undo = torch.Generator(), contextlib.ExitStack()

    def __enter__(self):
        tell_torch()
        in_use.append(self)
        self.undo.callback(in_use.clear)
        for name, value in vars(BACKEND).items():
            self.undo.enter_context(mock.patch.object(torch.cuda, name, value))
        # In a thread of its own, as CUDA's is, backward could not raise an exception.
        self.undo.enter_context(torch.autograd.set_multithreading_enabled(False))
        # `Module.to` changes the parameter itself, so that tied weights stay tied, as on CUDA.
        future = torch.__future__
        before = future.get_swap_module_params_on_conversion()
        self.undo.callback(future.set_swap_module_params_on_conversion, before)
        future.set_swap_module_params_on_conversion(True)
        # torch.tensor(..., device=) makes a CPU tensor, then copies it where it can be counted.
        self.undo.callback(torch._C._set_only_lift_cpu_tensors, False)
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.undo.close()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, operation = dict(kwargs or {}), func.overloadpacket
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        # A CPU tensor without dimensions is a number, which may go along.
        places = {type(t) is GPUTensor for t in tensors if t.dim() or type(t) is GPUTensor}
        if len(places) > 1 and operation is not aten.copy_:
            found = ", ".join(f"{t.device} {list(t.shape)}" for t in tensors)
            raise RuntimeError(f"{func}: tensors on two devices: {found}")
        to_gpu = True in places
        if kwargs.get("device") is not None:
            to_gpu = torch.device(kwargs["device"]).type != "cpu"
            kwargs["device"] = torch.device("cpu")
        if to_gpu or True in places:
            self.count(func, tensors, crosses=len(places | {to_gpu}) > 1)
        plain_args = tree_map_only(GPUTensor, lambda t: t.plain, (args, kwargs))
        out = self.run(func, *plain_args, seeded=to_gpu)
        # What works in place returns its argument: then so do we.
        known = {id(getattr(t, "plain", t)): t for t in tensors}
        wrap = GPUTensor if to_gpu else lambda t: t
        return tree_map_only(
            torch.Tensor, lambda t: known[id(t)] if id(t) in known else wrap(t), out
        )

    def run(self, func, args, kwargs, seeded: bool):
        """An operation on plain tensors; a random one draws from the device's generator."""
        if not seeded or Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        before = torch.get_rng_state()
        torch.set_rng_state(self.generator.get_state())
        try:
            return func(*args, **kwargs)
        finally:
            self.generator.set_state(torch.get_rng_state())
            torch.set_rng_state(before)

    def count(self, func, tensors, crosses: bool):
        """Note a launch and, if the host waits for it, the line outside torch that asked for it."""
        operation = func.overloadpacket
        if func.is_view or operation in FREE:
            return
        self.launches[operation.__name__] += 1
        waits = crosses or Tag.data_dependent_output in func.tags or operation in SIZE_FROM_VALUES
        if operation in (aten.index, aten.index_put, aten.index_put_):  # a mask becomes indices
            waits |= any(t.dtype == torch.bool for t in tensors[1:])
        elif Tag.dynamic_output_shape in func.tags:
            waits = True
        if waits:
            self.waits[f"{caller()} {operation.__name__}"] += 1


def caller() -> str:
    """file:line of the innermost frame that is neither torch's nor this file's."""
    frame = sys._getframe(1)
    while frame and ("/torch/" in frame.f_code.co_filename or frame.f_globals is globals()):
        frame = frame.f_back
    return f"{frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno}" if frame else "-"


class OnCPU(torch.autograd.Function):
    """A function of GPU tensors computed, and differentiated, by what torch has for a CPU.

    For those that torch would take apart on a device without a kernel of its own.
    """

    @staticmethod
    def forward(ctx, function, *tensors):
        plain = [t if t is None else t.plain.detach() for t in tensors]
        with torch.enable_grad():
            ctx.inputs = [
                t.requires_grad_(needed) if needed else t
                for t, needed in zip(plain, ctx.needs_input_grad[1:], strict=True)
            ]
            ctx.out = function(*ctx.inputs)
        in_use[0].launches[function.__name__] += 1
        return GPUTensor(ctx.out.detach())

    @staticmethod
    def backward(ctx, grad):
        asked = [t for t in ctx.inputs if t is not None and t.requires_grad]
        grads = iter(torch.autograd.grad(ctx.out, asked, grad.plain, retain_graph=True))
        in_use[0].launches["backward"] += 1
        wanted = [t is not None and t.requires_grad for t in ctx.inputs]
        return None, *[GPUTensor(next(grads)) if is_wanted else None for is_wanted in wanted]


def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, **options):
    """F.scaled_dot_product_attention of GPU tensors, by the kernel that a CPU chooses."""
    if attn_mask is not None and not isinstance(attn_mask, GPUTensor):
        raise RuntimeError("attention: its mask is on the CPU")

    def attend(q, k, v, mask):
        options = dict(is_causal=is_causal, scale=scale)
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, **options)

    return OnCPU.apply(attend, q, k, v, attn_mask)


def silu_backward(grad, x):
    """The CPU's kernel."""
    in_use[0].launches["silu_backward"] += 1
    return GPUTensor(aten.silu_backward(grad.plain, x.plain))


BACKEND = SimpleNamespace(
    is_available=lambda: bool(in_use),
    is_initialized=lambda: bool(in_use),
    device_count=lambda: len(in_use),
    current_device=lambda: 0,
    set_device=lambda device: None,
    device=lambda device: contextlib.nullcontext(),
    synchronize=lambda device=None: None,
    get_device_name=lambda device=None: "pretend GPU",
    get_device_capability=lambda device=None: (9, 0),
    manual_seed_all=lambda seed: in_use and in_use[0].generator.manual_seed(seed),
    get_rng_state=lambda device=None: in_use[0].generator.get_state(),
    set_rng_state=lambda state, device=None: in_use[0].generator.set_state(state),
    memory_allocated=lambda device=None: 0,
    memory_reserved=lambda device=None: 0,
    max_memory_allocated=lambda device=None: 0,
    mem_get_info=lambda device=None: (80 * 10**9, 80 * 10**9),
    _is_in_bad_fork=lambda: False,
)
told = []  # torch's tables of devices and kernels, which last as long as the process


def tell_torch():
    """Once a process: there is this device, and these operations are not to be taken apart."""
    if told:
        return
    module = SimpleNamespace(**vars(BACKEND), get_amp_supported_dtype=lambda: [torch.bfloat16])
    register(PretendGPU.name.split(":")[0], backend_module=module)
    kernels = library.Library("aten", "IMPL")
    kernels.impl("scaled_dot_product_attention", attention, "AutogradPrivateUse1")
    kernels.impl("silu_backward", silu_backward, "PrivateUse1")
    told.append(kernels)
