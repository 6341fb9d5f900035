"""The plan of a run before it starts: its work, memory, disk and least time, from configurations and shapes alone."""
