"""The routines of BLAS and LAPACK that solve a basis, called with Python's lock released.

scipy's wrappers keep the lock while they compute, so threads that solve small weights side by side would wait for one
another. scipy also publishes the addresses of the same routines (`scipy.linalg.cython_blas`, `cython_lapack`, made for
callers that do without Python), and ctypes releases the lock around a call. Where an address has another signature than
expected, as in a build with 64-bit integers, scipy's wrapper is used: slower, not different.
"""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from ctypes import POINTER, byref, c_char, c_double, c_float, c_int, c_void_p
from functools import cache
from typing import Annotated as Float  # jaxtyping's, when tests/test_shapes.py looks at what runs
from typing import Any

import numpy as np
import scipy.linalg
import scipy.linalg.blas
import scipy.linalg.cython_blas
import scipy.linalg.cython_lapack
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

_LETTERS = {torch.float32: "s", torch.float64: "d"}
_SCALARS = {torch.float32: c_float, torch.float64: c_double}
# `real` stands for the routine's own type; anything else must be exactly this for a call to be safe
_SIGNATURES = {
    "syrk": "char char int int real real int real real int",
    "syevr": "char char char int real int real real int int real int real real int int real int int int int",
}

# Up to this size an eigenvalue problem is solved by one thread. It hands over between threads thousands of times, so
# where another process takes a core, two threads took 80 times longer than one; on an idle machine they gain a third.
ONE_THREAD = 2048
_limiting = threading.Lock()
_limited = 0
_limit: Any = None


@contextmanager
def one_blas_thread() -> Generator[None]:
    """BLAS with one thread until the last of those who asked for it is through."""
    global _limited, _limit
    with _limiting:
        if _limited == 0:
            _limit = _controller().limit(limits=1, user_api="blas")
        _limited += 1
    try:
        yield
    finally:
        with _limiting:
            _limited -= 1
            if _limited == 0:
                _limit.restore_original_limits()


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()


def add_lower_gram(total: Float[Tensor, "n n"], rows: Float[Tensor, "k n"]) -> None:
    """total += rows^T rows in its lower triangle: half the work of a general product.

    Args:
        total: (n, n), float32 or float64, row-major, on the CPU. BLAS sees its transpose, and so the upper triangle.
        rows: (k, n), same dtype, row-major, or the transpose of a row-major (n, k); BLAS takes both without a copy.
    Raises:
        ValueError: A matrix lies otherwise in memory, or the dtypes differ.
    """
    direct = rows.is_contiguous()
    memory = rows if direct else rows.T
    if not (memory.is_contiguous() and total.is_contiguous() and memory.dtype == total.dtype):
        raise ValueError("add_lower_gram needs row-major matrices of one dtype")
    (k, n) = rows.shape
    syrk = _routine("syrk", total.dtype)
    if syrk is None:
        _wrapped_gram(total, memory, direct)
        return
    one = _SCALARS[total.dtype](1.0)
    syrk(
        *(b"U", b"N" if direct else b"T", _int(n), _int(k), byref(one), _data(memory), _int(max(1, memory.shape[1]))),
        *(byref(one), _data(total), _int(max(1, n))),
    )


def eigenvectors(gram: Float[Tensor, "n n"], first: int, last: int) -> Float[Tensor, "count n"]:
    """Some eigenvectors of a symmetric matrix, by LAPACK's MRRR.

    For a part of the spectrum it is up to three times faster than all of it, and orthogonal in clusters.

    Args:
        gram: (n, n) symmetric, float32 or float64, row-major, on the CPU. Its lower triangle is read, all of it is lost.
        first: Number of the first eigenvector, counted from 0 by rising eigenvalue.
        last: Number of the last, which is included.
    Returns:
        (last - first + 1, n), one eigenvector a row.
    Raises:
        numpy.linalg.LinAlgError: LAPACK did not converge.
        ValueError: `gram` is not row-major.
    """
    if not gram.is_contiguous():
        raise ValueError("eigenvectors needs a row-major matrix")
    with one_blas_thread() if len(gram) <= ONE_THREAD else nullcontext():
        return _eigenvectors(gram, first, last)


def _eigenvectors(gram: Tensor, first: int, last: int) -> Tensor:
    syevr = _routine("syevr", gram.dtype)
    if syevr is None:
        return _wrapped_eigenvectors(gram, first, last)
    n, count = len(gram), last - first + 1
    vectors = gram.new_empty(count, n)  # row-major (count, n) is LAPACK's column-major (n, count)
    values = gram.new_empty(n)
    support = (c_int * (2 * n))()
    real = _SCALARS[gram.dtype]
    found, info = c_int(), c_int()
    unused = real(0.0)

    def run(work: Any, work_length: int, integers: Any, integers_length: int) -> None:
        syevr(
            *(b"V", b"I", b"U", _int(n), _data(gram), _int(n), byref(unused), byref(unused)),
            *(_int(first + 1), _int(last + 1), byref(unused), byref(found), _data(values), _data(vectors), _int(n)),
            *(support, work, _int(work_length), integers, _int(integers_length), byref(info)),
        )

    best, best_integers = real(), c_int()
    run(byref(best), -1, byref(best_integers), -1)  # asks how much room it wants
    # a float32 may have rounded the length down
    length = int(np.nextafter(np.float32(best.value), np.float32(np.inf))) if real is c_float else int(best.value)
    work = gram.new_empty(length)
    run(_data(work), length, (c_int * best_integers.value)(), best_integers.value)
    if info.value != 0 or found.value != count:
        raise np.linalg.LinAlgError(f"LAPACK's syevr found {found.value} of {count} vectors (info {info.value})")
    return vectors


@cache
def _routine(name: str, dtype: torch.dtype) -> Callable[..., None] | None:
    """The routine as a function of ctypes, or None where its signature is not the expected one."""
    module: Any = scipy.linalg.cython_blas if name == "syrk" else scipy.linalg.cython_lapack
    capsule = module.__pyx_capi__.get(_LETTERS[dtype] + name)
    if capsule is None:
        return None
    name_of, address_of = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    name_of.restype, name_of.argtypes = ctypes.c_char_p, [ctypes.py_object]
    address_of.restype, address_of.argtypes = c_void_p, [ctypes.py_object, ctypes.c_char_p]
    declared = name_of(capsule)
    arguments = re.fullmatch(r"void \((.*)\)", declared.decode())
    if arguments is None:
        return None
    kinds = [re.sub(rf"^__pyx_t_\w+_{_LETTERS[dtype]}$", "real", part.strip(" *")) for part in arguments[1].split(",")]
    expected = _SIGNATURES[name].split()
    if kinds != expected:
        return None
    types = {"char": POINTER(c_char), "int": POINTER(c_int), "real": c_void_p}
    prototype = ctypes.CFUNCTYPE(None, *[ctypes.c_char_p if kind == "char" else types[kind] for kind in expected])
    return prototype(address_of(capsule, declared))


def _int(value: int) -> Any:
    return byref(c_int(value))


def _data(tensor: Tensor) -> c_void_p:
    return c_void_p(tensor.data_ptr())


def _wrapped_gram(total: Tensor, memory: Tensor, direct: bool) -> None:
    c = total.numpy().T
    (update,) = scipy.linalg.blas.get_blas_funcs(("syrk",), (c,))
    result = update(1.0, memory.numpy().T, beta=1.0, c=c, trans=0 if direct else 1, lower=0, overwrite_c=1)
    if not np.shares_memory(result, c):
        total.copy_(torch.from_numpy(result.T))


def _wrapped_eigenvectors(gram: Tensor, first: int, last: int) -> Tensor:
    _, vectors = scipy.linalg.eigh(
        gram.numpy().T,  # column-major, as LAPACK wants it: no copy
        lower=False,
        subset_by_index=[first, last],
        driver="evr",
        check_finite=False,
        overwrite_a=True,
    )
    return torch.from_numpy(np.ascontiguousarray(vectors.T))
