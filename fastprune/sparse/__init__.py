"""Computing with what is left of a pruned network on a CPU."""
