"""Kernels of averages over tables of addresses: precision, layouts, alignment, tables that are kept."""

from __future__ import annotations

import threading
from collections import OrderedDict

import pytest
import torch

import cmfast
from cmfast import ops
from cmfast.kernels import pointers
from tests.ops.lists import LAYOUTS, RATES, SHAPES, check, make

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def no_tables():
    pointers._known.clear()


@pytest.mark.parametrize("copies", [None, torch.bfloat16], ids=["no copy", "copy"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_float64(dtype, copies, device):
    check(make(dtype, copies=copies, device=device), "triton")


@pytest.mark.parametrize("count", [0, 1, 4])
def test_number_of_averages(count, device):
    check(make(rates=RATES[1:] * 2 if count == 4 else RATES[:count], device=device), "triton")


def test_averages_in_a_low_dtype(device):
    check(make(averages=torch.float16, device=device), "triton")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["all", "averages", "parameters"])
def test_layouts(layout, kind, device):
    lists = make(device=device)
    changed = lists.map(LAYOUTS[layout])
    if kind == "averages":
        lists.averages = changed.averages
    elif kind == "parameters":
        lists.parameters = changed.parameters
    check(changed if kind == "all" else lists, "triton")


def test_rates_of_float32(device):
    lists = make(device=device)
    lists.rates = lists.rates.float()
    check(lists, "triton")


def test_a_rate_of_zero(device):
    """The parameter itself, bit for bit, whatever the average was."""
    parameter = torch.randn(100, generator=torch.Generator().manual_seed(0)).to(device)
    average = torch.full_like(parameter, 3e4)
    with cmfast.backend("triton"):
        ops.ema_update_([parameter], [[average]], [0.0])
    assert torch.equal(average, parameter)


def test_a_rate_near_one(device):
    """Of 1 - 0.9999, float32 has lost three digits."""
    average, one = torch.zeros(40, device=device), torch.ones(40, device=device)
    with cmfast.backend("triton"):
        ops.ema_update_([one], [[average]], [0.9999])
    torch.testing.assert_close(average, 1e-4 * one, rtol=1e-6, atol=0)


def test_mixed_dtypes(device):
    """A network of which some layers are in float32: two tables, one launch each."""
    lists, low = make(device=device), make(torch.float16, device=device)
    for group, others in ((lists.parameters, low.parameters), (lists.copies, low.copies)):
        group += others
    for group, others in zip(lists.averages, low.averages):
        group += others
    lists.gradients = lists.exp_avgs = lists.exp_avg_sqs = []
    check(lists, "triton")
    found = pointers.tables([lists.parameters, *lists.averages, lists.copies], 1024)
    assert sorted((str(table.dtypes[0]), table.aligned) for table in found) == sorted(
        (str(dtype), aligned) for dtype in (torch.float32, torch.float16) for aligned in (True, False)
    )


def test_wide_and_narrow_parts():
    """What is aligned up to a multiple of 16 elements, and the rest."""
    tensors = [torch.zeros(40), torch.zeros(2064), torch.zeros(33)[1:], torch.zeros(7)]
    aligned, ragged = pointers.tables([tensors, tensors], 1024)
    assert aligned.aligned and not ragged.aligned
    starts = [x.data_ptr() for x in tensors]
    rest = starts[0] + 4 * 32
    assert aligned.rows.tolist() == [[32, 0, starts[0], starts[0]], [2064, 1, starts[1], starts[1]]]
    assert aligned.owners.tolist() == [0, 1, 1, 1]
    assert ragged.rows.tolist() == [[8, 0, rest, rest], *([n, i + 1, starts[2 + i]] + [starts[2 + i]] for i, n in
                                                          enumerate((32, 7)))]  # fmt: skip


def test_tables_are_kept_and_made_anew(device):
    """For the same tensors the same; where an address, a size or a dtype is another, a new one."""
    tensors = [torch.zeros(64, device=device), torch.zeros(3, 5, device=device)]
    known = pointers.tables([tensors], 1024)
    assert pointers.tables([list(tensors)], 1024) is known
    assert pointers.tables([[tensors[0][:32], tensors[1]]], 1024) is not known
    assert pointers.tables([[tensors[0].view(torch.float16)[:64], tensors[1]]], 1024) is not known
    assert pointers.tables([tensors], 2048) is not known
    tensors[0].data = torch.ones(64, device=device)
    assert pointers.tables([tensors], 1024) is not known
    for i in range(2 * pointers.KEPT):
        pointers.tables([tensors], 1024 * (3 + i))
    assert len(pointers._known) == pointers.KEPT


def test_tables_made_in_a_capture_serve_it_alone(device, monkeypatch):
    """Their upload is only noted: before the graph has run there is nothing in them."""
    monkeypatch.setattr(pointers, "_known", type(pointers._known)())
    monkeypatch.setattr(pointers, "_captured", [])
    lists = [[torch.zeros(40, device=device)]]
    monkeypatch.setattr(pointers, "_capturing", lambda device: True)
    first = pointers.tables(lists, 16)
    assert not pointers._known and pointers._captured == [first]
    monkeypatch.setattr(pointers, "_capturing", lambda device: False)
    second = pointers.tables(lists, 16)
    assert second is not first and pointers.tables(lists, 16) is second and len(pointers._captured) == 1
    # One that was uploaded before is there, and must stay.
    monkeypatch.setattr(pointers, "_capturing", lambda device: True)
    assert pointers.tables(lists, 16) is second and pointers._captured[1] is second


def test_a_table_may_be_put_out_by_another_thread(device, monkeypatch):
    """Not between finding it and marking it as used."""
    lists, others = [[torch.zeros(40, device=device)]], [[torch.zeros(50, device=device)]]
    threads = []

    class Watched(OrderedDict):
        def get(self, key):
            found = super().get(key)
            if found is not None and not threads:
                threads.append(threading.Thread(target=pointers.tables, args=(others, 16)))
                threads[0].start()
                threads[0].join(0.2)
            return found

    monkeypatch.setattr(pointers, "KEPT", 1)
    monkeypatch.setattr(pointers, "_known", Watched())
    first = pointers.tables(lists, 16)
    assert pointers.tables(lists, 16) is first
    threads[0].join()
    assert len(pointers._known) == 1 and pointers.tables(lists, 16) is not first


@pytest.mark.unguarded  # The guard's memory is on the CPU whatever is asked for.
def test_the_default_device_is_nobodys_business(device, monkeypatch):
    monkeypatch.setattr(pointers, "_known", type(pointers._known)())
    lists = [[torch.ones(40, device=device)]]
    with torch.device("meta"):
        found = pointers.tables(lists, 16)
    assert {x.device.type for table in found for x in table[:2]} == {lists[0][0].device.type}


def test_a_view_of_the_same_memory(device):
    """Same address, size and dtype, in another order: element by element all the same."""
    weight, average = torch.arange(12.0, device=device).view(3, 4), torch.zeros(4, 3, device=device)
    with cmfast.backend("triton"):
        ops.ema_update_([weight.t()], [[average]], [0.5])
        ops.ema_update_([weight.view(4, 3)], [[average]], [0.0])
    assert average.equal(weight.view(4, 3))


def test_writes_are_counted(device):
    weight, average, other = (torch.ones(32, device=device) for _ in range(3))
    versions = weight._version, average._version, other._version
    with cmfast.backend("triton"):
        ops.ema_update_([weight], [[average]], [0.5], copies=[other])
    assert weight._version == versions[0] and average._version > versions[1] and other._version > versions[2]


def test_nothing_beside_the_tensors_is_touched(device):
    """Tensors that lie between others in one storage."""
    storage = torch.arange(256.0, device=device)
    before = storage.clone()
    with cmfast.backend("triton"):
        ops.ema_update_([torch.zeros(50, device=device)], [[storage[100:150]]], [0.0])
    before[100:150] = 0
    assert storage.equal(before)


def test_shapes_cover_what_they_should():
    sizes = [torch.Size(shape).numel() for shape in SHAPES]
    assert 0 in sizes and 1 in sizes and any(n % 16 for n in sizes) and any(n > 1024 for n in sizes)
