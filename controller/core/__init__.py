"""The controller's pure core: events in, commands out. No I/O, no clock, no global randomness."""
