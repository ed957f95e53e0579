"""The sidecar library: from mesh intent to a configured Envoy. Hosted by the agent's process."""
