"""FUSED_MLP: both products of an MLP and its activation as one operation of PyTorch."""

import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, one_rank, refused
from torch import Tensor

import train_gpt as tg

pytestmark = pytest.mark.quick


def written_out(x: Tensor, w1: Tensor, w2: Tensor, slope: float) -> Tensor:
    """What the operation computes."""
    return F.linear(F.leaky_relu(F.linear(x, w1), slope).square(), w2)


def loss_and_gradients(model: tg.GPT, mode: tg.Mode, ops: tg.Ops) -> list[Tensor]:
    ids = torch.arange(2 * 33).view(2, 33) * 7 % model.tok_emb.shape[0]
    loss = model(ids[:, :-1], ids[:, 1:], mode, ops)
    return [loss, *torch.autograd.grad(loss, [*model.parameters()], allow_unused=True)]


def small_model(preset: str) -> tg.GPT:
    """A model without vectors and matrices that are 0 or 1 at first."""
    env = {"PRESET": f"{preset},tiny", "DTYPE": "float32", "LEAKY_RELU_SLOPE": "0.3"}
    torch.manual_seed(1)
    model = tg.GPT(tg.Config.from_env(env).architecture(), 0.02)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("preset", ["T", "naive"])  # with a norm at the output and without one
def test_the_operation_takes_the_place_of_the_products_to_the_last_bit(
    preset: str, bits: int
) -> None:
    """Gains, scales and rounding of the weights are in what it is given."""
    model = small_model(preset)
    mode = model.scoring._replace(outside=tg.Rounding(bits), core=tg.Rounding(bits))
    calls = []

    def operation(*args: Any) -> Tensor:
        calls.append(args)
        return written_out(*args)

    plain = loss_and_gradients(model, mode, tg.PLAIN_OPS)
    other = loss_and_gradients(model, mode, tg.PLAIN_OPS._replace(mlp=operation))
    assert len(calls) == len(model.plans[mode.passes])
    for a, b in zip(plain, other):
        assert a is b is None or torch.equal(a, b)


def test_off_takes_no_operation() -> None:
    assert not tg.Config().fused_mlp
    assert tg.PLAIN_OPS.mlp is None


# ---- Where it cannot act -------------------------------------------------------------------------

ON = tg.Config(fused_mlp=True)


def test_without_a_gpu_it_is_refused() -> None:
    assert refused(tg.Compiler, ON, one_rank()).startswith("FUSED_MLP=1 needs a GPU")


def test_without_triton_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)  # importing it fails
    message = refused(tg.Compiler, ON, SimpleNamespace(on_cuda=True))
    assert message == "FUSED_MLP=1 needs triton: pip install -U triton"


def test_a_compiled_graph_with_another_kernel_is_not_taken_from_the_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """PyTorch's key of compiled graphs holds no source of a kernel that an operation launches."""
    monkeypatch.setattr(torch.compiler.config, "cache_key_tag", "")
    monkeypatch.setattr(tg, "triton_module", lambda: None)
    tags = set()
    for source in ("one kernel", "another kernel"):
        monkeypatch.setattr(tg, "mlp_kernel", lambda source=source: SimpleNamespace(src=source))
        tg.Compiler(ON, SimpleNamespace(on_cuda=True)).build(written_out)  # type: ignore[arg-type]
        tags.add(torch.compiler.config.cache_key_tag)
    assert len(tags) == 2


# ---- The kernel ----------------------------------------------------------------------------------


def triton_python() -> str:
    """A Python with triton, and "" without one."""
    if importlib.util.find_spec("triton"):
        return sys.executable
    return os.environ.get("DRYRUN_PYTHON", "")


# Sizes of one tile and of several, whole and not: rows, channels, hidden channels.
JOB = """
import torch
import torch.nn.functional as F
import train_gpt as tg

def check(one, other):
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * other.abs().max().item())

torch.manual_seed(0)
operation = tg.fused_mlp()
for rows, D, hidden in ((1, 1, 1), (3, 5, 2), (64, 64, 128), (75, 70, 131), (129, 33, 257)):
    for slope in (0.0, 0.5):
        inputs = x, w1, w2 = [
            torch.randn(2, rows, D, requires_grad=True),
            torch.randn(hidden, D, requires_grad=True),
            torch.randn(D, hidden, requires_grad=True),
        ]
        grad = torch.randn_like(x).mT.contiguous().mT  # not contiguous
        got = operation(x, w1, w2, slope)
        plain = F.linear(F.leaky_relu(F.linear(x, w1), slope).square(), w2)
        check(got, plain)
        for one, other in zip(
            torch.autograd.grad(got, inputs, grad), torch.autograd.grad(plain, inputs, grad)
        ):
            check(one, other)
print("checked")
"""


@pytest.mark.skipif(not triton_python(), reason="triton is not installed")
def test_value_and_gradients_are_those_of_plain_operations() -> None:
    """In float32, by Triton's interpreter on the CPU."""
    environment = os.environ | dict(TRITON_INTERPRET="1", PYTHONPATH=str(ROOT))
    command = [triton_python(), "-c", JOB]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if "wrap_triton only works on functions annotated" in done.stderr:
        pytest.skip("this PyTorch (such as 2.9.1) does not take an interpreted kernel")
    assert (done.returncode, done.stdout) == (0, "checked\n"), done.stderr
