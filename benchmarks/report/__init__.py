"""The report of a run: measured, put together, shown."""
