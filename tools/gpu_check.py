"""One command that tells whether LightVL is right and fast on this machine's GPU, in under 8 minutes.

    python tools/gpu_check.py                          # all parts
    python tools/gpu_check.py kernels attention        # some of them
    python tools/gpu_check.py --compare old.json       # and what has changed since another run
    python tools/gpu_check.py --device cpu             # a dry run: the same code over tiny shapes, without a GPU

kernels    flashinfer's compiled modules are found (or built) and load
sampling   the sampler's settings choose what they choose on a CPU
attention  the backend, the decoder's fused operations and the towers' attention against dense references
families   every model family against HF on tiny models: at most twice the error of HF in bfloat16
graphs     CUDA graphs against eager bit by bit; chunked, batched and preempted sequences within the bound of `families`
speed      decode, prefill and encode of Qwen2-VL-7B and Llama-3.2-11B-Vision against this GPU's measured ceilings
memory     what clients can ask at once fits; where others take the memory, a 503, and the server goes on
server     the embedded model over HTTP: answers as right as on a CPU, and how fast

Prints each check when it is known and a table last; writes gpu_check.json and gpu_check.log after every check to --out
($OUT where that is set). Exits 0 when all is well, 1 when not, 2 where there is no GPU.

On a lent device machine (Python 3.12, torch 2.11, no network): copy the wheels of shared/gpu to the ignored folder
.whl of the checkout (`mkdir -p .whl && cp ../shared/gpu/*.whl .whl/`), carry it ("carry": [".whl"]), and run, with a
limit of 600 s:

    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target /tmp/site .whl/*.whl &&
    PYTHONPATH=/tmp/site FLASHINFER_DISABLE_JIT=1 FLASHINFER_USE_CUDA_NORM=1 python3 tools/gpu_check.py
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import importlib
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu.report import compare, condensed, read_rows, table
from gpu.rows import Context, emit_line
from gpu.runner import BUDGETS_S, Run

ROOT = Path(__file__).resolve().parents[1]


def find_gpu() -> dict[str, Any]:
    """Name, memory and compute capability of the first GPU, by the driver alone: in milliseconds, and without a CUDA
    context. RuntimeError with the reason where there is none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise RuntimeError("there is no NVIDIA driver (libcuda.so.1)") from None
    count, name = ctypes.c_int(), ctypes.create_string_buffer(100)
    memory, major, minor = ctypes.c_size_t(), ctypes.c_int(), ctypes.c_int()
    if status := driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        raise RuntimeError(f"the NVIDIA driver sees no GPU (error {status})")
    if count.value == 0:
        raise RuntimeError("the NVIDIA driver sees no GPU")
    device = ctypes.c_int()
    driver.cuDeviceGet(ctypes.byref(device), 0)
    driver.cuDeviceGetName(name, len(name), device)
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    driver.cuDeviceComputeCapability(ctypes.byref(major), ctypes.byref(minor), device)
    return {
        "gpu": name.value.decode(),
        "gpu_memory_gib": memory.value / 2**30,
        "capability": f"{major.value}.{minor.value}",
    }


def describe_machine(gpu: dict[str, Any]) -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        **gpu,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "commit": commit.stdout.strip(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    }


def run_child(args: argparse.Namespace) -> int:
    """One part, in this process. `tests` is on the path for the reference models that it shares with the tests."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    faulthandler.enable()
    faulthandler.dump_traceback_later(max(1.0, args.until - time.time() - 2))  # where it hung, before it is killed
    part = importlib.import_module(f"gpu.{args.child}")
    part.run(Context(args.child, args.device, args.until - time.time(), emit_line, args.after, profiles=args.profile))
    faulthandler.cancel_dump_traceback_later()
    return 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(BUDGETS_S)} (default: all)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run over tiny shapes")
    parser.add_argument(
        "--out", type=Path, default=Path(os.environ.get("OUT", ROOT / "build/gpu_check")), help="folder of the results"
    )
    parser.add_argument(
        "--compare", type=Path, nargs="+", metavar="JSON", help="an older run's result; with two, nothing is run"
    )
    parser.add_argument(
        "--patience", type=float, default=1.0, help="times the seconds of each part, where other work runs beside it"
    )
    parser.add_argument("--profile", action="store_true", help="tell in the log which kernels take the time of `speed`")
    parser.add_argument("--child", choices=list(BUDGETS_S), help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)  # seconds of the epoch
    parser.add_argument("--after", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := sorted(set(args.parts) - set(BUDGETS_S)):
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(BUDGETS_S)}")
    if args.compare is not None and len(args.compare) > 2:
        parser.error("--compare takes one result, or two")
    return args


def main() -> int:
    args = parse_args()
    if args.child is not None:
        return run_child(args)
    if args.compare is not None and len(args.compare) == 2:
        print(compare(*(read_rows(path) for path in args.compare)))
        return 0
    old = read_rows(args.compare[0]) if args.compare else None  # now: it may be the file that is written over
    gpu: dict[str, Any] = {"gpu": "none: a dry run on the CPU"}
    if args.device == "cuda":
        try:
            gpu = find_gpu()
        except RuntimeError as error:
            print(f"gpu_check: {error}; `--device cpu` is a dry run without a GPU", file=sys.stderr)
            return 2
    started = time.monotonic()
    parts = [part for part in BUDGETS_S if part in args.parts or not args.parts]
    flags = ("--profile",) if args.profile else ()
    run = Run(
        Path(__file__).resolve(),
        parts,
        args.device,
        args.out,
        describe_machine(gpu),
        flags=flags,
        patience=args.patience,
    )
    rows = run.run()
    print(f"\n{run.machine['gpu']}, {run.machine['commit']}")
    print(table(condensed(rows)))
    if old is not None:
        print(f"\nagainst {args.compare[0]}\n{compare(old, rows)}")
    bad = [row for row in rows if row.verdict in ("fail", "skip")]
    incomplete = [part for part, told in run.told.items() if told["ended"] != "complete"]
    print(
        f"\n{len(rows)} checks in {time.monotonic() - started:.0f} s: "
        + (f"{len(bad)} not passed" if bad else "all is well")
        + (f"; incomplete: {', '.join(incomplete)}" if incomplete else "")
        + f"; {args.out}/gpu_check.json"
    )
    return 1 if bad or incomplete else 0


if __name__ == "__main__":
    sys.exit(main())
