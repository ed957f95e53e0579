"""A task becomes a sandbox: one driver for each kind of workload."""
