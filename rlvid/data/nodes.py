"""Labels that keep Ray Data's tasks on certain nodes."""

from collections.abc import Iterable

_NODE = "ray.io/node-id"
"""Label of a node with its own id."""


def on_nodes(ids: Iterable[str]) -> dict[str, str]:
    """Returns the selector of tasks that run on these nodes alone."""
    # No space after the comma: Ray 2.60 takes it for a part of the id, and the process that starts the task aborts.
    return {_NODE: f"in({','.join(sorted(set(ids)))})"}
