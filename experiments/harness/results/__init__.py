"""Two experiments or more make these of measurements: intervals, milestones, profiles and figures."""
