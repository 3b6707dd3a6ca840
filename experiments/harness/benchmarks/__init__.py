"""The benchmarks share timings in turn, what is timed, and what it is compared with."""
