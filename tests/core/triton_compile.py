"""Compile the Triton kernels for GPUs that are not there: `triton_compile.py ARCH DIMS WIDTH DEPTH NOISE …`.

Prints, for each five arguments, them and registers, bytes of stack and of shared memory. With the noise
`power` it compiles the power iterations of a WIDTH x DIMS weight.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from jebm.native.triton_chain import _BLOCK, options, padded
from jebm.native.triton_kernel import chain_kernel, power_kernel
from jebm.native.triton_power import options as power_options

POINTERS = (
    *("z_BD", "gradient_BD", "noise_KBD", "first_WD", "first_DW", "hidden_LWW", "transposed_LWW"),
    *("biases_LW", "last_W", "scratch_PBM"),
)
TYPES = {
    **dict.fromkeys(POINTERS, "*fp32"),
    **dict.fromkeys(("key0", "key1", "chains", "dims", "steps", "first_step"), "i32"),
    **dict.fromkeys(("step_size", "half_square", "slope"), "fp32"),
}
OBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"


def chain_of(dims: int, width: int, depth: int, noise: str) -> tuple[ASTSource, dict[str, int]]:
    how = options(width, dims)
    constants: dict[str, int | None] = {"BLOCK": _BLOCK, "DIMS": dims, "WIDTH": width, "DEPTH": depth}
    constants["PIECE"] = how.pop("PIECE")
    if noise == "philox":
        constants["noise_KBD"] = None
    source = ASTSource(
        chain_kernel,
        signature={**TYPES, **dict.fromkeys(constants, "constexpr")},
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in range(len(POINTERS))},
    )
    return source, how


def power_of(rows: int, columns: int) -> tuple[ASTSource, dict[str, int]]:
    how = power_options(columns)
    constants = {"ROWS": rows, "COLUMNS": columns, "PADDED": padded(columns), "PIECE": how.pop("PIECE")}
    pointers = ("weight_OI", "u_O", "v_I")
    types = {**dict.fromkeys(pointers, "*fp32"), "times": "i32", "least": "fp32"}
    source = ASTSource(
        power_kernel,
        signature={**types, **dict.fromkeys(constants, "constexpr")},
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in range(len(pointers))},
    )
    return source, how


def used(arch: int, dims: int, width: int, depth: int, noise: str) -> tuple[int, int, int]:
    """Return registers, stack bytes (spills are there) and shared bytes."""
    source, how = power_of(width, dims) if noise == "power" else chain_of(dims, width, depth, noise)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=how)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [OBJDUMP, "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found is not None, said
    return int(found[1]), int(found[2]), compiled.metadata.shared


if __name__ == "__main__":
    for arch, dims, width, depth, noise in zip(*[iter(sys.argv[1:])] * 5, strict=True):
        numbers = used(int(arch), int(dims), int(width), int(depth), noise)
        print(arch, dims, width, depth, noise, *numbers, flush=True)
