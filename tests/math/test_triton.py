"""The Triton kernels against float64 formulas: on the GPU if there is one, else in Triton's CPU interpreter.

The interpreter is chosen by an environment variable before the first import of triton, so every check is a process of its
own: this file, run as a script with the name of the check. Bounds are derived: one rounding of the result, and 2⁻²⁴ of the
sum of absolute terms for each fp32 operation."""

import importlib.util
import itertools
import os
import subprocess
import sys

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RANKS = (1, 3, 16, 24, 40)
IMPOSSIBLE = 77

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run_check(name, folder, **environment):
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment = kept | {"TRITON_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, env=environment)


@needs_triton
@pytest.mark.parametrize("name", ["compose", "special_cases", "compose_backward", "direct_norm"])
def test_kernel_equals_float64(name, tmp_path):
    done = run_check(name, tmp_path, **({} if DEVICE == "cuda" else {"TRITON_INTERPRET": "1"}))
    assert done.returncode == 0, done.stdout + done.stderr


@needs_triton
def test_kernels_compile_for_cuda_without_a_gpu(tmp_path):
    done = run_check("compilation", tmp_path)
    if done.returncode == IMPOSSIBLE:
        pytest.skip(f"no compilation ahead of time: {done.stdout}")
    assert done.returncode == 0, done.stdout + done.stderr


def random(*shape, dtype=torch.float32, layout="dense"):
    """Standard normal; "sliced" and "transposed" are the same numbers' distribution with other strides."""
    if layout == "transposed":
        return torch.randn(shape[::-1]).to(DEVICE, dtype).T
    if layout == "sliced":
        return torch.randn(2 * shape[0], shape[1] + 5).to(DEVICE, dtype)[::2, 2:-3]
    return torch.randn(shape).to(DEVICE, dtype)


def assert_close(case, got, want, absolute, operations):
    """absolute: the sum of absolute terms behind each number of `want` (float64)."""
    info = torch.finfo(got.dtype)
    bound = info.eps / 2 * want.abs() + operations * 2**-24 * absolute + info.smallest_normal * info.eps
    wrong = ((got.double() - want).abs() > bound) | ~got.isfinite()
    assert got.shape == want.shape, case
    assert not wrong.any(), f"{case}: {int(wrong.sum())} of {want.numel()} wrong: {got[wrong][:4]} for {want[wrong][:4]}"


def shift(h, bias):
    """(1 − g) ⊙ bias."""
    return None if bias is None else -h * bias.float()


def check_compose(kernels):
    layouts = itertools.cycle(["dense", "sliced", "transposed"])
    for T, O, R, dtype, biased in itertools.product((0, 1, 5, 70), (13, 130), RANKS, DTYPES, (True, False)):
        layout = next(layouts)
        out, z = random(T, O, dtype=dtype, layout=layout), random(T, R, dtype=dtype, layout=layout)
        sB, h = 1.7 * random(O, R, dtype=dtype), torch.rand(O, device=DEVICE) - 0.4
        bias = 2 + random(O, dtype=dtype) if biased else None
        b = 0.0 if bias is None else bias.double()
        want = out.double() + h.double() * (out.double() - b) + z.double() @ sB.double().T
        absolute = out.double().abs() + h.double().abs() * (out.double() - b).abs() + z.double().abs() @ sB.double().abs().T
        got = kernels.compose(out, 1 + h, shift(h, bias), z, sB)
        assert got.dtype == dtype
        assert_close(("compose", T, O, R, dtype, biased, layout), got, want, absolute, R + 4)


def check_special_cases(kernels):
    """Operands left out, groups of more than one row block, and the start: y equals `out` bit for bit."""
    for T, dtype in [(600, torch.bfloat16)] + [(5, dtype) for dtype in DTYPES]:
        O, R = 260, 3
        out, bias, z, sB = (random(*shape, dtype=dtype) for shape in ((T, O), (O,), (T, R), (O, R)))
        h = torch.rand(O, device=DEVICE) - 0.4
        scaled, low = h.double() * (out.double() - bias.double()), z.double() @ sB.double().T
        absolute = out.double().abs() + scaled.abs() + z.double().abs() @ sB.double().abs().T
        case = ("special cases", T, dtype)
        assert_close(
            (*case, "DoRA"), kernels.compose(out, 1 + h, shift(h, bias), z, sB), out.double() + scaled + low, absolute, R + 4
        )
        assert_close((*case, "LoRA"), kernels.compose(out, None, None, z, sB), out.double() + low, absolute, R + 4)
        assert_close(
            (*case, "magnitude only"), kernels.compose(out, 1 + h, shift(h, bias), None, None), out.double() + scaled, absolute, 4
        )
        assert torch.equal(kernels.compose(out, None, None, None, None), out), case
        assert torch.equal(kernels.compose(out, 1 + 0 * h, shift(0 * h, bias), z, 0 * sB), out), case
        gdY, dot = kernels.compose_backward(out, z @ sB.T, None, None)
        products = out.double() * (z @ sB.T).double()
        assert torch.equal(gdY, out), case
        assert_close((*case, "dot"), dot, products.sum(0), products.abs().sum(0), T + 3)


def check_compose_backward(kernels):
    """PROGRAMS = 4: two programs share three blocks of rows."""
    layouts = itertools.cycle([("dense", "dense"), ("sliced", "dense"), ("transposed", "sliced")])
    product = itertools.product((1024, 4), (0, 1, 5, 70), (13, 130), DTYPES, (True, False))
    for kernels.PROGRAMS, T, O, dtype, biased in product:
        first, second = next(layouts)
        dY, kept = random(T, O, dtype=dtype, layout=first), random(T, O, dtype=dtype, layout=second)
        h, bias = torch.rand(O, device=DEVICE) - 0.4, 2 + random(O, dtype=dtype) if biased else None
        gdY, dot = kernels.compose_backward(dY, kept, 1 + h, None if bias is None else bias.float())
        want, products = dY.double() * (1 + h.double()), dY.double() * (kept.double() - (0.0 if bias is None else bias.double()))
        case = ("backward", kernels.PROGRAMS, T, O, dtype, biased, first)
        assert gdY.dtype == dtype and dot.dtype == torch.float32
        assert_close((*case, "gdY"), gdY, want, dY.double().abs() * (1 + h.double().abs()), 2)
        assert_close((*case, "dot"), dot, products.sum(0), products.abs().sum(0), T + 3)


def check_direct_norm(kernels):
    layouts = itertools.cycle(["dense", "sliced", "transposed"])
    for O, I, R, dtype, s in itertools.product((1, 13, 130), (7, 150), RANKS, DTYPES, (1.7, -0.6)):
        layout = next(layouts)
        W, A, B = random(O, I, dtype=dtype, layout=layout), random(R, I, dtype=dtype), random(O, R, dtype=dtype)
        assert_norm(("norm", O, I, R, dtype, s, layout), kernels.direct_norm(W, A, B, s), W, A, B, s)
    for R, dtype in itertools.product(RANKS, DTYPES):
        A, B = random(R, 150, dtype=dtype), random(130, R, dtype=dtype)
        W = (-0.5 * (B.double() @ A.double()) / 0.96).to(dtype)
        got = kernels.direct_norm(W, A, B, 0.5)
        want = assert_norm(("cancelling", R, dtype), got, W, A, B, 0.5)
        assert ((got / want - 1).abs() < 1e-4).all(), (R, dtype)


def assert_norm(case, got, W, A, B, s):
    W, A, B = W.double(), A.double(), B.double()
    want = (W + s * B @ A).norm(dim=1)
    absolute = (W.abs() + abs(s) * B.abs() @ A.abs()).norm(dim=1)  # ≥ the norm of the error's own bound, element by element
    assert got.dtype == torch.float32
    assert_close(case, got, want, absolute, A.shape[0] + A.shape[1] + 5)
    return want


def check_compilation(kernels):
    """All three for two generations; products of a low precision must use the tensor cores."""
    import triton

    compilers = find_compilers()
    for capability, (name, dtype) in itertools.product((80, 90), (("bf16", torch.bfloat16), ("fp32", torch.float32))):
        p, size = f"*{name}", kernels.tile(4096, 24, dtype)
        blocks = dict(zip(("ROWS", "COLUMNS", "RANKS"), size))
        full = {"y": p, "out": p, "g": "*fp32", "shift": "*fp32", "z": p, "sB": p, "T": "i32", "O": "i32", "out_t": "i32"}
        rest = {"out_o": 1, "R": 24, "GROUP": kernels.GROUP} | blocks
        without = dict.fromkeys(("shift", "z", "sB")) | rest
        few = {key: value for key, value in full.items() if key not in without}
        back = {"gdY": p, "partial": "*fp32", "dY": p, "kept": p, "g": "*fp32", "bias": "*fp32"}
        back |= dict.fromkeys(("T", "O", "dY_t", "kept_t"), "i32")
        wide = {"dY_o": 1, "kept_o": 1} | dict(zip(("ROWS", "COLUMNS"), kernels.BACKWARD_TILE))
        norm = {"partial": "*fp32", "W": p, "A": p, "B": p, "s": "fp32", "O": "i32", "I": "i32", "W_o": "i64"}
        for kernel, types, constants, product in (
            (kernels._compose_kernel, full, rest, True),
            (kernels._compose_kernel, few, without, False),
            (kernels._backward_kernel, back, wide, False),
            (kernels._norm_kernel, norm, {"W_i": 1, "R": 24} | blocks, True),
        ):
            signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
            source, target = compilers.source(kernel, signature, constants), compilers.target("cuda", capability, 32)
            asm = triton.compile(source, target=target, options=kernels.OPTIONS).asm
            assert len(asm["cubin"]) > 0, (kernel, capability, name)
            assert ("mma" in asm["ptx"]) == (product and name == "bf16"), (kernel, capability, name)


def find_compilers():
    from types import SimpleNamespace

    try:
        from triton.backends import backends
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
    except ImportError as error:
        print(error)
        sys.exit(IMPOSSIBLE)
    if "nvidia" not in backends:
        print("this triton has no backend for CUDA")
        sys.exit(IMPOSSIBLE)
    return SimpleNamespace(source=ASTSource, target=GPUTarget)


def repair_interpreter():
    """Triton's interpreter multiplies bf16 as integers and truncates to bf16; let it do what the hardware does."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def convert_float(data, old, new, rounding):
        if (old, new) != (tl.float32, tl.bfloat16):
            return convert(data, old, new, rounding)
        return torch.tensor(data).bfloat16().view(torch.int16).numpy().view("uint16")

    def create_dot(self, a, b, *rest):
        a, b = (self.cast_impl(t, tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b))
        return dot(self, a, b, *rest)

    interpreter._convert_float, interpreter.InterpreterBuilder.create_dot = convert_float, create_dot


if __name__ == "__main__":
    from doratune.math.kernels import triton_kernels

    torch.manual_seed(0)
    if os.environ.get("TRITON_INTERPRET") == "1":
        repair_interpreter()
    globals()[f"check_{sys.argv[1]}"](triton_kernels)
