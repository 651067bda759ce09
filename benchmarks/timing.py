"""Fair timing on a shared machine: the sides of a comparison run in turns; reported are medians of paired ratios."""
from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Timing:
    """Seconds of each side, round by round: `seconds[name][i]` all belong to round i."""
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def median(self, name: str) -> float:
        """Median seconds of a side."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, baseline: str) -> dict[str, float]:
        """How many times as long `name` takes as `baseline`: median, lower and upper quartile over the rounds."""
        ratios = [a / b for a, b in zip(self.seconds[name], self.seconds[baseline])]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        return {"median": middle, "low": low, "high": high}

    def speed_up(self, name: str, baseline: str) -> dict[str, float]:
        """How many times as fast `name` is as `baseline`."""
        ratio = self.ratio(name, baseline)
        return {"median": 1 / ratio["median"], "low": 1 / ratio["high"], "high": 1 / ratio["low"]}


def interleave(sides: dict[str, Callable[[], float | None]], rounds: int = 15, warmup: int = 2,
               budget: float | None = None) -> Timing:
    """Time every side once a round, in another order each round, so that drift and what a side leaves behind (memory
    to be given back, warm caches) affect all alike.

    `warmup` rounds aren't counted. `budget` (seconds): no new round once it is used up (at least 3 are run).
    A side that returns a float has timed itself, in seconds. On a GPU a side must synchronise at its end.
    """
    names = list(sides)
    timing = Timing({name: [] for name in names})
    order = random.Random(0)
    begun = time.perf_counter()
    for r in range(-warmup, rounds):
        for name in order.sample(names, len(names)):
            start = time.perf_counter()
            own = sides[name]()
            if r >= 0:
                timing.seconds[name].append(own if isinstance(own, float) else time.perf_counter() - start)
        if budget is not None and r >= 2 and time.perf_counter() - begun > budget:
            break
    return timing


def timed(run: Callable[[], object], cpu_time: bool = True) -> Callable[[], float]:
    """`run` as a side that times itself: in CPU seconds (`cpu_seconds`), else in wall time."""
    clock = cpu_seconds if cpu_time else time.perf_counter

    def side() -> float:
        began = clock()
        run()
        return clock() - began
    return side


def parser(description: str, threads: int = 2, cpu_time: bool = False) -> argparse.ArgumentParser:
    """The flags all benchmarks share: --json FILE, --threads N (default `threads`), --rounds N; and --cpu-time, where
    asked for."""
    flags = argparse.ArgumentParser(description=description)
    flags.add_argument("--json", metavar="FILE", help="also write the results there")
    flags.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", threads)),
                       help="CPU threads (default: OMP_NUM_THREADS, else %(default)s)")
    flags.add_argument("--rounds", type=int, default=None, help="timed rounds of each comparison")
    if cpu_time:
        flags.add_argument("--cpu-time", action="store_true", help="count CPU seconds, on one thread")
    return flags


def begin(args: argparse.Namespace) -> None:
    """Set the number of threads (one where CPU seconds are counted, as waiting threads use CPU too), and print a first
    line that says what the figures are measured on."""
    import torch
    if getattr(args, "cpu_time", False):
        args.threads = 1
    torch.set_num_threads(args.threads)
    print(machine(args.threads), flush=True)


def cpu_seconds() -> float:
    """CPU seconds, in user mode and in the kernel, of this process and of those of its children that have ended.

    Unlike wall time, they are comparable on a machine that others use too.
    """
    try:
        import resource
    except ImportError:    # Windows, where children don't count
        return time.process_time()
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


#: Instruction sets of a CPU, by the name of the function in torch.cpu that tells whether it has them.
FEATURES = {"_is_avx2_supported": "AVX2", "_is_avx512_supported": "AVX-512",
            "_is_avx512_bf16_supported": "AVX512-BF16", "_is_amx_tile_supported": "AMX"}


def machine(threads: int | None = None) -> dict[str, object]:
    """The hardware and versions that figures were measured on, for the JSON and the first line printed."""
    import torch
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as info:
            name = next((line.split(":", 1)[1].strip() for line in info if line.startswith("model name")), name)
    except OSError:
        pass
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    features = [feature for question, feature in FEATURES.items() if getattr(torch.cpu, question, bool)()]
    return {"cpu": name, "features": features, "cores": os.cpu_count(),
            "threads": threads or torch.get_num_threads(), "gpu": gpu, "torch": torch.__version__,
            "python": platform.python_version()}


def finish(name: str, results: object, args: argparse.Namespace) -> None:
    """Write `{"benchmark", "machine", "results"}` to --json's file, if one was named."""
    if args.json:
        from utils.files import write_json
        write_json(args.json, {"benchmark": name, "machine": machine(args.threads), "results": results})
        print(f"written to {args.json}")


def spread(ratio: dict[str, float]) -> str:
    """`1.07x (1.03 to 1.12)` of a ratio from `Timing`."""
    return f"{ratio['median']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})"
