"""A small shop: web calls api, api counts in Redis. `python -m examples.shop` shows it at work."""
