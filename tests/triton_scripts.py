"""Scripts that run or compile Triton's kernels, in a process of their own: what it is told, it reads when imported."""

from __future__ import annotations

import os
import subprocess
import sys


def run(script: str, *arguments: str, folder, interpreted: bool) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder), "TRITON_INTERPRET": "1" if interpreted else "0"}
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
