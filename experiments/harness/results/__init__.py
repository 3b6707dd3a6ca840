"""What is made of measurements, for two experiments or more: intervals, milestones, profiles and figures."""
