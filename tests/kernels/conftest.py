"""On what the kernels run in a test: each kind of processor, a GPU, or Triton's interpreter.

Every processor multiplies int8 and bfloat16 matrices rightly, if slowly, so a test of the CPU path
runs as on each kind of them, whatever the one it is on, unless oneDNN is told to leave VNNI alone
on one that has it. Triton reads TRITON_INTERPRET when it is
imported, so the interpreted tests need their own process: each file of them holds a test that runs
the file again with that variable set.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from cmdlab_kernels import retrieval_float32_cpu, retrieval_tiles_cpu

PROCESSORS = {  # which types they multiply fast, up to how many pairs one product serves, a block
    "int8": ((torch.float32, torch.bfloat16, torch.int8), 0, 2**23),
    "bf16": ((torch.float32, torch.bfloat16), 0, 2**23),
    "fp32": ((torch.float32,), 0, 2**14),
    "few pairs": ((torch.float32,), 2**20, 2**23),
}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def accept_runtime_loop_bounds() -> None:
    """Let the interpreter take a loop bound in a one-element array, which NumPy 2.4 refuses."""
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch


if INTERPRETED:
    accept_runtime_loop_bounds()


def pytest_generate_tests(metafunc):
    names = metafunc.fixturenames
    if "processor" in names and "triton_device" not in names and "run_interpreted" not in names:
        metafunc.parametrize("processor", PROCESSORS, indirect=True, scope="module")


@pytest.fixture(scope="module")
def processor(request) -> Iterator[str | None]:
    """Let the CPU path of retrieval ranks do as on one kind of processor."""
    kind = getattr(request, "param", None)  # none for a test of the Triton path
    with pytest.MonkeyPatch.context() as patch:
        if kind is not None:
            dtypes, pairs, block = PROCESSORS[kind]
            if torch.int8 in dtypes and not retrieval_tiles_cpu.int8_is_exact():
                pytest.skip("oneDNN's int8 products saturate here")
            patch.setattr(retrieval_tiles_cpu, "fast_dtypes", lambda: dtypes)
            patch.setattr(retrieval_float32_cpu, "PAIRS", pairs)
            patch.setattr(retrieval_float32_cpu, "BLOCK", block)
        yield kind


@pytest.fixture
def triton_device() -> torch.device:
    """The device whose tensors Triton kernels take here; skips where there is none."""
    if INTERPRETED:
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    pytest.skip("Triton kernels run on CUDA, or in the interpreter's own process")


@pytest.fixture
def run_interpreted() -> Callable[[str], None]:
    """Run the tests of one file that use `triton_device` again, in Triton's interpreter."""
    if INTERPRETED:
        pytest.skip("this is the interpreter's process")

    def run(file: str) -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file]
        environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        result = subprocess.run(
            [*command, "-k", "triton"], env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stdout + result.stderr
        assert " passed" in result.stdout

    return run


@pytest.fixture
def nan_memory() -> Iterator[None]:
    """Fill fresh memory with NaN, so that an entry that no kernel writes shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
