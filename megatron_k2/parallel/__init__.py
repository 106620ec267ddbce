"""Where the model runs: the CPU host, and the checks on a parallel layout."""
