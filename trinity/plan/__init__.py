"""Planning a run before it starts: layouts, memory, traffic, time."""
