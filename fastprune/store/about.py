"""What a node.json holds."""

from typing import Any

_NUMBER = (int, float)
_RESULTS: dict[str, dict[str, tuple[type, ...]]] = {
    "train": {"epochs": (int,), "diverged": (bool,), "accuracy": (*_NUMBER, type(None))},
    "prune": {"round": (int,), "total": (int,), "kept": (int,), "density": _NUMBER, "layerwise_ratios": (dict,)},
    "filters": {
        "removed_fraction": _NUMBER,
        "parameters": _NUMBER,
        "flops": _NUMBER,
        "latency_ms": _NUMBER,
        "latency_whole_ms": _NUMBER,
        "spared": (list,),
    },
}
"""By kind of node what its result has at least."""


def check_about(about: Any, key: str) -> None:
    """ValueError unless it is what a node.json holds, for the node `key`."""
    if not isinstance(about, dict):
        raise ValueError("it describes no node")
    if not isinstance(about.get("kind"), str) or not isinstance(about.get("semantics"), int):
        raise ValueError("kind or semantics are missing")
    for name in ("spec", "result", "provenance"):
        if not isinstance(about.get(name), dict):
            raise ValueError(f"{name} is missing")
    if about.get("key") != key:
        raise ValueError(f"it is of the node {str(about.get('key'))[:40]!r}")
    for name, types in _RESULTS.get(about["kind"], {}).items():
        value = about["result"].get(name, "missing")
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise ValueError(f"its result's {name} is {str(value)[:40]}")
