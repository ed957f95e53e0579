"""The node agent: runs allocations as sandboxes, each with its sidecar, and reports what happens to them."""
