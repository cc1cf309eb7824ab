"""Build flashinfer's kernels ahead of time with nvcc, no GPU needed, and pack them as a wheel that flashinfer finds.

    python tools/build_kernels.py --arch 9.0a --out dist         # Hopper; Ampere 8.0, Ada 8.9, Blackwell 10.0a, 12.0f
    python tools/build_kernels.py --arch 9.0a --only page norm   # some of them, to try it
    python tools/build_kernels.py --list

Needs CUDA 13's nvcc, g++, and in this Python torch and flashinfer (`pip install torch flashinfer-python==0.6.12
apache-tvm-ffi==0.1.11 ninja`). Two headers are missing in small toolkits: `pip install --no-deps --target HEADERS
nvidia-curand==10.4.0.35 nvidia-cublas==13.1.1.3`, then `--headers HEADERS`. All take 10 minutes of one core.

On the GPU machine: `pip install --no-deps --target DIR *.whl`, then `PYTHONPATH=DIR FLASHINFER_DISABLE_JIT=1`. What is
built already in `--work` is not built again.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from gpu.modules import FLASHINFER, MODULES, NEEDED, KernelModule
from gpu.wheel import pack
from tqdm import tqdm


class Unable(Exception):
    """This machine cannot build; the message says what it lacks."""


def find_nvcc() -> Path:
    """In CUDA_HOME where that is set, else in /usr/local/cuda or on the PATH. Unable where there is none."""
    home, on_path = os.environ.get("CUDA_HOME"), shutil.which("nvcc")
    candidates = [Path(home)] if home else [Path("/usr/local/cuda")]
    if on_path and not home:  # last: what is on the PATH may be a wrapper, far from headers and libraries
        candidates.append(Path(on_path).resolve().parents[1])
    for candidate in candidates:
        if (candidate / "bin/nvcc").is_file():
            return candidate.resolve() / "bin/nvcc"
    raise Unable(f"there is no nvcc in {candidates[0]} nor on the PATH: install CUDA 13's compiler, or set CUDA_HOME")


def cuda_version(nvcc: Path) -> str:
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release (\d+\.\d+)", told)
    if found is None:
        raise Unable(f"{nvcc} --version does not tell its release:\n{told}")
    return found[1]


def check_python() -> None:
    for package in ("torch", "flashinfer", "tvm_ffi"):
        if importlib.util.find_spec(package) is None:
            raise Unable(f"{package} is not installed; see the head of {Path(__file__).name}")
    from importlib.metadata import version

    if version("flashinfer-python") != FLASHINFER:
        raise Unable(f"flashinfer-python is {version('flashinfer-python')}; LightVL calls {FLASHINFER}")
    if importlib.util.find_spec("flashinfer_jit_cache") is not None:
        raise Unable("flashinfer_jit_cache is installed here: what it holds would not be built")


def include_folders(modules: list[KernelModule], cuda_home: Path, headers: Path | None) -> list[Path]:
    """Where the headers are that the modules need beyond the toolkit's. Unable where one is nowhere."""
    folders: list[Path] = []
    for header in sorted({header for module in modules for header in module.headers}):
        if (cuda_home / "include" / header).is_file():
            continue
        found = sorted(headers.rglob(header)) if headers is not None else []
        if not found:
            raise Unable(f"{header} is neither in {cuda_home}/include nor below --headers; see the head of this tool")
        folders.append(found[0].parent)
    return list(dict.fromkeys(folders))


def link_folder(work: Path, cuda_home: Path) -> Path:
    """A folder to link against: a libcuda.so that has only its name (the driver brings the real one), and libcudart."""
    folder = work / "lib"
    folder.mkdir(parents=True, exist_ok=True)
    stub = folder / "libcuda.so"
    if not stub.exists():
        command = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-x", "c", "-", "-o", str(stub)]
        done = subprocess.run(
            command, input="void lightvl_stub(void) {}\n", text=True, capture_output=True, check=False
        )
        if done.returncode:
            raise Unable(f"gcc cannot link: {done.stderr.strip()}")
    runtime = next((path for name in ("lib64", "lib") if (path := cuda_home / name / "libcudart.so").exists()), None)
    if runtime is None:
        raise Unable(f"there is no libcudart.so in {cuda_home}")
    if not (folder / "libcudart.so").exists():
        (folder / "libcudart.so").symlink_to(runtime)
    return folder


def environment(arch: str, cuda_home: Path, work: Path, includes: list[Path], links: Path, jobs: int) -> dict[str, str]:
    """What flashinfer's build reads. FLASHINFER_DISABLE_JIT must not be set beside it."""
    return {
        "FLASHINFER_CUDA_ARCH_LIST": arch,
        "FLASHINFER_WORKSPACE_BASE": str(work),
        "FLASHINFER_EXTRA_CUDAFLAGS": " ".join(f"-isystem {folder}" for folder in includes),
        "FLASHINFER_EXTRA_LDFLAGS": f"-L{links} -s",
        "CUDA_HOME": str(cuda_home),
        "MAX_JOBS": str(jobs),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),  # for ninja
    }


def build(modules: list[KernelModule]) -> list[Path]:
    """Compile what is not compiled yet, the quick ones first. Returns the libraries."""
    libraries = []
    with tqdm(modules, desc="kernels", unit="module") as bar:
        for module in bar:
            bar.set_postfix_str(module.name)
            started = time.monotonic()
            spec = module.spec()
            spec.build(verbose=False)
            library = Path(spec.jit_library_path)
            libraries.append(library)
            bar.write(f"{module.name:12} {time.monotonic() - started:6.0f} s {library.stat().st_size / 1e6:6.2f} MB")
    return libraries


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--arch", type=_arch, help='compute capability, such as "9.0a"')
    parser.add_argument("--out", type=Path, default=Path("dist"), help="folder of the wheel (default: dist)")
    parser.add_argument("--work", type=Path, default=Path("build/kernels"), help="where to build")
    parser.add_argument("--headers", type=Path, help="a folder with what the toolkit lacks")
    parser.add_argument("--only", nargs="+", choices=list(MODULES), metavar="NAME", help="default: all that are needed")
    parser.add_argument("--jobs", type=int, default=1, help="compilers at once; one takes up to 4 GB (default: 1)")
    parser.add_argument("--list", action="store_true", help="name the modules and stop")
    args = parser.parse_args()
    if args.arch is None and not args.list:
        parser.error("--arch is needed")
    return args


def _arch(text: str) -> str:
    if re.fullmatch(r"\d+\.\d[af]?", text) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a compute capability such as 9.0a")
    return text


def main() -> int:
    args = parse_args()
    if args.list:
        for module in MODULES.values():
            print(f"{module.name:12} {'needed' if module in NEEDED else 'later':7} {', '.join(module.functions)}")
        return 0
    modules = [MODULES[name] for name in args.only] if args.only else list(NEEDED)
    try:
        nvcc = find_nvcc()
        cuda_home, cuda = nvcc.parents[1], cuda_version(nvcc)
        check_python()
        work = args.work.resolve()
        includes = include_folders(modules, cuda_home, args.headers and args.headers.resolve())
        links = link_folder(work, cuda_home)
    except Unable as error:
        print(f"build_kernels: {error}", file=sys.stderr)
        return 2
    os.environ.pop("FLASHINFER_DISABLE_JIT", None)
    os.environ.update(environment(args.arch, cuda_home, work, includes, links, args.jobs))
    wheel = pack(build(modules), args.out, arch=args.arch, cuda=cuda)
    print(f"{wheel}: {len(modules)} modules, {wheel.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
