"""What a long computation leaves behind and shows: its folder, checkpoints, progress, options and tables."""
