"""What a sidecar should have, derived purely from mesh intent; and who has been sent what."""
