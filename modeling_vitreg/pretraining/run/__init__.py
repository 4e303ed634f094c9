"""Recipe, schedules, optimiser and sharding of a run."""
