"""Ctrl-C under DeepSpeed's launcher.

A terminal sends Ctrl-C to every process of its foreground group: the ranks, but also the two
processes of the `deepspeed` command, which die of it at once and report failure while the
ranks are still saving. A rank that makes itself the foreground group receives Ctrl-C alone; it
stops the job, and the launcher sees ranks that ended well.
"""

import contextlib
import os
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def foreground(enabled: bool) -> Iterator[None]:
    """Own the terminal's Ctrl-C while the block runs, where this process may.

    Does nothing without a controlling terminal, in a background job, and in a process that leads
    its group already (then Ctrl-C reaches it alone anyway).
    """
    terminal = _terminal() if enabled and os.getpgrp() != os.getpid() else None
    if terminal is None:
        yield
        return
    previous = os.getpgrp()
    if os.tcgetpgrp(terminal) != previous:
        os.close(terminal)
        yield
        return
    # changing the foreground group from outside of it would stop this process otherwise
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    # the shell watches the launcher's group only: a rank stopped by Ctrl-Z could not be continued
    signal.signal(signal.SIGTSTP, signal.SIG_IGN)
    os.setpgid(0, 0)
    os.tcsetpgrp(terminal, os.getpgrp())
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.tcsetpgrp(terminal, previous)
        os.close(terminal)


def _terminal() -> int | None:
    try:
        return os.open("/dev/tty", os.O_RDWR)
    except OSError:
        return None
