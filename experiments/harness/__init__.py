"""The experiments share their tasks, the records of their runs, and their figures here."""
