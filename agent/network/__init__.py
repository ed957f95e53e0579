"""An allocation's network on its node: namespace, veth, nftables, names."""
