"""What every component shares. Imports no component."""

__version__ = "0.1.0"
