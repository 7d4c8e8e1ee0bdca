"""Search for the fastest settings on this machine; the command is `medhead tune`."""
