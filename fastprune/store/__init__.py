"""The run store: what is published (run_store.py), who computes what (lease.py), and the commands on it (cli.py)."""

from fastprune.store.run_store import FORMAT, Products, RunStore, check_format, gain, trace_name, write_csv

__all__ = ["FORMAT", "Products", "RunStore", "check_format", "gain", "trace_name", "write_csv"]
