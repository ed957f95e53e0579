"""The one execution primitive: a namespaced process tree run by crun under conmon, which outlives the agent."""
