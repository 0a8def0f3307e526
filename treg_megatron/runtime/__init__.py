"""What stands between our code and the machine: devices, the installed stack, one process per rank."""
