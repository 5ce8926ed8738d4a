"""How a drill starts and ends the cluster that it starts."""

from __future__ import annotations

import signal
import subprocess
import sys

from atom_cluster.tools.drill.cluster import children_hear_sigint

ASK = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"


def test_a_child_of_a_background_job_hears_sigint_and_the_job_goes_on_ignoring_it() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        deaf = subprocess.check_output([sys.executable, "-c", ASK], text=True)
        with children_hear_sigint():
            hearing = subprocess.check_output([sys.executable, "-c", ASK], text=True)
        assert (deaf.strip(), hearing.strip()) == ("False", "True")
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
