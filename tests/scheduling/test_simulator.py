"""tools/simulate.py: it runs, its last line is JSON, and it shows what the radix cache saves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def simulate(*flags: str) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "tools" / "simulate.py"), *flags]
    done = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(result, dict)
    return result


def test_a_trace_is_replayed(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    image, system = ["image", 7, 300], ["text", 1, 40]
    lines = [
        {"time_s": 1.0, "pieces": [system, image, ["text", idx + 10, 20]], "answer_len": 5, "n": 2} for idx in range(8)
    ]
    trace.write_text("\n".join(json.dumps(line) for line in lines))
    shared = simulate("--trace", str(trace))
    alone = simulate("--trace", str(trace), "--no-radix")
    assert shared["requests"] == 8 and shared["refused"] == shared["preemptions"] == 0
    assert shared["prefilled_tokens"] < alone["prefilled_tokens"] / 3
    assert shared["ttft_max_s"] < alone["ttft_max_s"] and alone["cached_tokens"] == 0


def test_cross_images_and_small_pools() -> None:
    flags = ["--requests", "20", "--rate", "5", "--cross", "--image-size", "4", "--image-units", "8", "--pages", "150"]
    result = simulate(*flags, "--encode-cost", "0.5")
    assert result["requests"] == 20 and result["itl_p99_s"] > 0
