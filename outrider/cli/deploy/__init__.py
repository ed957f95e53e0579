"""`outrider deploy`: hosts over SSH become nodes and controllers, are upgraded and removed."""
