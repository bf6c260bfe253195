"""Held-out loss at equal tokens: strategies against DDP, over several seeds."""
