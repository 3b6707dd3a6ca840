"""What the experiments share: tasks, the record of a run, figures."""
