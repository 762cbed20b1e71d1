"""Trying again: exponential back-off with full jitter, within a deadline."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from groundwork.data.storage_errors import (
    PermanentError,
    StorageError,
    TransientError,
    redact,
)

T = TypeVar("T")


@dataclass(frozen=True)
class RetryConfig:
    """How long a remote read may take, and how often it is tried.

    attempts: at most so many. Before attempt k+1 the reader sleeps a random time between 0 and
        min(max_delay_s, first_delay_s * 2**(k-1)), or longer where the server says Retry-After.
    connect_timeout_s: to open a connection. stall_timeout_s: without a single byte.
    attempt_timeout_s: of one attempt as a whole, however slowly bytes trickle.
    deadline_s: of all attempts together.
    """

    attempts: int = 8
    first_delay_s: float = 0.25
    max_delay_s: float = 20.0
    connect_timeout_s: float = 10.0
    stall_timeout_s: float = 20.0
    attempt_timeout_s: float = 60.0
    deadline_s: float = 300.0

    def __post_init__(self) -> None:
        times = {name: value for name, value in vars(self).items() if name.endswith("_s")}
        for name, value in times.items():
            if not value > 0:
                raise ValueError(f"RetryConfig: {name} is {value}; give seconds, more than 0")
        if self.attempts < 1:
            raise ValueError(f"RetryConfig: attempts is {self.attempts}; give at least 1")


def with_retries(
    attempt: Callable[[float], T],
    what: str,
    config: RetryConfig,
    *,
    generator: random.Random,
    deadline_s: float | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """The result of the first attempt that succeeds.

    attempt: is given the seconds it may take; raises TransientError or PermanentError.
    what: begins the message of a failure: file and range.
    generator: of the jitter; not the global one, whose numbers belong to the training.
    deadline_s: what is left of the configured one, if something else used part of it.
    Raises StorageError, or the kind of it that a PermanentError names.
    """
    start = clock()
    deadline = start + (config.deadline_s if deadline_s is None else deadline_s)
    tries = 0
    while True:
        tries += 1
        try:
            # an attempt of less than a millisecond could only time out
            return attempt(max(1e-3, min(config.attempt_timeout_s, deadline - clock())))
        except PermanentError as error:
            # from None: the cause of a library may hold a signed URL, and tracebacks are logged
            raise error.kind(redact(f"{what}: {error}; {error.remedy}")) from None
        except TransientError as error:
            delay = generator.uniform(
                0, min(config.max_delay_s, config.first_delay_s * 2.0 ** min(tries - 1, 60))
            )
            delay = max(delay, error.retry_after_s)
            if tries < config.attempts and clock() + delay < deadline:
                sleep(delay)
                continue
            asked = f" (it asks for {error.retry_after_s:.0f} s)" if error.retry_after_s else ""
            raise StorageError(
                redact(
                    f"{what}: failed {tries} time{'s' if tries > 1 else ''} in "
                    f"{clock() - start:.1f} s, the last time with: {error}{asked}; check the "
                    "network and the server, or allow more patience than RetryConfig(attempts="
                    f"{config.attempts}, attempt_timeout_s={config.attempt_timeout_s:g}, "
                    f"deadline_s={config.deadline_s:g})"
                )
            ) from None
