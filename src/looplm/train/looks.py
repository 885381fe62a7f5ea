"""Looking at a run while it trains: validation, probes, samples, displays. None of it may end the run."""

import logging
from collections.abc import Callable
from typing import TypeVar

from looplm.telemetry.sinks import first_line

T = TypeVar("T")
logger = logging.getLogger(__name__)


def attempt(what: str, look: Callable[[], T], *, otherwise: T, step: int) -> T:
    """What `look` returns; `otherwise` where it failed, after a warning of one line. A run is worth more than a look at
    it, so whatever goes wrong in one (memory that is not there, a bug) costs that look alone."""
    try:
        return look()
    except Exception as error:
        logger.warning("step %d: %s failed (%s); training continues", step, what, first_line(error))
        logger.debug("%s", what, exc_info=True)
        return otherwise
