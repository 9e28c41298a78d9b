"""The run store: published nodes (run_store.py), leases on nodes (lease.py), listing, verification, merge and gc."""

from fastprune.store.run_store import FORMAT, RequestedOutputs, RunStore, check_format, gain, lpr_name, write_csv

__all__ = ["FORMAT", "RequestedOutputs", "RunStore", "check_format", "gain", "lpr_name", "write_csv"]
