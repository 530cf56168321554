"""Kernels compile to machine code for Hopper on a machine without a GPU: Triton's interpreter accepts more than its compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the compiler comes with triton")

ROOT = Path(__file__).parents[3]
#: kernel, its constants, pointers with their element type, whole numbers that need 64 bits
KERNELS = {
    "gather": (
        *("requantize", "gather_kernel", {"ROWS": 64, "COLS": 64, "SHARE_PAD": 1}),
        "q:i32 s:i32 rows:i64 out:i32 out_s:i32",
    ),
    "gather of small groups": (
        *("requantize", "gather_kernel", {"ROWS": 64, "COLS": 64, "SHARE_PAD": 8}),
        "q:i32 s:i32 rows:i64 out:i32 out_s:i32",
    ),
    "transpose": ("transpose", "transpose_kernel", {"BLOCK_N": 128, "BLOCK_K": 128}, "q_ENK:u8 out_EKN:u8"),
}
PROGRAM = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from importlib import import_module
module, name, constants, pointers = {arguments!r}
kernel = getattr(import_module("fp8c.backends.triton." + module), name)
types = dict(p.split(":") for p in pointers.split())
types = {{k if k in kernel.arg_names else k + "_ptr": "*" + v for k, v in types.items()}}
signature = {{a: "constexpr" if a in constants else types.get(a, "i32") for a in kernel.arg_names}}
source = ASTSource(kernel, signature, constexprs={{(kernel.arg_names.index(k),): v for k, v in constants.items()}})
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={{"num_warps": 4}})
assert len(compiled.asm["cubin"]) > 1000 and "sm_90" in compiled.asm["ptx"]
"""


@pytest.mark.parametrize("kernel", KERNELS)
def test_it_compiles_for_hopper(kernel: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    program = PROGRAM.format(arguments=KERNELS[kernel])
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
