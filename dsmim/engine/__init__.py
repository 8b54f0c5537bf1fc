"""How a step is computed: the process group, DeepSpeed, the optimizer, the learning-rate schedule.

Importing it sends DeepSpeed's messages to standard error, those of DeepSpeed's own import too: its logger would print
to standard output, which holds a command's result alone.
"""

import logging
import sys


def _print_on_standard_error(record: logging.LogRecord) -> bool:
    """Print a message of DeepSpeed's logger. Return False, so that no other handler prints it."""
    print(f"DeepSpeed: [{record.levelname}] {record.getMessage()}", file=sys.stderr, flush=True)
    return False


logging.getLogger("DeepSpeed").addFilter(_print_on_standard_error)
