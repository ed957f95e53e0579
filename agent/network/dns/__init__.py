"""Names of the mesh inside allocations: the responder process, and the agent's side of it."""
