"""Attention over packed images against two loops over tokens: values and every gradient."""

from __future__ import annotations

import itertools

import pytest
import torch

from trinity.core.errors import ConfigError
from trinity.models.patching import patch_centres
from trinity.ops.image_attention import BACKENDS, Sight, image_attention

d = 6
DIFFERENTIABLE = ["sdpa", "reference"]


def _qkv(batch, num_tokens, groups=2, dtype=torch.float64, seed=0):
    gen = torch.Generator().manual_seed(seed)

    def draw(heads):
        x = torch.randn(batch, num_tokens, heads, d, generator=gen, dtype=torch.float64)
        return x.to(dtype).transpose(1, 2).detach().requires_grad_()

    return draw(2 * groups), draw(2), draw(2)


def _images():
    """Two rows of packed images: of a coarse and a fine scale, and of a fine one; then padding."""
    fine, coarse = patch_centres((3, 5), 1), patch_centres((2, 3), 2)
    padding = torch.zeros(4, 2)
    first = torch.cat((coarse, fine, padding))
    second = torch.cat((patch_centres((7, 3), 1), torch.zeros(4, 2)))
    ids = [[3] * 6 + [5] * 15 + [6] * 4, [0] * 21 + [1] * 4]
    return torch.stack((first, second)), torch.tensor(ids, dtype=torch.int32)


def _videos():
    """A row of two short videos, one of coarse patches; an id that comes back means nothing."""
    fine, coarse = patch_centres((2, 2, 3), 1), patch_centres((3, 2, 2), 4)
    return torch.cat((fine, coarse))[None], torch.tensor([[0] * 12 + [1] * 6 + [0] * 6])


def _sees(coordinates, ids, i, j, window):
    """The rule for tokens i and j of one row, number by number."""
    first, last = min(i, j), max(i, j)
    if len(set(ids[first : last + 1])) > 1:
        return False
    if window is None:
        return True
    *frames, y_gap, x_gap = (a - b for a, b in zip(coordinates[i], coordinates[j], strict=True))
    return all(gap == 0 for gap in frames) and 2 * max(abs(y_gap), abs(x_gap)) < window


def _by_loops(qkv, coordinates_BSA, ids_BS, window, bias_BS=None):
    q, k, v = qkv
    rows = []
    for b in range(q.shape[0]):
        coordinates = coordinates_BSA[min(b, len(coordinates_BSA) - 1)].tolist()
        ids = [0] * k.shape[2] if ids_BS is None else ids_BS[b].tolist()
        k_HSd, v_HSd = (x[b].repeat_interleave(q.shape[1] // x.shape[1], dim=0) for x in (k, v))
        outs = []
        for i in range(len(ids)):
            seen = [j for j in range(len(ids)) if _sees(coordinates, ids, i, j, window)]
            scores_Hn = (k_HSd[:, seen] @ q[b, :, i, :, None]).squeeze(-1) / d**0.5
            if bias_BS is not None:
                scores_Hn = scores_Hn + bias_BS[b, seen]
            outs.append((scores_Hn.softmax(-1).unsqueeze(1) @ v_HSd[:, seen]).squeeze(1))
        rows.append(torch.stack(outs, dim=1))
    return torch.stack(rows)


def _assert_same(got, want, inputs):
    grad = torch.randn(want.shape, dtype=want.dtype, generator=torch.Generator().manual_seed(1))
    of_got, of_want = (
        torch.autograd.grad(out, inputs, grad, retain_graph=True) for out in (got, want)
    )
    for a, b in zip((got, *of_got), (want, *of_want), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rows", [_images, _videos])
@pytest.mark.parametrize("window", [None, 1, 3, 4, 5, 40])
@pytest.mark.parametrize("groups", [1, 3])
def test_every_backend_follows_the_rule(rows, window, groups):
    coordinates, ids = rows()
    qkv = _qkv(*ids.shape, groups)
    want = _by_loops(qkv, coordinates, ids, window)
    for backend in DIFFERENTIABLE:
        sight = Sight(coordinates, ids)
        got = image_attention(*qkv, sight, window=window, backend=backend)
        _assert_same(got, want, qkv)


@pytest.mark.parametrize("window", [None, 3])
def test_one_set_of_coordinates_serves_all_rows(window):
    coordinates = patch_centres((3, 7), 1)[None]
    qkv = _qkv(2, 21)
    want = _by_loops(qkv, coordinates, None, window)
    for backend in DIFFERENTIABLE:
        got = image_attention(*qkv, Sight(coordinates), window=window, backend=backend)
        _assert_same(got, want, qkv)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("packed", [True, False])
def test_a_bias_is_added_to_the_scores_of_its_key(window, packed):
    coordinates, ids = _images()
    ids = ids if packed else None
    qkv = _qkv(2, 25)
    bias = torch.randn(2, 25, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    want = _by_loops(qkv, coordinates, ids, window, bias)
    for backend in DIFFERENTIABLE:
        sight = Sight(coordinates, ids)
        got = image_attention(*qkv, sight, window=window, key_bias_BS=bias, backend=backend)
        _assert_same(got, want, qkv)
        shared = image_attention(*qkv, sight, window=window, key_bias_BS=bias[:1], backend=backend)
        torch.testing.assert_close(shared[0], got[0])


@pytest.mark.parametrize("backend", DIFFERENTIABLE)
@pytest.mark.parametrize("window", [None, 3])
def test_a_packed_image_is_as_alone(backend, window):
    coordinates, ids = _images()
    q, k, v = _qkv(2, 25)
    packed = image_attention(q, k, v, Sight(coordinates, ids), window=window, backend=backend)
    for row, cuts in enumerate(([0, 6, 21, 25], [0, 21, 25])):
        for a, b in itertools.pairwise(cuts):
            piece = (x[row : row + 1, :, a:b] for x in (q, k, v))
            sight = Sight(coordinates[row : row + 1, a:b])
            alone = image_attention(*piece, sight, window=window, backend=backend)
            torch.testing.assert_close(packed[row : row + 1, :, a:b], alone)


@pytest.mark.parametrize(("window", "side"), [(1, 1), (2, 1), (3, 3), (4, 3), (5, 5), (7, 7)])
def test_a_window_is_the_side_of_a_square(window, side):
    mask = Sight(patch_centres((9, 9), 1)[None]).mask(window)
    middle = mask[0, 0, 40].view(9, 9)
    wanted = torch.zeros(9, 9, dtype=torch.bool)
    margin = (9 - side) // 2
    wanted[margin : 9 - margin, margin : 9 - margin] = True
    assert torch.equal(middle, wanted)
    assert mask[0, 0].diagonal().all()
    corner = (side + 1) // 2
    assert int(mask[0, 0, 0].sum()) == corner * corner


@pytest.mark.parametrize("backend", DIFFERENTIABLE)
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("packed", [True, False])
def test_a_part_of_the_queries_sees_the_whole_row(backend, window, packed):
    coordinates, ids = _images()
    ids = ids if packed else None
    q, k, v = _qkv(2, 25)
    options = {"window": window, "backend": backend}
    whole = image_attention(q, k, v, Sight(coordinates, ids), **options)
    parts = []
    for first, count in ((0, 5), (5, 13), (18, 7)):
        sight = Sight(coordinates, ids, first_query=first, num_queries=count)
        parts.append(image_attention(q[:, :, first : first + count], k, v, sight, **options))
    _assert_same(torch.cat(parts, 2), whole, (q, k, v))


def test_masks_are_made_once_and_only_where_something_is_hidden():
    coordinates, ids = _images()
    sight = Sight(coordinates, ids)
    assert sight.mask(3) is sight.mask(3)
    assert sight.mask(None) is sight.mask(None)
    assert sight.mask(3) is not sight.mask(5)
    assert sight.mask(3).shape == (2, 1, 25, 25)
    alone = Sight(coordinates)
    assert alone.mask(None) is None
    assert alone.block_mask(None) is None
    assert Sight(coordinates[:1]).mask(3).shape == (1, 1, 25, 25)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    ("rows", "window", "first", "packed"),
    [(_images, None, 10, True), (_images, 3, 0, True), (_videos, 3, 10, False)],
)
def test_flex_attention_is_told_the_same(rows, window, first, packed):
    """Forward only: it has no backward on a CPU."""
    coordinates, ids = rows()
    q, k, v = (x.detach().float() for x in _qkv(*ids.shape))
    bias = torch.linspace(-1, 1, ids.numel()).view(ids.shape)
    sight = Sight(coordinates, ids if packed else None, first_query=first)
    options = {"window": window, "key_bias_BS": bias}
    want = image_attention(q[:, :, first:], k, v, sight, backend="reference", **options)
    got = image_attention(q[:, :, first:], k, v, sight, backend="flex", **options)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", DIFFERENTIABLE)
@pytest.mark.parametrize("window", [None, 3])
def test_bf16_stays_near_the_exact_result(backend, window):
    coordinates, ids = _images()
    qkv = _qkv(2, 25, dtype=torch.bfloat16)
    bias = torch.linspace(-1, 1, 50).view(2, 25)
    sight = Sight(coordinates, ids)
    options = {"window": window, "key_bias_BS": bias}
    got = image_attention(*qkv, sight, backend=backend, **options)
    assert got.dtype == torch.bfloat16
    exact = [x.detach().double().requires_grad_() for x in qkv]
    want = image_attention(*exact, sight, backend="reference", **options)
    grad = torch.randn(got.shape, generator=torch.Generator().manual_seed(1))
    of_got = torch.autograd.grad(got, qkv, grad.bfloat16())
    of_want = torch.autograd.grad(want, exact, grad.bfloat16().double())
    for a, b in zip((got, *of_got), (want, *of_want), strict=True):
        limit = 0.03 * b.abs().max().item()
        torch.testing.assert_close(a.double(), b, rtol=0.0, atol=limit)


@pytest.mark.parametrize("backend", DIFFERENTIABLE)
def test_autocast_computes_in_bf16(backend):
    coordinates, ids = _images()
    qkv = _qkv(2, 25, dtype=torch.float32)
    sight = Sight(coordinates, ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = image_attention(*qkv, sight, window=3, backend=backend)
        grads = torch.autograd.grad(out, qkv, torch.ones_like(out))
    assert out.dtype == torch.bfloat16
    assert {g.dtype for g in grads} == {torch.float32}
    low = [x.detach().bfloat16() for x in qkv]
    assert torch.equal(out, image_attention(*low, sight, window=3, backend=backend))


def test_bad_requests_are_refused_by_name():
    coordinates, ids = _images()
    qkv, sight = _qkv(2, 25), Sight(coordinates, ids)
    with pytest.raises(ConfigError, match=", ".join(BACKENDS)):
        image_attention(*qkv, sight, window=None, backend="blocked")
    with pytest.raises(ConfigError, match="window 0"):
        image_attention(*qkv, sight, window=0)
    with pytest.raises(ConfigError, match="no backward on a CPU"):
        image_attention(*qkv, sight, window=None, backend="flex")
