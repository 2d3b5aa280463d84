"""The options of a run, and everything that follows from them alone: shapes, layouts, pipeline schedules."""
