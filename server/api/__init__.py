"""HTTP to domain and back; no logic."""
