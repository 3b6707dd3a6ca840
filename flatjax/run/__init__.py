"""Run long computations, with a folder, checkpoints, progress, options and tables for each."""
