"""A fleet on this machine: a control namespace with controller, broker and Prometheus, one more for each node."""
