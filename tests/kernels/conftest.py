import pytest
import torch
from support_kernels import PLACES

from lorafactory import kernels


@pytest.fixture(params=PLACES)
def where(request):
    """(device, implementation), which is chosen while the test runs."""
    device, kind = request.param
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    kernels.choose(kind)
    yield device, kind
    kernels.choose("auto")
