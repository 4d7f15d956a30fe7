"""One module a command: `Options`, what its flags mean, and `run(options) -> exit code`."""
