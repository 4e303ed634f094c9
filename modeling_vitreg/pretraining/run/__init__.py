"""How a run is set and driven: recipe, schedules, optimiser, sharding."""
