"""Where Triton kernels run in a test: on a GPU, or in Triton's interpreter in a process of its own.

Triton reads TRITON_INTERPRET when it is imported, so the interpreted tests need their own process:
each file of them holds a test that runs the file again with that variable set.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch

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
