"""The agent's decisions, pure: what is told (`events`), what is asked for (`commands`), and `step` between the two.

Nothing here does I/O, reads a clock or draws a random number of its own.
"""
