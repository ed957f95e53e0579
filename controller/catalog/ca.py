"""The embedded Connect CA: the mesh's trust domain, its root and the leaves it signs."""


class ConnectCa:
    """`EmbeddedIssuer(catalog.ca, datacenter)`."""
