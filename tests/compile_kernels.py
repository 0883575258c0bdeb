"""Compile every kernel of triton_ops.py for GPUs of compute capability 8.0 and 9.0, which needs no GPU.

    python tests/compile_kernels.py

The interpreter, in which the other tests run the kernels, accepts more than the compiler. Prints a line per kernel, and
ends with an exception where one does not compile.
"""

import sys
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import triton_ops  # noqa: E402

HELPERS = ("order_key", "compare", "chunk_of", "number_of_bits")  # called by kernels only
FLOAT16, BFLOAT16, INT64 = ("rounded", "z", "maxima"), ("parts",), ("order", "failure", "found", "hits")
INT32 = (
    "counts", "cols", "row_offsets", "length", "threshold", "state", "histogram", "kept_ties", "kept_offsets",
    "groups", "num_hot", "out_rows", "out_cols", "rows", "feature_offsets", "extra_offsets", "extra_feature",
)  # fmt: skip
SIZES = ("d", "width", "num_features", "num_groups", "num_rows", "capacity", "k", "n")
SIZES += ("num_cols", "row_stride", "part_stride", "stride")
FLOATS = (
    "margin", "beta1", "beta2", "rest1", "rest2", "max_norm", "log2_beta1", "log2_beta2",
    "accumulation", "smallest", "factor",
)  # fmt: skip
CONSTANTS = dict(GROUP=64, BLOCK_G=32, SHIFT=20, BITS=8, BLOCK=256, PER_ROW=0, ABOVE=False, CHUNK=64, DECODER=True)
CONSTANTS |= dict(BLOCK_B=64, BLOCK_F=128, STEP=512)
CONSTANTS |= dict(FIRST=True, UNUSED=9, OF_X=True, PARTS=3, COPIES=2, LOW=1, NOT_FINITE=1, OVERFLOW=2)
SMALL, LARGE = dict(BLOCK_D=64, BLOCK_N=64, num_warps=4), dict(BLOCK_D=4096, BLOCK_N=1, num_warps=8)
SMALLEST = dict(BLOCK_D=64, BLOCK_N=16, BLOCK_G=16, GROUP=1, PARTS=0, num_warps=1)
VARIANTS = {"count_kept": dict(PER_ROW=1, ABOVE=True), "write_kept": dict(PER_ROW=1, ABOVE=True)}
VARIANTS |= {"adam_rows": dict(DECODER=False), "count_digits": dict(SHIFT=0, BITS=7), "place_rows": dict(PER_ROW=1)}
VARIANTS |= {"split_kernel": dict(COPIES=3, LOW=2)}
VARIANTS |= {"pick_digit": dict(FIRST=False, BITS=7, UNUSED=0), "round_rows": dict(OF_X=False)}


def kind(kernel: str, name: str, constants: dict) -> str:
    if name in constants:
        return "constexpr"
    if name in SIZES:
        return "i32"
    if name in FLOATS:
        return "fp32"
    if name in FLOAT16 + BFLOAT16:
        return "*fp16" if name in FLOAT16 else "*bf16"
    if name == "mask":
        return "*i8"
    if name == "counts" and kernel.startswith("count_active"):
        return "*i64"
    return "*i64" if name in INT64 else "*i32" if name in INT32 else "*fp32"


def main() -> None:
    kernels = {name: f for name, f in vars(triton_ops).items() if isinstance(f, JITFunction) and name not in HELPERS}
    for name, kernel in kernels.items():
        signatures = [CONSTANTS | SMALL, CONSTANTS | LARGE | VARIANTS.get(name, {}), CONSTANTS | SMALLEST]
        for constants in signatures:
            options = {"num_warps": constants.pop("num_warps")}
            constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
            signature = {key: kind(name, key, constants) for key in kernel.arg_names}
            source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
            for capability in (80, 90):
                compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
                assert compiled.asm["cubin"]
        print(f"{name} compiles")
    assert kernels


if __name__ == "__main__":
    main()
