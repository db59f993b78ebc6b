"""A few hundred of the files that tests/fuzz.py makes. In a process of its own, whose memory is limited."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_forged_files_are_read_or_refused() -> None:
    script = Path(__file__).with_name("fuzz.py")
    run = subprocess.run([sys.executable, str(script), "--count=360"], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
