"""The kernels of group normalisation: both ways through it (a slab on chip, three launches), both layouts."""

from __future__ import annotations

import itertools

import pytest
import torch

import cmfast
from cmfast import ops, reference
from cmfast.kernels import group_norm, group_norm_bwd, group_norm_tiles, launch
from tests.ops.matrix import upstream
from tests.ops.norms import KINDS, Norm, check_path, layout, make

#: Groups of 6, 3, 1, 18 and 12 channels, all channels in one; maps from one pixel on, of one to three dimensions.
SHAPES = [
    ((1, 96, 8, 8), 32),
    ((1, 24, 16, 16), 4),
    ((1, 33, 7, 3), 33),
    ((1, 72, 4, 4), 4),
    ((2, 24, 5, 1), 2),
    ((2, 64, 3, 3), 1),
    ((2, 12, 37), 2),
    ((2, 12, 2, 3, 4), 4),
    ((2, 20, 1, 1), 5),
    ((2, 9), 3),
    ((0, 12, 4, 4), 2),
    ((2, 12, 0, 4), 2),
]
ODD = ((2, 18, 9, 9), 3)
layouts = pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])


@pytest.fixture(params=["one launch", "three launches"])
def way(request, monkeypatch):
    """Slabs of any size; or none, and programs of several small tiles, several of which share a map."""
    if request.param == "one launch":
        monkeypatch.setattr(group_norm_tiles, "WHOLE", (2**20, 2**20))
    else:
        small = {"BLOCK": (256, 128), "ENOUGH": 1, "MANY": 1, "PART": 64, "LEAST": 32, "FOLD": 32}
        for name, value in {"WHOLE": (0, 0), **small}.items():
            monkeypatch.setattr(group_norm_tiles, name, value)
    return request.param


@pytest.fixture
def launches(monkeypatch):
    """The kernels that are launched, with their arguments."""
    seen = []
    run = launch.launch

    def spy(kernel, programs, *arguments, **constants):
        seen.append((kernel.fn.__name__, arguments))
        run(kernel, programs, *arguments, **constants)

    monkeypatch.setattr(group_norm_tiles, "launch", spy)
    return seen


@layouts
@pytest.mark.parametrize("shape, groups", SHAPES, ids=str)
def test_agrees_with_float64(shape, groups, last, way, device):
    if last and len(shape) < 4:
        pytest.skip("has no channels_last")
    check_path(make(shape, groups, last=last, device=device), "triton")


@layouts
@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind, last, way, device):
    check_path(make(*ODD, kind, last=last, device=device), "triton")


@layouts
@pytest.mark.parametrize(
    "dtype, parameters",
    [(torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)],
    ids=["bfloat16", "all bfloat16", "float16"],
)
def test_dtypes(dtype, parameters, last, way, device):
    check_path(make(*ODD, dtype=dtype, parameters=parameters, last=last, device=device), "triton")


def test_half_parameters_of_float32(way, device):
    check_path(make(*ODD, parameters=torch.float16, device=device), "triton")


@layouts
@pytest.mark.parametrize("mean, kind", [(50.0, "film"), (50.0, "sum"), (-1000.0, "x_bias")])
def test_large_means(mean, kind, last, way, device):
    """Far from zero: E[x^2] - E[x]^2 would have lost all digits."""
    check_path(make(*ODD, kind, mean=mean, last=last, device=device), "triton")


def test_a_mean_that_is_far_from_the_first_pixels(way, device):
    """Differences to a mean that is not the map's lose digits, and not many of them."""
    norm = make((1, 8, 16, 16), 2, "plain", device=device)
    norm.tensors["x"][:, :, 4:] += 100
    check_path(norm, "triton")


@pytest.mark.parametrize("kind", ["x_bias", "sum"])
def test_a_large_bias(kind, way, device):
    """It is no part of the tile's elements that are none."""
    norm = make((2, 8, 5, 3), 8, kind, last=True, device=device)
    norm.tensors["x_bias"].fill_(1000.0)
    check_path(norm, "triton")


def test_one_pixel_in_a_group_is_its_mean(device):
    norm = make((2, 8, 1, 1), 8, "film", device=device)
    _, grads = norm.run_with_grads("triton")
    z = norm.tensors["bias"] * (1 + norm.tensors["scale"]) + norm.tensors["shift"]
    torch.testing.assert_close(norm.run("triton")[0][..., 0, 0], torch.nn.functional.silu(z))
    assert grads["x"].abs().max() < 1e-3


def test_a_map_in_many_parts(device):
    """As large maps are cut: 64x64 of 8 channels, in parts that are folded."""
    norm = make((1, 8, 64, 64), 4, "sum", last=True, device=device)
    check_path(norm, "triton")


def cuts(channels, size, batch, backward):
    """How maps are cut in each dtype and layout."""
    for dtype, last in itertools.product((torch.float32, torch.bfloat16), (False, True)):
        x = torch.empty(batch, channels, size, size, dtype=dtype, device="meta")
        yield x.dtype, last, group_norm_tiles.cut(layout(x, last), 32, backward, False)


@pytest.mark.parametrize("channels", [32, 96, 192, 384, 576, 768, 960, 1152, 1344, 1536])
def test_slabs_are_whole_groups_that_share_no_counter(channels):
    """And those of many samples fill sectors of memory."""
    for size, batch, backward in itertools.product((1, 8, 16, 32, 64, 256), (1, 256), (False, True)):
        for dtype, _, cut in cuts(channels, size, batch, backward):
            if not cut.slab:
                assert cut.rows * cut.block == group_norm_tiles.BLOCK[backward] or cut.rows >= size * size
                continue
            assert cut.slab % (channels // 32) == 0 and (cut.slab % 4 == 0 or cut.slab == channels)
            assert cut.rows * cut.block <= group_norm_tiles.WHOLE[backward] and cut.block >= cut.slab
            assert cut.rows >= size * size
            if cut.last and batch > 1:
                assert cut.slab * dtype.itemsize >= 32


def test_small_maps_of_the_u_net_take_one_launch():
    """Forward, those of up to 16x16 and at one sample 192 channels of 32x32; backward, those of 8x8."""
    for channels, size, batch, backward in [
        *((channels, 8, batch, False) for channels in (576, 768, 1344, 1536) for batch in (1, 64)),
        *((channels, 16, 1, False) for channels in (384, 576, 768, 960, 1152)),
        *((channels, 32, 1, False) for channels in (192, 384)),
        *((768, 8, batch, True) for batch in (1, 64)), (384, 16, 64, True),
    ]:  # fmt: skip
        assert all(cut.slab for _, last, cut in cuts(channels, size, batch, backward) if last), (channels, size, batch)


def test_launches(way, launches, device):
    _, results = make(*ODD, "sum", last=True, device=device).graph("triton")
    forward = len(launches)
    torch.autograd.backward(results, [upstream(r) for r in results])
    assert (forward, len(launches) - forward) == ((1, 1) if way == "one launch" else (3, 3))


def misaligned(x):
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def transposed(x):
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


LAYOUTS = {
    "misaligned": misaligned,
    "transposed": transposed,
    "sliced": lambda x: torch.stack([x, x.flip(0)], dim=-1)[..., 0],
    "expanded": lambda x: x[:1].expand_as(x),
}


def same(norm: Norm, other: Norm) -> None:
    values, grads = norm.run_with_grads("triton")
    others, other_grads = other.run_with_grads("triton")
    for value, expected in zip([*others, *other_grads.values()], [*values, *grads.values()], strict=True):
        torch.testing.assert_close(value, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name, way, device):
    """Wherever the numbers lie, x and what stands beside it, the same numbers come out."""
    norm = make((3, 12, 4, 5), 2, device=device)
    tensors = {k: LAYOUTS[name](v) if v.ndim > 1 or name != "transposed" else v for k, v in norm.tensors.items()}
    plain = {k: v.contiguous() for k, v in tensors.items()}
    same(Norm(plain, 2, norm.options), Norm(tensors, 2, norm.options))


def test_a_residual_in_another_layout(way, device):
    norm = make((3, 12, 4, 5), 2, device=device)
    same(norm, Norm({**norm.tensors, "residual": layout(norm.tensors["residual"], True)}, 2, norm.options))
    mixed = {**norm.tensors, "residual": norm.tensors["residual"].bfloat16()}
    check_path(Norm(mixed, 2, norm.options), "triton")


@layouts
@pytest.mark.parametrize("level", [-30.0, -8.0, 8.0, 11.0, 30.0])
def test_slope_far_from_zero(level, last, way, device):
    """There SiLU's slope is 0 or 1 but for z (1 - sigmoid(z)), of which a difference to 1 would leave roundings."""
    norm = make(*ODD, "film", last=last, device=device)
    check_path(Norm({**norm.tensors, "shift": norm.tensors["shift"] + level}, ODD[1], {}), "triton")


@layouts
def test_rows_of_a_projection_are_not_copied(last, way, launches, device):
    """Halves of a larger tensor, and rows that are one row: by their stride."""
    norm = make((3, 12, 4, 5), 2, "film", last=last, device=device)
    generator = torch.Generator().manual_seed(1)
    projection = torch.randn(3, 100, generator=generator).to(device)
    shift = torch.randn(1, 12, generator=generator).to(device)
    views = {"scale": projection[:, 7:19], "shift": shift.expand(3, 12)}
    norm = Norm({**norm.tensors, **views}, 2, {})
    launches.clear()
    norm.run("triton")
    seen = {t.data_ptr() for _, arguments in launches for t in arguments if isinstance(t, torch.Tensor)}
    assert all(v.data_ptr() in seen for v in norm.tensors.values())
    check_path(norm, "triton")


@pytest.mark.parametrize("name", ["channels_last", "expanded"])
def test_layout_of_incoming_gradients(name, way, device):
    norm = make((2, 12, 4, 5), 2, device=device)
    leaves, results = norm.graph("triton")
    plain = [upstream(r) for r in results]
    if name == "expanded":
        # Other numbers follow in memory, where a kernel that took it for dense would read.
        given = [torch.stack([g[0], g[0] + 1])[:1].expand_as(g) for g in plain]
        plain = [g.contiguous() for g in given]
    else:
        given = [layout(g, True) for g in plain]
    for_plain, for_given = (
        torch.autograd.grad(results, list(leaves.values()), grads, retain_graph=True) for grads in (plain, given)
    )
    for value, expected in zip(for_given, for_plain, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("part", [0, 1], ids=["y", "sum"])
def test_gradient_of_one_result(part, way, device):
    norm = make((2, 12, 4, 5), 2, device=device)
    grads = []
    for backend in ("triton", "reference"):
        leaves, results = norm.graph(backend)
        value = results[part]
        grads.append(torch.autograd.grad(value, list(leaves.values()), upstream(value), allow_unused=True))
    for name, value, expected in zip(norm.tensors, *grads, strict=True):
        assert (value is None) == (expected is None), name
        if expected is not None:
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["x_bias", "all"])
def test_gradient_of_one_input(kind, way, device):
    norm = make((2, 12, 4, 5), 2, kind, device=device)
    _, together = norm.run_with_grads("triton")
    for name, expected in together.items():
        _, alone = norm.run_with_grads("triton", name)
        assert list(alone) == [name] and torch.equal(alone[name], expected), name


@pytest.mark.parametrize("kind", ["film", "x_bias", "all"])
def test_gradients_of_gradients(kind, device):
    """From the reference: the kernels know first derivatives only."""
    norm = make((2, 4, 3, 3), 2, kind, device=device)
    second = []
    for backend in ("triton", "reference"):
        leaves, results = norm.graph(backend)
        weights = [upstream(r).requires_grad_() for r in results]
        first = torch.autograd.grad(results, list(leaves.values()), weights, create_graph=True)
        total = sum((g.square() * upstream(g)).sum() for g in first)
        second.append(torch.autograd.grad(total, [*leaves.values(), *weights], allow_unused=True))
    for value, expected in zip(*second, strict=True):
        assert (value is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["x", "weight", "x_bias", "scale"])
def test_gradients_of_gradients_of_one_input(name, device):
    """Where the others need none, as with frozen weights."""
    norm = make((2, 4, 3, 3), 2, "all", device=device)
    second = []
    for backend in ("triton", "reference"):
        leaves, (y, total) = norm.graph(backend, name)
        (first,) = torch.autograd.grad(y, leaves[name], upstream(y), create_graph=True)
        second.append(torch.autograd.grad((first.square() * upstream(first)).sum(), leaves[name], allow_unused=True)[0])
    if second[1] is not None:
        torch.testing.assert_close(*second, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_many_gradients_at_once(kind, device):
    """`is_grads_batched`, as of a vectorized jacobian: from the reference."""
    norm = make((2, 4, 3, 3), 2, kind, device=device)
    found = []
    for backend in ("triton", "reference"):
        leaves, results = norm.graph(backend)
        weights = [torch.stack([upstream(r), upstream(r) * 2 + 1]) for r in results]
        found.append(torch.autograd.grad(results, list(leaves.values()), weights, is_grads_batched=True))
    for value, expected in zip(*found, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)


def test_tensors_made_in_inference_mode(device):
    norm = make((2, 4, 3, 3), 2, "all", device=device)
    leaves, (y, _) = norm.graph("triton", "x")
    with torch.inference_mode():
        made = {k: v.clone() for k, v in norm.tensors.items() if k != "x"}
        index = norm.options["draw"].index.clone()
    other = Norm({**norm.tensors, **made}, 2, {**norm.options, "draw": norm.options["draw"]._replace(index=index)})
    others, (value, _) = other.graph("triton", "x")
    grads = (torch.autograd.grad(r, x["x"], upstream(r))[0] for r, x in ((y, leaves), (value, others)))
    assert value.equal(y) and torch.equal(*grads)


def test_a_group_of_more_than_2_to_the_31_elements(device):
    """Its count goes beyond 32 bits: of the kernels that fold, whose inputs are small. Channels have mean 3 and
    variance 4, and sums of as much as there are pixels."""
    channels, pixels = 64, 2**25 + 5
    affine, moments, means = (torch.zeros(1, n, 2 * channels, device=device) for n in (3, 1, 1))
    weight, bias = torch.ones(channels, device=device), torch.zeros(channels, device=device)
    partial = torch.tensor([[3.0], [4.0 * pixels]], device=device).expand(2, channels).contiguous()
    sizes = 1, 1, channels, pixels
    options = {"scale_stride": 1, "shift_stride": 1, "FILM": False, "GROUP": channels, "PART": pixels, "PARTS": 1}
    parameters = weight, bias, weight, bias
    launch.launch(
        group_norm._group_norm_fold_kernel, 1, affine, moments, partial, bias, *parameters, *sizes,
        eps=0.0, X_BIAS=False, CHANNELS=channels, **options,
    )  # fmt: skip
    torch.testing.assert_close(moments.flatten()[:2].tolist(), [3.0, 0.5])
    sums = torch.full((2, channels), float(pixels), device=device)
    launch.launch(
        group_norm_bwd._group_norm_fold_bwd_kernel, 1, means, affine, affine, affine, sums, *parameters, *sizes,
        CHANNELS=channels, **options,
    )  # fmt: skip
    torch.testing.assert_close(means.flatten()[:2].tolist(), [1.0, 1.0])


@layouts
def test_same_bits_on_repetition(last, way, device):
    norm = make((2, 12, 8, 8), 2, last=last, device=device)
    first, first_grads = norm.run_with_grads("triton")
    second, second_grads = norm.run_with_grads("triton")
    for a, b in zip([*first, *first_grads.values()], [*second, *second_grads.values()], strict=True):
        assert torch.equal(a, b)


@layouts
@pytest.mark.parametrize("tensors", [False, True], ids=["numbers", "tensors"])
@pytest.mark.parametrize("shape, groups", [((3, 30, 5, 7), 5), ((3, 7, 4, 4), 7), ((3, 12, 3), 3)], ids=str)
def test_dropout_keeps_what_the_reference_keeps(shape, groups, tensors, last, way, device):
    """Bit for bit, whatever the layout; the backward pass too."""
    seed, number = 2**40 + 3, 2**32 - 1
    index = torch.tensor([0, 2**33 + 1, 7], device=device)
    given = (torch.tensor(seed, device=device), torch.tensor(number, device=device)) if tensors else (seed, number)
    draw = ops.Draw(given[0], index, given[1])
    norm = make(shape, groups, "plain", last=last, device=device, silu=False, dropout=0.4, draw=draw)
    norm.tensors["bias"].fill_(100.0)
    mask = reference.dropout_mask(draw, shape, 0.4)
    (y,), grads = norm.run_with_grads("triton")
    assert torch.equal(y != 0, mask)
    z = ops.group_norm_silu(num_groups=groups, silu=False, **norm.tensors)
    torch.testing.assert_close(y[mask], z[mask] / 0.6)
    dims = [i for i in range(len(shape)) if i != 1]
    expected = (upstream(y) * mask).sum(dims) / 0.6
    torch.testing.assert_close(grads["bias"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dropout", [1e-12, 0.5, 1 - 1e-12])
def test_dropout_at_its_ends(dropout, device):
    norm = make((2, 32, 4, 4), 4, "plain", device=device, dropout=dropout)
    assert torch.equal(norm.run("triton")[0] != 0, norm.run("reference")[0] != 0)


def test_only_what_was_normalised_is_kept(way, device):
    """For the backward pass: the sum where there is one, else x."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        norms = [make((2, 12, 8, 8), 2, kind, device=device) for kind in ("film", "all")]
        results = [norm.graph("triton")[1] for norm in norms]
    large = [t.data_ptr() for t in kept if t.numel() >= results[0][0].numel()]
    assert large == [norms[0].tensors["x"].data_ptr(), results[1][1].data_ptr()]


def test_a_seed_must_not_change_between_the_passes(device):
    seed = torch.tensor(1, device=device)
    draw = ops.Draw(seed, torch.arange(2, device=device))
    _, results = make((2, 8, 2, 2), 2, "plain", device=device, dropout=0.5, draw=draw).graph("triton")
    seed.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        results[0].sum().backward()


@layouts
def test_no_copies(last, way, launches, device):
    norm = make((2, 12, 4, 6), 2, last=last, device=device)
    norm.run("triton")
    seen = {t.data_ptr() for _, arguments in launches for t in arguments if isinstance(t, torch.Tensor)}
    assert all(v.data_ptr() in seen for v in norm.tensors.values())


def test_refused_before_anything_is_launched(launches, device):
    """With the same words on both paths."""
    norm = make((2, 12, 4, 4), 2, device=device)
    words = []
    for backend in ("triton", "reference"):
        with cmfast.backend(backend), pytest.raises(ValueError, match=r"scale must be \[B, C\]") as error:
            norm.call({**norm.tensors, "scale": norm.tensors["scale"][:1]})
        words.append(str(error.value))
    assert words[0] == words[1] and not launches


def test_float64_is_refused(device):
    norm = make((2, 12, 4, 4), 2, device=device).to(torch.float64)
    with pytest.raises(RuntimeError, match="group_norm_silu: backend 'triton' was asked for, but kernels take"):
        norm.run("triton")


def test_no_reads_on_the_host(way, device):
    if device.type == "cpu":
        pytest.skip("the CPU has no other side to read from")
    norm = make((2, 192, 8, 8), 32, device=device)
    norm.run_with_grads("triton")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        norm.run_with_grads("triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
