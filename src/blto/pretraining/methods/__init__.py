"""SSL methods, one paper a file."""
