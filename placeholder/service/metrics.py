"""Cog's metrics of a request, such as those that Replicate bills by."""

import sys


def record(name: str, value: float) -> None:
    """Record a metric of the current request; nothing without Cog. A metric that Cog refuses is a warning in the log.

    Replicate's names are `training_step_count` and `image_output_count`.
    """
    if "cog" not in sys.modules:  # scripts and tests work without it
        return
    try:
        from cog import current_scope

        current_scope().record_metric(name, value)
    except (ImportError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        print(f"Warning: the metric {name} was not recorded ({error})")
