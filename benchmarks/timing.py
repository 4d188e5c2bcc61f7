"""How time is taken: providers in turn, round after round, over inputs that have left the cache."""

from __future__ import annotations

import ctypes
import itertools
import math
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from cmfast.benchmarks.cases import Case, Inputs, run
from cmfast.benchmarks.cores import Cores
from cmfast.fast.network import has_onednn
from cmfast.graphs import CudaSpace

#: Seconds that one slice, the calls of one provider between two clock readings, is made to last.
SLICE_S = 2e-3
#: At most so many input sets rotate. More would fill an L2 cache with the smallest sizes too, but nobody's inputs are
#: so many, and the time of such a call is that of its launch; a row says whether its inputs were cold.
MAX_SETS = 256
#: Times the L2 cache that the inputs and outputs of a rotation fill.
L2_FACTOR = 2.5
#: Seconds of copies before those that count: the clock of a GPU that did nothing is low.
WARM_UP_S = {"cuda": 0.3, "cpu": 0.0}
#: Rounds of a trial that is late.
LEAST_ROUNDS = 3
#: By `time.perf_counter()`, when a run is to be over; of one with `--seconds` it is `runs.Suite.main` that sets it.
end = math.inf
#: Those of a run on a CPU with several threads, by which its rounds are chosen.
cores: Cores | None = None
#: Times its budget that a trial waits for rounds with the cores side by side.
PATIENCE = 2.0
#: Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


class Stopwatch:
    """Seconds that work on a device takes: between CUDA events, or on a CPU the wall clock."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            self.start, self.stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, work: Callable[[], Any]) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            work()
            return time.perf_counter() - start
        self.start.record()
        work()
        self.stop.record()
        self.stop.synchronize()
        return self.start.elapsed_time(self.stop) / 1e3


def keep_memory() -> None:
    """Let the C library keep what is freed, where it can be told to (glibc).

    Otherwise results of some hundred kilobytes are given back to the system and asked for again, page by page, or not:
    it depends on what else lies in the heap, and the same call takes a third more in one process than in the next.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)  # The most that glibc takes.
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def sets_for(floor_bytes: int, l2_bytes: int | None) -> int:
    """How many input sets rotate: enough to push one another out of the cache, where a cache is known."""
    if l2_bytes is None:
        return 2
    return max(2, min(MAX_SETS, math.ceil(L2_FACTOR * l2_bytes / floor_bytes)))


class Contender:
    """One provider on one configuration: calls that rotate over input sets and keep each set's results alive.

    Kept results make the outputs rotate as well: a freed one would be handed to the next call, still in the cache.
    """

    def __init__(
        self, case: Case, function: Callable[[Inputs], Any], context: Callable[[], AbstractContextManager[Any]],
        sets: list[Inputs],
    ) -> None:
        self.case, self.function, self.context, self.sets = case, function, context, sets
        self.kept: list[list[Tensor] | None] = [None] * len(sets)
        self.position = 0
        self.replay: Any = None
        self.graph_calls = 0

    def once(self, t: Inputs) -> list[Tensor]:
        with self.context():
            return run(self.case, self.function, t)

    def calls(self, count: int) -> None:
        with self.context():
            for _ in range(count):
                i = self.position
                self.kept[i] = run(self.case, self.function, self.sets[i])
                self.position = (i + 1) % len(self.sets)

    def capture(self, most: int) -> None:
        """One CUDA graph of a call for each input set, or for the first `most`."""
        self.kept = [None] * len(self.sets)
        self.graph_calls = min(most, len(self.sets))
        space = CudaSpace(torch.device("cuda", torch.cuda.current_device()))
        with self.context():
            space.warm_up(lambda: run(self.case, self.function, self.sets[0]))
            self.kept, self.replay = space.capture(
                lambda: [run(self.case, self.function, t) for t in self.sets[: self.graph_calls]]
            )

    def replays(self, count: int) -> None:
        for _ in range(count):
            self.replay()

    def release(self) -> None:
        self.kept, self.replay, self.sets = [], None, []


def peak_bytes(contender: Contender, device: torch.device) -> int | None:
    """Device memory that one call takes at most, results included."""
    if device.type != "cuda":
        return None
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    contender.once(contender.sets[0])
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def sliced(stopwatch: Stopwatch, work: Callable[[int], Any], calls_each: int = 1) -> Callable[[], float]:
    """A slice of `work(count)` that lasts about SLICE_S: seconds per call, where each count is `calls_each` calls."""
    def elapsed(count: int) -> float:
        return stopwatch(lambda: work(count))

    elapsed(1)
    count = 1
    while (taken := elapsed(count)) < SLICE_S / 2 and count < 20000:
        count = math.ceil(count * min(10.0, max(1.5, SLICE_S / max(taken, 1e-9))))
    return lambda: elapsed(count) / (count * calls_each)


def lost(error: Exception) -> bool:
    """Whether an error means that the device is lost to this process; one of a call alone a run survives."""
    if not isinstance(error, torch.AcceleratorError):
        return False
    try:
        torch.cuda.synchronize()
    except (RuntimeError, AssertionError):  # The latter where PyTorch has no CUDA.
        return True
    return False


def reason_of(error: Exception) -> str:
    """One that a run survives, in words.

    Raises: torch.AcceleratorError: the device is lost to this process.
    """
    if lost(error):
        raise error
    return f"{type(error).__name__}: {error}"


def late() -> bool:
    """Whether the time of a run is over: what a trial has by then is made a row of, and nothing else is begun."""
    return time.perf_counter() > end


def interleave(
    slices: dict[str, Callable[[], float]], budget_s: float, rounds: tuple[int, int] = (7, 1000)
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Samples of every slice, taken in turn, so that a drift of clocks falls on all alike; and by name why a slice has
    none, that failed: the others go on.

    Every other round goes backwards. `rounds`: at least so many, then until the budget is spent, and at most so many;
    of a run that is `late`, LEAST_ROUNDS. Of a CPU's rounds those count that had its cores side by side, which it takes
    PATIENCE to have enough of, or all.
    """
    samples: dict[str, list[float]] = {name: [] for name in slices}
    broken: dict[str, str] = {}
    apart: list[float] = []
    now = cores.seconds() if cores else 0.0
    start = time.perf_counter()
    for i in range(rounds[1]):
        spent = time.perf_counter() - start
        enough = cores is None or len(cores.near(apart)) >= rounds[0] or spent > PATIENCE * budget_s
        if i >= rounds[0] and spent > budget_s and enough or i >= LEAST_ROUNDS and late():
            break
        for name in list(samples)[:: 1 if i % 2 == 0 else -1]:
            try:
                samples[name].append(slices[name]())
            except Exception as error:
                broken[name] = reason_of(error)
                del samples[name]
        if cores:
            before, now = now, cores.seconds()
            apart.append(max(before, now))
    if cores:
        counted = cores.counted(apart, LEAST_ROUNDS)
        samples = {name: [times[i] for i in counted] for name, times in samples.items()}
    return samples, broken


def percentile(samples: list[float], percent: float) -> float:
    """
    >>> percentile([3.0, 1.0, 2.0], 50)
    2.0
    """
    ordered = sorted(samples)
    at = percent / 100 * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def statistics_us(samples: list[float]) -> dict[str, Any]:
    """Percentiles in microseconds; those of the two halves of the run tell what a difference must exceed."""
    half = len(samples) // 2
    halves = [samples[:half], samples[half:]] if half else [samples]
    return {
        **{f"p{p}_us": round(percentile(samples, p) * 1e6, 4) for p in (20, 50, 80)},
        "p50_halves_us": [round(statistics.median(part) * 1e6, 4) for part in halves],
        "samples": len(samples),
    }


def statistics_ms(samples: list[float]) -> dict[str, Any]:
    """The same in milliseconds."""
    found = statistics_us(samples)
    count = {"samples": found.pop("samples")}
    milli = {
        name.replace("_us", "_ms"): [round(v / 1e3, 4) for v in value] if isinstance(value, list) else value / 1e3
        for name, value in found.items()
    }
    return {**milli, **count}


def count_kernels(device: torch.device, work: Callable[[], None]) -> int | None:
    """Kernels that some work launches on the device; None on a CPU, or where the profiler may not look.

    When all is timed: where the profiler stays, launches are slower from then on.
    """
    if device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        work()
        torch.cuda.synchronize(device)
    # With TEARDOWN_CUPTI=1, a thread of the profiler's takes it away at the end of some call after: of these.
    for _ in range(5):
        time.sleep(0.01)
        torch.cuda.synchronize(device)
    ran = [event for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CUDA]  # type: ignore[attr-defined]  # at run time alone
    marks = ("Memcpy", "Memset")
    # Where the profiler may not look at the device, it reports nothing at all.
    return sum(not (event.name.startswith(marks) or event.is_user_annotation) for event in ran) or None


def times_of(times: list[float], ours: list[float] | None) -> dict[str, float] | None:
    """Percentiles of a provider's time as a multiple of cmfast's in the same round; None where cmfast was not timed.

    >>> times_of([2.0, 6.0, 4.0], [1.0, 2.0, 2.0])
    {'p20': 2.0, 'p50': 2.0, 'p80': 2.6}
    """
    if ours is None:
        return None
    ratios = [other / one for other, one in zip(times, ours)]
    return {f"p{p}": round(percentile(ratios, p), 4) for p in (20, 50, 80)}


def rates(device: torch.device, quick: bool = False) -> dict[str, Any]:
    """What the device can do at most, now: a large copy, and by dtype a large matrix product (CPU: a convolution)."""
    what = "matrix product" if device.type == "cuda" else "3x3 convolution"
    if device.type == "cuda":
        dtypes: tuple[torch.dtype, ...] = torch.float16, torch.bfloat16, torch.float32
    else:
        dtypes = (torch.float32, *([torch.bfloat16] if has_onednn(torch.bfloat16) else []))
    copy = copy_bandwidth(device, quick)  # First, since it warms up the device.
    matrix = {str(dtype).removeprefix("torch."): _matrix_rate(device, dtype, quick) for dtype in dtypes}
    return {"copy": copy, "what": what, "matrix": matrix}


def _matrix_rate(device: torch.device, dtype: torch.dtype, quick: bool) -> dict[str, Any]:
    """TFLOP/s of a product of 8192x8192 matrices, in float32 as PyTorch does it by default; on a CPU of 256 channels
    of 32x32 by 3x3, in channels_last."""
    stopwatch = Stopwatch(device)
    if device.type == "cuda":
        side = 2048 if quick else 8192
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        flops, work = 2 * side**3, lambda: torch.mm(a, b)
    else:
        x, w = (
            torch.randn(shape, dtype=dtype).to(memory_format=torch.channels_last)
            for shape in ((4, 256, 32, 32), (256, 256, 3, 3))
        )
        flops, work = 2 * 4 * 32 * 32 * 256 * 256 * 9, lambda: torch.nn.functional.conv2d(x, w, padding=1)
    with torch.no_grad():
        for _ in range(2):
            work()
        samples = [stopwatch(work) for _ in range(5 if quick else 15)]
    slow, middle, fast = (round(flops / percentile(samples, p) / 1e12, 4) for p in (80, 50, 20))
    return {"tflop_per_s": middle, "tflop_per_s_p20": slow, "tflop_per_s_p80": fast}


def copy_bandwidth(device: torch.device, quick: bool = False) -> dict[str, Any]:
    """A large copy on the device, in GB/s, bytes read and bytes written both counted."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        size = min(2**28 if quick else 2**31, free // 8)
    else:
        size = 2**26  # Less would stay in the cache.
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    stopwatch = Stopwatch(device)
    begun = time.perf_counter()
    for i in itertools.count():
        if i >= 2 and time.perf_counter() - begun >= WARM_UP_S[device.type]:
            break
        stopwatch(lambda: target.copy_(source))
    samples = [stopwatch(lambda: target.copy_(source)) for _ in range(7 if quick else 25)]
    slow, middle, fast = (round(2 * size / percentile(samples, p) / 1e9, 2) for p in (80, 50, 20))
    return {"bytes": size, "gb_per_s": middle, "gb_per_s_p20": slow, "gb_per_s_p80": fast}
