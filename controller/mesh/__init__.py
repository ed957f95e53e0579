"""The mesh's control plane: writes Consul or the embedded catalog, watches it, issues leaves."""
