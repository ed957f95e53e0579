"""The command line: an RPC client of the fleet."""
