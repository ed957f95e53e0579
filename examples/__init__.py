"""Jobs to begin with. Each directory is complete: its job file and what travels with it."""
