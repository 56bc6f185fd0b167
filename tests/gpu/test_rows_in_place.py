"""Parameters with shared memory on a GPU: they are not moved, and train as other parameters, bit for bit."""

import pytest
import torch
from torch import nn
from torch.nn import Parameter

from crsam_ext import CRSAM

pytestmark = pytest.mark.require_cuda


def twin(values):
    param = Parameter(values.clone())
    return param, param.detach()


def columns(values):
    whole = torch.zeros(*values.shape, 2, dtype=values.dtype, device=values.device)
    whole[..., 0] = values
    return Parameter(whole[..., 0]), whole[..., 0]


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hold", [twin, columns])
def test_parameters_are_trained_in_place_with_the_same_bits(hold, dtype, base, fused):
    values = [torch.randn(shape, device="cuda").to(dtype) for shape in [(700, 300), (3, 5), ()]]
    held, seen = zip(*map(hold, values), strict=True)
    own, addresses = [Parameter(p.detach().clone()) for p in held], [p.data_ptr() for p in held]
    for params in (own, held):
        optimizer = CRSAM(params, base, lr=0.01, rho=0.5, backend=fused)
        for _ in range(3):
            optimizer.step(lambda params=params: sum(p.float().sin().square().mean() for p in params).backward())
    assert [p.data_ptr() for p in held] == addresses
    for p, q, view in zip(own, held, seen, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(q, view)


@pytest.mark.parametrize("rho", [0.0, 0.3])
def test_weights_of_cudnn_are_followed(rho, fused):
    """flatten_parameters() copies them into a new block in every forward, and re-points the parameters."""
    x, trained = torch.randn(3, 2, 40, device="cuda"), []
    for flattens in (False, True):
        torch.manual_seed(0)
        lstm = nn.LSTM(40, 200).cuda()
        optimizer = CRSAM(lstm.parameters(), lr=0.1, rho=rho, backend=fused)

        def backward(lstm=lstm, flattens=flattens):
            if flattens:
                lstm.flatten_parameters()
            lstm(x)[0].square().mean().backward()

        for _ in range(3):
            optimizer.step(backward)
        trained.append([p.detach().clone() for p in lstm.parameters()])
    for p, q in zip(*trained, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
