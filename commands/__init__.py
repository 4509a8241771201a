"""One file a command: options, call, print, exit code. Imported by `cli` alone."""
