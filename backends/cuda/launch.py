"""Loads compiled kernels and launches them through the CUDA driver API, on torch's current stream.

Only ctypes and libcuda are needed, so a machine with a warm kernel cache needs no compiler. Launching copies no data and
waits for nothing, so it can be captured into a CUDA graph.

Most of a launch is made ready once (`Launch`): a step calls the same GEMMs at the same addresses again and again, and the
driver's call alone takes a tenth of the time that making its arguments takes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from fp8c.backends.cuda.build import Instance, cubin
from fp8c.backends.cuda.config import BLOCK_K, GemmConfig, Grouping, Scales
from fp8c.diagnostics import ExitCode, fail

# Values of the driver's enums (cuda.h).
_MAX_DYNAMIC_SHARED_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_UINT8, _FLOAT32, _BFLOAT16 = 0, 7, 9  # CUtensorMapDataType
_NO_SWIZZLE, _SWIZZLE_128B = 0, 3  # CUtensorMapSwizzle
_PROMOTE_L2_256B = 3  # CUtensorMapL2promotion
_INVALID_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT
_PROGRAMMATIC_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION

_TENSOR_MAP_BYTES, _TENSOR_MAP_ALIGNMENT = 128, 64
TMA_ALIGNMENT_BYTES = 16  # of addresses and row strides


class _Problem(ctypes.Structure):
    """`Problem` in schedule.cuh."""

    _fields_ = [(name, ctypes.c_int) for name in ("m", "n", "k", "groups")] + [("group_ends", ctypes.c_void_p)]


class _Arguments(ctypes.Structure):
    """`Arguments` in gemm.cu."""

    _fields_ = [
        ("problem", _Problem),
        ("scale_a", ctypes.c_void_p),
        ("scale_a_col", ctypes.c_longlong),
        ("scale_b", ctypes.c_void_p),
        ("scale_b_group", ctypes.c_longlong),
        ("scale_b_row", ctypes.c_longlong),
        ("scale_b_col", ctypes.c_longlong),
        ("out", ctypes.c_void_p),
        ("out_group", ctypes.c_longlong),
        ("out_row", ctypes.c_longlong),
        ("out_aligned", ctypes.c_int),
    ]


class _LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute: an id, padding, and a 64-byte union of which only the first int is used here."""

    _fields_ = [("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_int * 16)]


class _LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid_x", ctypes.c_uint),
        ("grid_y", ctypes.c_uint),
        ("grid_z", ctypes.c_uint),
        ("block_x", ctypes.c_uint),
        ("block_y", ctypes.c_uint),
        ("block_z", ctypes.c_uint),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_LaunchAttribute)),
        ("attribute_count", ctypes.c_uint),
    ]


@cache
def _driver() -> ctypes.CDLL:
    """Raises: E0432 on a machine without an NVIDIA driver."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise fail(
            "E0432",
            f"the CUDA driver can't be loaded: {error}",
            help="install NVIDIA's driver, or run on the CPU (target='cpu')",
            exit_code=ExitCode.TARGET,
        ) from None


@cache
def _launcher() -> Callable[[int, Any, int, None], int]:
    """cuLaunchKernelEx, told its argument types once: converting integers is cheaper than making ctypes objects."""
    function: Any = _driver().cuLaunchKernelEx
    function.argtypes = [ctypes.c_void_p] * 4
    return function  # type: ignore[no-any-return]


def _check(status: int, call: str) -> None:
    if status == 0:
        return
    text = ctypes.c_char_p()
    _driver().cuGetErrorString(status, ctypes.byref(text))
    message = text.value.decode() if text.value else "unknown error"
    raise fail("E0432", f"the CUDA driver failed in {call}: {message} ({status})", exit_code=ExitCode.TARGET)


@cache
def _function(config: Instance, device_index: int) -> ctypes.c_void_p:
    """The kernel loaded into the context of this device, which must be the current one."""
    torch.cuda.current_stream()  # creates the context
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _check(_driver().cuModuleLoadData(ctypes.byref(module), cubin(config)), "cuModuleLoadData")
    _check(_driver().cuModuleGetFunction(ctypes.byref(function), module, config.kernel.encode()), "cuModuleGetFunction")
    status = _driver().cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED_BYTES, config.shared_bytes)
    _check(status, "cuFuncSetAttribute")
    return function


@cache
def multiprocessors(device_index: int) -> int:
    return int(torch.cuda.get_device_properties(device_index).multi_processor_count)


_reserved = 0


def reserve_multiprocessors(count: int) -> None:
    """Start GEMMs on `count` SMs fewer from now on. Their thread blocks share the tiles evenly from the start, so one
    that has to wait for an SM that communication holds would make the others wait for it."""
    global _reserved
    _reserved = count


def reserved_multiprocessors() -> int:
    return _reserved


@dataclass(frozen=True)
class _TensorMap:
    memory: ctypes.Array[ctypes.c_uint8]  # keeps `address` alive
    address: int


@lru_cache(maxsize=4096)
def _tensor_map(
    address: int, dtype: int, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...], swizzle: int
) -> _TensorMap:
    """A tiled tensor map, innermost axis first; `strides` in bytes, of all axes but the innermost."""
    memory = (ctypes.c_uint8 * (_TENSOR_MAP_BYTES + _TENSOR_MAP_ALIGNMENT))()
    aligned = -(-ctypes.addressof(memory) // _TENSOR_MAP_ALIGNMENT) * _TENSOR_MAP_ALIGNMENT
    rank = len(sizes)
    status = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(aligned),
        dtype,
        rank,
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * rank)(*sizes),
        (ctypes.c_uint64 * (rank - 1))(*strides),
        (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        0,  # no interleaving
        swizzle,
        _PROMOTE_L2_256B,
        0,  # zeros outside
    )
    _check(status, "cuTensorMapEncodeTiled")
    return _TensorMap(memory, aligned)


def _payload_map(data: Tensor, rows: int) -> _TensorMap:
    """Map of an FP8 operand [..., rows, K], K innermost, its leading axes merged into the rows; boxes of `rows` x 128."""
    k, stride = data.shape[-1], data.stride(-2)
    total = data.numel() // max(k, 1)
    return _tensor_map(data.data_ptr(), _UINT8, (k, total), (stride,), (BLOCK_K, rows), _SWIZZLE_128B)


def _scale_map(scale: Tensor, rows: int) -> _TensorMap:
    """Map of 1x128 scales, logically [rows, K / 128], stored with the rows innermost."""
    return _tensor_map(
        scale.data_ptr(), _FLOAT32, (scale.shape[0], scale.shape[1]), (scale.stride(1) * 4,), (rows, 1), _NO_SWIZZLE
    )


def _output_map(out: Tensor, config: GemmConfig) -> _TensorMap:
    size = out.element_size()
    sizes = (out.shape[-1], out.shape[-2], out.shape[0] if out.dim() == 3 else 1)
    row = out.stride(-2) * size
    group = out.stride(0) * size if out.dim() == 3 else row * sizes[1]
    swizzle = _SWIZZLE_128B if config.chunk * size == 128 else _NO_SWIZZLE
    dtype = _BFLOAT16 if size == 2 else _FLOAT32
    return _tensor_map(out.data_ptr(), dtype, sizes, (row, group), (config.chunk, config.out_box_rows, 1), swizzle)


def _is_aligned(out: Tensor) -> bool:
    strides = [out.data_ptr(), *(s * out.element_size() for s in out.stride()[:-1])]
    return out.stride(-1) == 1 and all(s % TMA_ALIGNMENT_BYTES == 0 for s in strides)


def current_stream(device_index: int) -> int:
    """Address of torch's current stream of a device."""
    return int(torch._C._cuda_getCurrentRawStream(device_index))


@dataclass(frozen=True)
class Launch:
    """One GEMM at fixed addresses, on one stream, ready to be started any number of times from any thread.

    config, parameters: addresses of what the driver reads (it copies them before it returns); `kept` holds that memory
    """

    device_index: int
    function: ctypes.c_void_p
    config: int
    parameters: int
    kept: tuple[object, ...]

    def start(self) -> None:
        """Raises: E0432 when the driver refuses."""
        if torch.cuda.current_device() == self.device_index:
            self._start()
        else:
            with torch.cuda.device(self.device_index):
                self._start()

    def _start(self) -> None:
        status = _launcher()(self.config, self.function, self.parameters, None)
        if status == _INVALID_CONTEXT:  # this thread has run nothing on the device yet
            _make_current(self.device_index)
            status = _launcher()(self.config, self.function, self.parameters, None)
        _check(status, "cuLaunchKernelEx")


def _make_current(device_index: int) -> None:
    context = ctypes.c_void_p()
    _check(_driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), device_index), "cuDevicePrimaryCtxRetain")
    _check(_driver().cuCtxSetCurrent(context), "cuCtxSetCurrent")


def launch(
    config: GemmConfig,
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    out: Tensor,
    group_ends: Tensor | None = None,
) -> None:
    """Start one GEMM on the current stream of the operands' device: `prepare`."""
    prepare(config, a, a_scale, b, b_scale, out, group_ends).start()


def prepare(
    config: GemmConfig,
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    out: Tensor,
    group_ends: Tensor | None = None,
) -> Launch:
    """Make one GEMM ready for the current stream of the operands' device.

    Shapes: dense      a [M, K], b [N, K] -> out [M, N]
            m-grouped  a [T, K], b [E, N, K], group_ends int32 [E] -> out [T, N]
            k-grouped  a [N, T], b [K, T], group_ends int32 [E] -> out [E, N, K]
    Layout: payloads have the reduction innermost, addresses and row strides multiples of 16 bytes; 1x128 scales have the
            rows innermost, row stride a multiple of 4. The caller (`gemm.py`) has checked all this.
    """
    index = a.device.index
    with torch.cuda.device(index):
        function = _function(config, index)
        # The blocks of a cluster share a pair of SMs: whoever takes one of them takes the pair.
        sms = max(config.cluster, multiprocessors(index) - _reserved * config.cluster)
        rows_a = min(a.shape[0], config.a_box) if config.has_one_box_of_rows else config.a_box
        map_a, map_b = _payload_map(a, rows_a), _payload_map(b, config.b_box)
        map_scale_a = map_a if config.scales is Scales.PER_TENSOR else _scale_map(a_scale, config.scale_a_box)
        map_scale_b = _scale_map(b_scale, config.tile_n) if config.scales is Scales.PER_ROW else map_a
        is_aligned = _is_aligned(out)
        map_out = _output_map(out, config) if is_aligned else map_a

    n, groups = b.shape[-2], 1 if group_ends is None else group_ends.shape[0]
    ends = 0 if group_ends is None else group_ends.data_ptr()
    blocks = config.scales is Scales.PER_BLOCK
    arguments = _Arguments(
        _Problem(a.shape[0], n, a.shape[1], groups, ends),
        a_scale.data_ptr(),
        a_scale.stride(-1),
        b_scale.data_ptr(),
        b_scale.stride(0) if blocks and b_scale.dim() == 3 else 0,
        b_scale.stride(-2) if blocks else 0,
        b_scale.stride(-1) if blocks else 0,
        out.data_ptr(),
        out.stride(0) if out.dim() == 3 else 0,
        out.stride(-2),
        int(is_aligned),
    )
    maps = (map_a, map_b, map_scale_a, map_scale_b, map_out)
    parameters = (ctypes.c_void_p * 6)(*(m.address for m in maps), ctypes.addressof(arguments))
    grid = sms
    if config.grouping is Grouping.DENSE:
        grid = min(sms, config.pairs(a.shape[0], n) * config.cluster)
    grid -= grid % config.cluster
    attribute = _LaunchAttribute(_PROGRAMMATIC_SERIALIZATION)
    attribute.value[0] = 1
    launch_config = _LaunchConfig(
        grid, 1, 1, config.threads, 1, 1, config.shared_bytes, current_stream(index), ctypes.pointer(attribute), 1
    )
    kept = (*maps, arguments, parameters, attribute, launch_config)
    return Launch(index, function, ctypes.addressof(launch_config), ctypes.addressof(parameters), kept)


def launch_plain(
    config: Instance,
    blocks: int,
    threads: int,
    arguments: ctypes.Structure,
    device: torch.device,
    starts_early: bool = False,
) -> None:
    """Start a kernel of one structure of arguments on the current stream of a device; one that waits itself for the kernel
    before it may start early, beside that one's last blocks."""
    assert device.index is not None
    with torch.cuda.device(device.index):
        function = _function(config, device.index)
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        attribute = _LaunchAttribute(_PROGRAMMATIC_SERIALIZATION)
        attribute.value[0] = starts_early
        stream = current_stream(device.index)
        how = _LaunchConfig(
            blocks, 1, 1, threads, 1, 1, config.shared_bytes, stream, ctypes.pointer(attribute), int(starts_early)
        )
        status = _launcher()(ctypes.addressof(how), function, ctypes.addressof(parameters), None)
        _check(status, "cuLaunchKernelEx")
