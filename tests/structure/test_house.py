"""The house in order: import direction, module sizes, package docstrings, the README's tour, waits on the hot path.

Everything is read by AST, but for the tests that import: those run in a process of their own, so that what other tests
have imported cannot hide a cycle or a missing import.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "lightvl"
MODULES = sorted(PACKAGE.rglob("*.py"))

# What each part may import besides itself; the order of DESIGN.md, from the left.
BASE = {"core", "errors", "config", "log", "metrics"}
ALLOWED: dict[str, set[str]] = {
    "core": set(),
    "errors": set(),
    "config": BASE,
    "log": BASE,
    "metrics": BASE,
    "images": BASE,
    "scheduling": BASE | {"images"},
    "kernels": set(),
    "attention": BASE | {"images", "kernels"},
    "models": BASE | {"images", "scheduling", "kernels", "attention"},
    "prompt": BASE | {"images", "scheduling", "attention", "models"},
    # `demo` is data and imports nothing; `engine/build.py` asks it for a folder
    "engine": BASE | {"images", "scheduling", "kernels", "attention", "models", "prompt", "demo"},
    "server": BASE | {"images", "scheduling", "attention", "models", "prompt", "engine"},
    "demo": set(),
    "cli": BASE | {"images", "scheduling", "attention", "models", "prompt", "engine", "server"},
    "__main__": {"cli"},
    "__init__": set(),
}
WITHOUT_TORCH = ("scheduling", "server", "cli", "core", "errors", "config", "log", "metrics")
"""These do not name torch themselves; `scheduling` and all that it imports must not load it either."""

# The lane must not wait for the device here. A line that does says why: `# sync: ...`.
HOT = [
    *PACKAGE.glob("attention/*.py"),
    *(PACKAGE / name for name in ("models/decoder.py", "engine/runner.py", "engine/inputs.py", "engine/sampler.py")),
]
WAITS = {"item", "cpu", "tolist", "synchronize", "sleep", "nonzero"}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(path: Path, source: str | None = None) -> list[tuple[int, str]]:
    """(line, absolute dotted name) of each import, also those inside functions and under TYPE_CHECKING."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    found = []
    for node in ast.walk(ast.parse(source if source is not None else path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            # `from lightvl import errors` names a part only in its alias
            found += [(node.lineno, f"{prefix}.{alias.name}") for alias in node.names]
    return found


def wrong_imports(path: Path, source: str | None = None) -> list[str]:
    part = part_of(path)
    wrong = []
    for line, name in imported_names(path, source):
        parts = name.split(".")
        if parts[0] == "torch" and part in WITHOUT_TORCH:
            wrong.append(f"{relative(path)}:{line} imports torch")
        if parts[0] != "lightvl" or len(parts) < 2:
            continue
        if not (PACKAGE / parts[1]).is_dir() and not (PACKAGE / f"{parts[1]}.py").is_file():
            continue  # a name of lightvl/__init__.py, such as the version
        if parts[1] != part and parts[1] not in ALLOWED[part]:
            wrong.append(f"{relative(path)}:{line} imports {name}")
    return wrong


def test_every_part_has_its_place_in_the_order():
    assert {part_of(path) for path in MODULES} <= set(ALLOWED)


def test_imports_go_from_right_to_left_only():
    assert [line for path in MODULES for line in wrong_imports(path)] == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("scheduling/plan.py", "import torch.nn"),
        ("server/app.py", "def f():\n    from torch import Tensor"),
        ("scheduling/plan.py", "from lightvl.attention.base import StepInputs"),
        ("models/decoder.py", "from ..engine import runner"),
        ("core.py", "from lightvl import errors"),
        ("engine/engine.py", "import lightvl.server.app"),
    ],
)
def test_a_wrong_import_is_seen(path, source):
    assert len(wrong_imports(PACKAGE / path, source)) == 1


def run_python(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def test_scheduling_never_loads_torch():
    names = [module_name(path) for path in MODULES if part_of(path) == "scheduling"]
    run_python(
        f"import importlib, sys\n"
        f"for name in {names}: importlib.import_module(name)\n"
        f"heavy = sorted(set(sys.modules) & {{'torch', 'transformers', 'aiohttp'}})\n"
        f"assert not heavy, f'scheduling loads {{heavy}}'"
    )


def test_each_module_imports_alone():
    """One process loads what is foreign and forks a child per module, so that each starts without any of ours."""
    foreign = sorted(
        {
            name.split(".")[0]
            for path in MODULES
            for _, name in imported_names(path)
            if name.split(".")[0] not in ("lightvl", "flashinfer", "__future__")
        }
    )
    absent = {"lightvl.kernels.triton_tower"} if importlib.util.find_spec("triton") is None else set()
    names = [name for path in MODULES if path.name != "__main__.py" and (name := module_name(path)) not in absent]
    run_python(
        f"""
import importlib, os, sys, traceback, warnings
for name in {foreign}:
    try: importlib.import_module(name)
    except ImportError: pass  # an optional one; who needs it fails below
broken = []
for name in {names}:
    pid = os.fork()
    if pid == 0:
        warnings.simplefilter("error", SyntaxWarning)
        try: importlib.import_module(name)
        except BaseException: traceback.print_exc(); sys.stderr.flush(); os._exit(1)
        os._exit(0)
    if os.waitpid(pid, 0)[1]: broken.append(name)
sys.exit(f"these do not import alone: {{broken}}" if broken else 0)
"""
    )


def test_modules_are_short():
    lengths = {relative(path): len(path.read_text().splitlines()) for path in MODULES}
    assert {name: n for name, n in lengths.items() if n > 450} == {}
    assert statistics.median(n for name, n in lengths.items() if not name.endswith("__init__.py")) < 220


def test_every_package_says_what_goes_in_and_out():
    silent = [
        relative(path)
        for path in MODULES
        if path.name == "__init__.py" and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert silent == []


def test_every_module_says_what_it_owns():
    assert [relative(path) for path in MODULES if not ast.get_docstring(ast.parse(path.read_text()))] == []


def waits(path: Path, source: str) -> list[str]:
    """Calls that wait for the device or block the lane, on lines without a `# sync:` note."""
    lines = source.splitlines()
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in WAITS:
            line = node.func.end_lineno or node.lineno
            if "# sync:" not in lines[line - 1]:
                found.append(f"{path.name}:{line} .{node.func.attr}()")
    return found


def test_nothing_on_the_hot_path_waits_without_saying_why():
    assert [line for path in HOT if path.exists() for line in waits(path, path.read_text())] == []


@pytest.mark.parametrize(
    "call", ["x.item()", "y = (x + 1).cpu()", "torch.cuda.synchronize()", "time.sleep(1)", "f(\n a.tolist())"]
)
def test_a_wait_is_seen(call):
    assert len(waits(Path("x.py"), call)) == 1
    assert waits(Path("x.py"), "\n".join(f"{line}  # sync: because" for line in call.splitlines())) == []


# --- the README -----------------------------------------------------------------------------------------------------


def tour_steps(readme: str) -> list[str]:
    """The numbered lines of the README's tour."""
    heading = re.search(r"^#+ .*\btour\b.*$", readme, re.M | re.I)
    if heading is None:
        return []
    section = re.split(r"^#+ ", readme[heading.end() :], maxsplit=1, flags=re.M)[0]
    return re.findall(r"^\d+\. (.+(?:\n(?!\d+\. |\s*\n).+)*)", section, re.M)


def missing_names(step: str) -> list[str]:
    """What a step names in backticks and is not there. `file.py` must exist below lightvl/; every other name in
    backticks (`name`, `Class.name`) must be defined in one of the files that the step names."""
    quoted = re.findall(r"`([^`]+)`", step)
    files = [name for name in quoted if name.endswith(".py")]
    missing = [name for name in files if not (PACKAGE / name).is_file()]
    defined: set[str] = set()
    for name in files:
        if (PACKAGE / name).is_file():
            defined |= definitions(ast.parse((PACKAGE / name).read_text()))
    return missing + [name for name in quoted if not name.endswith(".py") and name.removesuffix("()") not in defined]


def definitions(tree: ast.Module) -> set[str]:
    names = set()
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            names.add(node.name)
            methods = [child for child in node.body if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)]
            names |= {f"{node.name}.{method.name}" for method in methods}
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
    return names


def test_the_tour_names_what_exists():
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("no README yet")
    steps = tour_steps(readme.read_text())
    assert len(steps) == 11
    for step in steps:
        assert re.search(r"`[\w/]+\.py`", step) and re.search(r"`(?![^`]*\.py`)[^`]+`", step), (
            f"no file or name: {step}"
        )
        assert missing_names(step) == [], step


def test_a_stale_tour_is_seen():
    tour = (
        "## The tour\n\n1. `engine/sampler.py`, `sample`: ok,\n   second line `Sampled`\n"
        "2. `engine/sampler.py`, `gone`\n\n## Next\n1. x"
    )
    steps = tour_steps(tour)
    assert [missing_names(step) for step in steps] == [[], ["gone"]]
    assert missing_names("`engine/no.py`, `sample`") == ["engine/no.py", "sample"]


def test_every_flag_of_the_readme_exists_and_the_other_way_round():
    readme = ROOT / "README.md"
    if not readme.exists() or not (PACKAGE / "cli.py").exists():
        pytest.skip("no README or no command line yet")
    done = subprocess.run(
        [sys.executable, "-m", "lightvl", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    flag = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]+")
    of_help = set(flag.findall(done.stdout)) - {"--help", "--version"}
    section = re.split(r"^## Flags\s*$", readme.read_text(), maxsplit=1, flags=re.M)[-1].split("\n## ")[0]
    assert done.returncode == 0 and of_help
    assert set(flag.findall(section)) - {"--help"} == of_help
