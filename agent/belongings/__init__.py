"""What a workload brings along: made ready before a task starts, renewed while it runs, gone after it."""
