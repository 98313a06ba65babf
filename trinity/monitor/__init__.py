"""Watching runs from outside: reads what a run writes, never writes into its directory."""
