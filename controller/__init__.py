"""The controller: decides what runs where, keeps the journal, and is the control plane of the mesh."""
