"""The data all components speak of: frozen values, no behaviour beyond what follows from the value itself."""
