"""compose: every implementation against float64 from the definition, forward and backward."""

import pytest
import torch
import torch.nn as nn
from support_kernels import CUT, MULTIPLIED, PLACES, SHAPES, STORED, near

from lorafactory import kernels

DTYPES = {  # y, h, b and gain
    "float32": (torch.float32, torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16, torch.float32),
    "bf16 and float32": (torch.bfloat16, torch.float32, torch.float32),
    "fp16": (torch.float16, torch.float16, torch.float32),
}
FORMS = {"gain": (True, False, True), "gain and bias": (True, True, True), "update alone": (True, False, False),
         "no gain": (False, False, True)}  # fmt: skip


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that nobody has written is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def inputs(shape, dtypes, device, form, near_one=0.5):
    m, n, r = shape
    y, h, b = (torch.randn(s, device=device).to(t) for s, t in zip([(m, n), (m, r), (n, r)], dtypes, strict=True))
    gained, biased, whole = FORMS[form]
    gain = 1 + near_one * torch.randn(n, device=device) if gained else None
    bias = torch.randn(n, device=device).to(dtypes[0]) if biased else None
    return [y, h, b * max(r, 1) ** -0.5, gain], bias, whole


def definition(y, h, b, gain, bias, whole):
    u = h @ b.T
    if gain is None:
        return y + u
    if not whole:
        return y + gain * u
    return gain * (y + u) + ((1 - gain) * bias if bias is not None else 0)


def exact(tensors, bias, whole, dz):
    wide = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    z = definition(*wide, None if bias is None else bias.double(), whole)
    given = [t for t in wide if t is not None]
    return z.detach(), torch.autograd.grad(z, given, dz.double())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_its_definition(where, form, dtypes, shape):
    device, kind = where
    tensors, bias, whole = inputs(shape, DTYPES[dtypes], device, form)
    given = [t.requires_grad_() for t in tensors if t is not None]
    z = kernels.compose(*tensors, bias=bias, whole=whole)
    dz = torch.randn_like(z)
    found = torch.autograd.grad(z, given, dz)
    z64, exact_ = exact(tensors, bias, whole, dz)
    stored, multiplied = STORED[DTYPES[dtypes][0]], MULTIPLIED[DTYPES[dtypes][1]]
    assert z.dtype == tensors[0].dtype and near(z.detach(), z64, max(stored, multiplied))  # B is rounded to h's dtype
    names = ["y", "h", "b", "gain"][: len(given)]
    for name, t, mine, theirs in zip(names, given, found, exact_, strict=True):
        assert mine.dtype == t.dtype
        assert near(mine, theirs, stored if name == "y" else max(multiplied, 2 * stored)), name


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", [(0, 20), (1, 300), (70, 33)], ids=str)
@pytest.mark.parametrize("batched", [False, True])
def test_rescale_is_its_definition(where, dtypes, shape, batched):
    device, _ = where
    y, gain = torch.randn(shape, device=device).to(DTYPES[dtypes][0]), torch.randn(shape[1], device=device)
    y = (y[None] if batched else y).requires_grad_()
    z = kernels.rescale(y, gain.requires_grad_())
    dz = torch.randn_like(z)
    found = torch.autograd.grad(z, (y, gain), dz)
    stored = STORED[DTYPES[dtypes][0]]
    assert z.dtype == y.dtype == found[0].dtype and found[1].dtype == gain.dtype and z.shape == found[0].shape == y.shape
    assert near(z.detach(), (gain.double() * y.double()).detach(), stored)
    assert near(found[0], (gain.double() * dz.double()).detach(), stored)
    assert near(found[1], (dz.double() * y.double()).flatten(0, -2).sum(0).detach(), 2 * stored)


@pytest.mark.parametrize("off", [0.0, 1e-6, -1e-6, 1e-4, -1e-4, 4e-3, -1e-2, 0.5])
def test_near_one_no_digit_cancels(where, off):
    device, kind = where
    (y, h, b, _), _, _ = inputs((64, 96, 4), DTYPES["bf16"], device, "gain")
    gain = torch.full((96,), 1.0 + off, device=device)
    z = kernels.compose(y, h, b, gain=gain)
    assert near(z, definition(y.double(), h.double(), b.double(), gain.double(), None, True), MULTIPLIED[torch.bfloat16])
    small = kernels.compose(y, torch.zeros_like(h), b, gain=gain)
    cut = kind == "triton" and device == "cpu"  # the interpreter: below 1 a whole step of every entry
    assert near(small, gain.double() * y.double(), CUT if cut else STORED[torch.bfloat16])
    if off == 0:
        assert torch.equal(small, y)


def test_no_rows_zero_gains_and_what_is_not_finite(where):
    device, kind = where
    (y, h, b, gain), bias, _ = inputs((0, 20, 3), DTYPES["float32"], device, "gain and bias")
    gain.requires_grad_()
    kernels.compose(y, h, b, gain=gain, bias=bias).sum().backward()
    assert torch.equal(gain.grad, torch.zeros_like(gain))
    (y, h, b, gain), bias, _ = inputs((9, 20, 3), DTYPES["float32"], device, "gain and bias")
    with torch.no_grad():
        gain[:4], gain[4:8] = 0.0, -gain[4:8]
        y[2, 5], h[3, 1] = float("inf"), float("nan")
    given = [t.requires_grad_() for t in (y, h, b, gain)]
    z = kernels.compose(*given, bias=bias)
    good = torch.ones(9, dtype=torch.bool)
    good[[2, 3]] = False
    z64, _ = exact(given, bias, True, torch.ones_like(z))
    assert near(z.detach()[good], z64[good], 3e-6)
    assert torch.isinf(z[2, 5]) and z[3].isnan().all() and torch.isfinite(z[2, :5]).all()
    rows = [t.detach()[good].clone().requires_grad_() for t in (y, h)] + [t.detach().clone().requires_grad_() for t in (b, gain)]
    out = kernels.compose(*rows, bias=bias)
    found = torch.autograd.grad(out, rows, torch.ones_like(out))
    for mine, theirs in zip(found, exact(rows, bias, True, torch.ones_like(out))[1], strict=True):
        assert near(mine, theirs, 3e-6)


@pytest.mark.parametrize("wanted", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (1, 0, 0, 1), (0, 1, 1, 0)])
def test_each_gradient_alone(where, wanted):
    device, kind = where
    for form in ("gain and bias", "update alone"):
        tensors, bias, whole = inputs((33, 50, 6), DTYPES["float32"], device, form)
        given = [t.requires_grad_(bool(w)) for t, w in zip(tensors, wanted, strict=True)]
        z = kernels.compose(*given, bias=bias, whole=whole)
        dz = torch.randn_like(z)
        found = torch.autograd.grad(z, [t for t in given if t.requires_grad], dz)
        theirs = [g for g, w in zip(exact(tensors, bias, whole, dz)[1], wanted, strict=True) if w]
        assert all(near(a, b, 3e-6) for a, b in zip(found, theirs, strict=True))


@pytest.mark.parametrize("form", ["no gain", "update alone"])
@pytest.mark.parametrize("shape", [(33, 50), (3, 11, 50)], ids=str)
def test_a_fresh_y_may_be_written_over(where, form, shape):
    """And its gradients are those of one that is not, which keeps its numbers; a view of y, too."""
    device, _ = where
    (_, _, b, gain), _, whole = inputs((33, 50, 6), DTYPES["float32"], device, form)
    x, h = (torch.randn(*shape[:-1], d, device=device).requires_grad_() for d in (50, 6))
    given = [t for t in (x, h, b.requires_grad_(), gain) if t is not None]
    if gain is not None:
        gain.requires_grad_()
    kept, fresh = x * 2, x * 2
    z, w = (kernels.compose(y, h, b, gain, whole=whole, fresh=y is fresh) for y in (kept, fresh))
    assert torch.equal(z, w) and torch.equal(kept, x * 2)
    found, theirs = (torch.autograd.grad(t.sin().sum(), given) for t in (w, z))
    assert all(torch.equal(a, b) for a, b in zip(found, theirs, strict=True))


def test_layouts(where):
    """Three dimensions, transposed and sliced storage, a gradient that is one number seen many times."""
    device, kind = where
    y = torch.randn(48, 3, 5, device=device).permute(1, 2, 0)
    h, b = torch.randn(3, 5, 12, device=device)[..., 2:9], torch.randn(7, 48, device=device).T
    gain = torch.rand(96, device=device)[::2]
    given = [t.detach().requires_grad_() for t in (y, h, b, gain)]
    z = kernels.compose(*given)
    z.sum().backward()
    z64, theirs = exact([y.reshape(-1, 48), h.reshape(-1, 7), b, gain], None, True, torch.ones(15, 48, device=device))
    assert z.shape == y.shape and near(z.detach().reshape(-1, 48), z64, 3e-6)
    for t, exact_ in zip(given, theirs, strict=True):
        assert near(t.grad.reshape(exact_.shape), exact_, 3e-6)


def test_the_same_bits_every_time_and_no_second_derivative(where):
    device, kind = where
    tensors, bias, _ = inputs((300, 130, 9), DTYPES["float32"], device, "gain and bias")
    given = [t.requires_grad_() for t in tensors]

    def once():
        z = kernels.compose(*given, bias=bias)
        return [z, *torch.autograd.grad(z.square().sum(), given)]

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))
    if kind != "reference":
        z = kernels.compose(*given, bias=bias)
        (first,) = torch.autograd.grad(z.square().sum(), given[3], create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()


def test_under_autocast_and_checkpointing(where):
    device, kind = where
    layer = nn.Linear(24, 40).to(device)
    a, b, gain = (torch.randn(s, device=device, requires_grad=True) for s in ((4, 24), (40, 4), (40,)))
    x = torch.randn(6, 24, device=device)

    def block(x):
        return kernels.compose(layer(x), nn.functional.linear(x, a), b, gain=gain, bias=layer.bias.detach()).tanh()

    def gradients(run):
        with torch.autocast(device, torch.bfloat16):
            out = run(x)
        assert out.dtype == torch.bfloat16
        return torch.autograd.grad(out.float().square().sum(), (a, b, gain))

    plain = gradients(block)
    again = gradients(lambda x: torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False))
    assert all(torch.equal(p, q) for p, q in zip(plain, again, strict=True))
    with torch.autocast(device, enabled=False):
        z = block(x)
        whole = torch.autograd.grad(z.square().sum(), (a, b, gain))
    assert all(near(p, q, 3e-2) for p, q in zip(plain, whole, strict=True))


def test_the_next_layer_may_work_in_place(where):
    device, kind = where
    tensors, bias, _ = inputs((33, 50, 6), DTYPES["float32"], device, "gain and bias")
    given = [t.requires_grad_() for t in tensors]
    found = torch.autograd.grad(nn.functional.relu(kernels.compose(*given, bias=bias), inplace=True).sum(), given)
    kept = torch.autograd.grad(nn.functional.relu(kernels.compose(*given, bias=bias)).sum(), given)
    assert all(torch.equal(a, b) for a, b in zip(found, kept, strict=True))


@pytest.mark.slow
def test_compiled_without_a_graph_break(where):
    device, kind = where
    tensors, bias, _ = inputs((16, 24, 4), DTYPES["float32"], device, "gain and bias")
    given = [t.requires_grad_() for t in tensors]
    plain = kernels.compose(*given, bias=bias)
    made = torch.compile(kernels.compose, fullgraph=True)(*given, bias=bias)
    assert near(made.detach(), plain.detach(), 3e-6)
    found, theirs = (torch.autograd.grad(z.square().sum(), given) for z in (made, plain))
    assert all(near(a, b, 3e-6) for a, b in zip(found, theirs, strict=True))


@pytest.mark.parametrize("where", [p for p in PLACES if "triton" in p.id], indirect=True)
@pytest.mark.parametrize("form", ["gain", "gain and bias", "update alone"])
def test_the_operators_are_what_a_compiler_is_told(where, form):
    device, _ = where
    from lorafactory.kernels import twins

    (y, h, b, gain), bias, whole = inputs((33, 50, 6), DTYPES["bf16 and float32"], device, form)
    for keep in (False, True):
        torch.library.opcheck(twins._forward, (y, h, b, gain, bias, whole, keep))
    for inner in (None, y + 1):
        for of_y in (False, True):
            torch.library.opcheck(twins._backward, (y, gain, bias, inner, of_y))
