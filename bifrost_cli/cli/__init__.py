"""The command line: a command parses, calls one stage function, prints one result."""
