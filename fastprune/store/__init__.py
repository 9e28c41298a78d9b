"""The run store: what is published (run_store.py), who computes what (lease.py), and what looks after it."""

from fastprune.store.run_store import FORMAT, RequestedOutputs, RunStore, check_format, gain, lpr_name, write_csv

__all__ = ["FORMAT", "RequestedOutputs", "RunStore", "check_format", "gain", "lpr_name", "write_csv"]
