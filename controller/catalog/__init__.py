"""The embedded catalog: the part of Consul's HTTP API that Outrider and its users' tools need."""
