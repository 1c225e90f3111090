"""The devices that ggml knows in this process: its CPU, its GPUs, and those of RPC servers that it is connected to."""

from __future__ import annotations

import ctypes

from . import library

CPU = 0  # enum ggml_backend_dev_type
GPUS = 1, 2  # discrete, integrated


def ggml() -> ctypes.CDLL:
    """ggml's functions."""
    lib: ctypes.CDLL = library.llama_cpp.llama_cpp._lib  # finds functions of the libraries that it links to, too
    return lib


def local_devices() -> list[int]:
    """The GPUs, or the CPU if there are none. Accelerators like BLAS hold no buffers of their own."""
    return _devices(*GPUS) or _devices(CPU)


def _devices(*types: int) -> list[int]:
    lib = ggml()
    lib.ggml_backend_dev_count.restype = ctypes.c_size_t
    lib.ggml_backend_dev_get.restype, lib.ggml_backend_dev_get.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    lib.ggml_backend_dev_type.restype, lib.ggml_backend_dev_type.argtypes = ctypes.c_int, [ctypes.c_void_p]
    devices = [lib.ggml_backend_dev_get(i) for i in range(lib.ggml_backend_dev_count())]
    return [device for device in devices if lib.ggml_backend_dev_type(device) in types]


def gpu_names() -> list[str]:
    """The GPUs that the library can use, and the devices of other machines that it is connected to."""
    describe = ggml().ggml_backend_dev_description
    describe.restype, describe.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    return [describe(device).decode("utf-8", errors="replace") for device in _devices(*GPUS)]
