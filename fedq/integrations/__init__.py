"""fedq on other people's systems. Each package here needs an extra of the same name."""
